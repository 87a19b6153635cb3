"""Figures of responses."""
