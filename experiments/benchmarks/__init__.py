"""Benchmarks that print both sides of their ratios in one run."""

import os

# Before any of them imports jax: on a GPU torch takes its turns in the same process, and jax would
# else take three quarters of the memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
