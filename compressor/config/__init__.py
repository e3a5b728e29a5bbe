"""What is asked for: recipes."""
