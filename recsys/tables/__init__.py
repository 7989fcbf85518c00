"""Embedding tables on the host: ids to rows without collisions, larger than a device's memory, trained by the step."""
