"""NVIDIA cards: those of this machine, and the known ones."""
