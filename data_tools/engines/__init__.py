"""Where the steps run: this machine's processes, or Spark."""
