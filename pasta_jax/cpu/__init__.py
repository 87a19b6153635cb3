"""Kernels of decoding for CPU, compiled by numba on the machine that runs them: XLA calls them as foreign functions.

memory    addresses, atomic additions, C functions
handler   what is in a call of XLA; jobs that threads share
vectors   vector instructions of this machine
panels    products of a few rows with 64 columns of a matrix
rows      weights of attention, sums of rows, norms
products, attention, norms, pool   the kernels
programs  compiles them, makes them known to XLA, and checks them
calls     the kernels as functions of JAX arrays

Only `programs` and `calls` may be imported where numba is not installed.
"""
