"""What `scripts/campaign.py` tries: one module a kind of trouble, each with `run(campaign)`."""
