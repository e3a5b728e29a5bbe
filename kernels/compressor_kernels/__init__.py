"""Packed weight layouts and the ops that run on them. Knows tensors only: no checkpoints, no
transformers.
"""
