"""What makes a program fast: patterns of a graph replaced by fused nodes, and what they compute."""
