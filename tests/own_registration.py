"""What the entry point of another package names: importing it adds entries to the tables."""

from own_extension import ENGINE, READER, Lines

from sweet_jax.data.readers import READERS
from sweet_jax.inference.engine_table import ENGINES
from sweet_jax.trackers import TRACKERS

ENGINES["own"] = ENGINE
READERS[".own"] = READER
TRACKERS["lines"] = Lines
