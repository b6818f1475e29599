"""What scoring leaves: sums per layer, source and expert, and the methods that make scores of them. No torch."""
