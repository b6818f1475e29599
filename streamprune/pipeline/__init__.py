"""The steps of each command: run, score, prune, resume, status."""
