"""Generation health: whether a model's continuations end, or go round in circles."""
