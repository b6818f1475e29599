"""Carrying the calibration tokens through the blocks, and scoring their experts."""
