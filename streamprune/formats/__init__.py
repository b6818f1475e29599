"""How parameters are stored in a checkpoint: one file per format, behind the interface in `base`."""
