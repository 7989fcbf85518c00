"""The quality classifier and its hashed n-gram features."""
