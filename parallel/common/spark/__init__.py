"""Starting Spark, with a Java that fits."""
