"""Text to records: corpus, segmentation, tokenizer, vocabulary, packing, batches."""
