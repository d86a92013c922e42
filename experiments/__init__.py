"""One short script for each table, figure and benchmark; no training logic."""

import os

# Before anything imports it: without torch it says so on every start.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
