"""Files that survive a crash, the page cache, and JSON."""
