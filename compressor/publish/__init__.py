"""What goes to a hub."""
