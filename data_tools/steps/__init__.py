"""The steps of the pipeline: clean, filter, paragraphs, decontaminate, mix."""
