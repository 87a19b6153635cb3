"""The PASTA language (docs/language.md): programs, their text and token forms, who sees whom, where, and the cost.

Nothing here imports JAX: training, kernels and the interpreter take the rules from this package. Read in this
order: program, syntax, automaton, thread, joins, positions, visibility, layout, vocabulary, cost.
"""
