"""Tasks of lm-evaluation-harness, run on a whole model."""
