"""A generated Chinese corpus of a small world, with questions about it."""
