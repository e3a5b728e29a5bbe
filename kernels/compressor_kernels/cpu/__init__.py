"""Products with packed weights on a CPU: C++ kernels, how they are built, and the layout they read;
and the search of ARMOR for its core.

tiles.h, sparse24.h, thin.h, ops.cpp   the kernels; the layout is described in tiles.h
build.py                               compiles them on first use
ops.py                                 the ops, with their shapes for tracing
tiles.py                               stored form <-> layout
search.cpp, search.py                  the search of ARMOR, which the method calls
"""
