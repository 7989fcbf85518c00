"""Serving PanGu-alpha: the engine that runs many requests in one batch, and its HTTP server."""
