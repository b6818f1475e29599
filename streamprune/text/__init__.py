"""From calibration text to token sequences."""
