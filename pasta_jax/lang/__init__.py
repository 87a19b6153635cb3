"""PASTA-LANG: programs, their text and token forms, who sees whom, and what a program costs.

Nothing here imports JAX. Read in this order: program, syntax, automaton, thread, vocabulary, layout, cost.
"""
