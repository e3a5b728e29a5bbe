"""Measuring the kernels on a GPU: one linear at a time (kernels.py) and whole models decoding
(decode.py).
"""
