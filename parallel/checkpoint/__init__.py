"""What outlives a run: full and sharded checkpoints, and how one layout becomes another."""
