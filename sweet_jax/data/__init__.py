"""What a task is, where its rows come from, and batches of tokens."""
