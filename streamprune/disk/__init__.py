"""Files that survive a crash, and what the system says when a disk fails, told as our errors."""
