"""Tasks, records of files, splits, and batches of tokens."""
