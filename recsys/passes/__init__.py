"""The forward passes that a ranker is served by, as graphs of their own: exported, or sharded over processes."""
