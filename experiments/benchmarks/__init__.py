"""Benchmarks that print both sides of their ratios in one run."""
