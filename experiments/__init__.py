"""One short script for each table, figure and benchmark; no training logic."""
