"""Exported graphs that generate and score, run by torch."""
