"""Layers of rankers: embedding, tokenization, mixing, feature interactions."""
