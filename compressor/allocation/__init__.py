"""A target for every linear: shares of zeros and ranks, and the guard that compares them."""
