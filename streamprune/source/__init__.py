"""The model that is pruned: where it comes from, what its files hold, what it is made of."""
