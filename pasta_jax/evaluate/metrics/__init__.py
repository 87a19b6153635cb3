"""Metrics of responses. Open `measures.py` first: it computes the figures of a system's rows.
`length_control.py` is the length-controlled win rate of AlpacaEval 2.
"""
