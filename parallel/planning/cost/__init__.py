"""Cost of one micro-batch on one rank: segments, their forward pass, and what is kept for the backward pass."""
