"""Fresh models: a run publishes versions as it trains, a server follows them."""
