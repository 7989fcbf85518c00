"""Few-shot tasks and questions: instances, scores, metrics, shared prefixes."""
