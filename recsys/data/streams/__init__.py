"""Training from a stream: events in order of time, delayed labels, batches that resume to the event."""
