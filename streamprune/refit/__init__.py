"""Refitting down projections: the mathematics, what enters it, and what it costs."""
