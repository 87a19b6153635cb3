"""Kernels of decoding for CPU, compiled by numba on the machine that runs them: XLA calls them as foreign functions.

memory    addresses, atomic additions, C functions
handler   what is in a call of XLA; jobs that threads share
vectors   products of a few rows and weights of attention in vector instructions
products, attention, pool   the kernels
programs  compiles them, makes them known to XLA, and checks them
calls     the kernels as functions of JAX arrays

Only `programs` and `calls` may be imported where numba is not installed.
"""
