"""What a model predicts on text that it was not scored on, and what a pruned one has lost there: streamed."""
