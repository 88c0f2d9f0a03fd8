"""Tasks, one file each: examples, batches, loss and metrics; and the data files that they read."""
