"""Training data: annotated responses to programs, programs to packed rows."""
