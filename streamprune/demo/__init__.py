"""A small trained model that is pruned in several ways, to show what pruning costs."""
