"""The loop over the blocks, and what it works on."""
