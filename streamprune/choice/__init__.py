"""From scores to the experts that stay: mixes, schedules, protected experts, and what is lost. Pure; no torch."""
