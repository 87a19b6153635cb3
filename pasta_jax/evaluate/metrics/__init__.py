"""Metrics of responses. Open `measures.py` first: it computes the figures of a system's rows.
`declared.py` says whether declared lengths mean something, `wins.py` has the figures of judgements, and
`length_control.py` is the length-controlled win rate of AlpacaEval 2.
"""
