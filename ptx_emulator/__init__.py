"""A GPU for tests: Triton's own driver interface, behind which the PTX that it compiled is executed
on CPU tensors.
"""
