"""What a model is made of: its config, its structure on meta, and where its experts lie."""
