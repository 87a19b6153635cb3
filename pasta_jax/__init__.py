"""PASTA in JAX: language models that decode independent parts of their own answer in parallel."""

__version__ = "0.1.0"
