"""What is decided before a weight is read: the target, the opened model, memory."""
