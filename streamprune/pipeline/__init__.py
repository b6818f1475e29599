"""The course of each command: run, score, prune, resume, status."""
