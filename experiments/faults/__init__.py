"""Fault tests of the real commands on one machine; see `python -m experiments.faults --help`."""
