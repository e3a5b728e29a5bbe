"""What runs a packed folder. Importing this package makes transformers' `from_pretrained`
understand one.
"""

from compressor.runtime.hf_transformers import load, runtimes

__all__ = ["load", "runtimes"]
