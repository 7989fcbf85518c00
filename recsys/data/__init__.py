"""Click logs to features: readers, vocabularies, encoding, batches."""
