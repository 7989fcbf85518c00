"""Mixtures of experts for every token: softmax-routed ones and such with ReLU gates."""
