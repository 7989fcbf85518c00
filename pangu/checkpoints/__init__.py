"""Checkpoints of PanGu-alpha as others write them: their names, their files, and how they shard parameters."""
