"""A runtime that starts a kernel for every node of a graph: which kernels a segment runs, their time, what lives."""
