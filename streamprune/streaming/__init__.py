"""The layer loop: weights, hidden states and micro-batches of one layer at a time."""
