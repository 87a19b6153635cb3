"""Evaluation: how much faster, and what the responses look like."""
