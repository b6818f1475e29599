"""From calibration text to token sequences: recipes, sources, chats, packing."""
