"""The work folder: what survives an interruption, and how it is resumed."""
