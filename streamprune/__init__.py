"""Prune Mixture-of-Experts models one decoder block at a time."""

__version__ = "0.2.0"
