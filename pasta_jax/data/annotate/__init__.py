"""Which parts of a response are independent: plans from a language model, checked, or from form alone."""
