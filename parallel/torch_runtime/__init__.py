"""Runs the graphs that MindSpore's partitioner makes, by PyTorch: one process a rank, gloo on CPUs, NCCL on GPUs.

Imports torch and NumPy, nothing of MindSpore, so that an exported program runs where MindSpore is not installed.
"""
