"""Training rankers: on any backend, on MindSpore, validation."""
