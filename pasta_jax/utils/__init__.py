"""Shared helpers: files, JSON lines, records of a run, progress bars, the HTTP client."""
