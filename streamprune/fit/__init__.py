"""What a model takes of memory, and what fits."""
