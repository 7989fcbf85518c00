"""Serving of rankers: engine, cached user states, HTTP."""
