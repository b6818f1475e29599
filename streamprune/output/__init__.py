"""The pruned checkpoint: what goes into it, how it is written, and the proof of it."""
