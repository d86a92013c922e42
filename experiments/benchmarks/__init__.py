"""Benchmarks; each measures both sides of its comparison in one run and prints a table."""

import os

# Set before a benchmark imports jax. Otherwise jax would reserve three quarters of a GPU's memory,
# which torch needs too if it runs in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
