"""A transformers model, block by block."""
