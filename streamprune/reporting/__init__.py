"""What an output says of itself: record, results of evaluations, report and model card."""
