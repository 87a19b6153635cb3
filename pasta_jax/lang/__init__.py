"""PASTA-LANG (docs/language.md): programs, their text and token forms, who sees whom, where, and at what cost.

Nothing here imports JAX: training, kernels and the interpreter all take the rules from this package. Read in this
order: program, syntax, automaton, thread, joins, positions, visibility, layout, vocabulary, cost.
"""
