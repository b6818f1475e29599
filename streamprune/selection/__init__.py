"""From scores to the experts that stay. Needs no torch."""
