"""The dry run: collectives, bytes and memory of a rank's compiled graph."""
