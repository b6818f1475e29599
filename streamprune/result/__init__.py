"""What leaves with a pruned model: the choice written out and proved, its record, and its card."""
