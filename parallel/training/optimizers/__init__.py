"""Optimizers: of whole parameters, of the rows of tables that a step uses, and all those of a run."""
