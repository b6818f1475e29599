"""Rounding plain weights to the formats of quantized results. Pure functions of tensors: no model, no files."""
