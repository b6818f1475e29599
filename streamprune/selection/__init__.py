"""Selects the experts to keep from scores. Needs no torch."""
