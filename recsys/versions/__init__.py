"""What changes between versions of a ranker: other features from an old checkpoint, versions that a server is pinned to
or goes back to, and requests logged at serving that are scored again."""
