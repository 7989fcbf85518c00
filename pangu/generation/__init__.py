"""Text from a model: prompts, key-value cache, sampling, completion."""
