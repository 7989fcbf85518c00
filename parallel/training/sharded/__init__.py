"""Training a network that is sharded over devices: its step, its micro-batches, one stage of it alone, its run."""
