"""A model over several devices: its graphs over a paged cache, and what runs them."""
