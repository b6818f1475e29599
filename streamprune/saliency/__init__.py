"""What every expert contributes: recording, statistics, scoring methods, the scores file."""
