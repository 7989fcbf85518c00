"""A trained model adapted to pairs of prompt and answer: all of it, or low-rank adapters beside its weights (LoRA)."""
