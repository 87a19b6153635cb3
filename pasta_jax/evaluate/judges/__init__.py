"""Judges of answers: by likelihood, by a language model, from files."""
