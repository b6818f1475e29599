"""Safetensors checkpoints: files, their index, the Hub, and reading exact byte ranges."""
