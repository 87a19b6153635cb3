"""Decoding: the interpreter of PASTA-LANG, resident on the device.

Read in this order: config, state, step (with sampling and guard), interpreter, trace, generate.
"""
