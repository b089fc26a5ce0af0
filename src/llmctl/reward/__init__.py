"""Score responses with a reward model."""
