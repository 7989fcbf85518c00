"""Metrics of rankers: exact on parts of a log, over all ranks, and before every training step; the verb `evaluate`."""
