"""Text to tokens, tokens to hidden states, and what follows the blocks."""
