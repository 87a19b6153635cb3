"""Damaged files, made at random from a seed, for every reader: `harness` runs them, a table lists them by kind."""
