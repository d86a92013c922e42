"""Tasks, records from files, splits, and batches of tokens."""
