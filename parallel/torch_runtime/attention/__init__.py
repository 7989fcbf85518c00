"""Attention in torch: with the project's own dropout and documents, and as Ascend's operator computes it."""
