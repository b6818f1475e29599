"""What an output shows of itself: report.html, its pictures, and what they add to the model card. No torch."""
