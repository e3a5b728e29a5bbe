"""What was recorded of a run and of its scores."""
