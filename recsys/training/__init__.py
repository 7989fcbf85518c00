"""Training rankers: on any backend, on MindSpore, on a stream; validation."""
