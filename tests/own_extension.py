"""An engine, a tracker and a file format, written as another package would write them.

Importing `own_registration` adds them to the tables; this module only defines them.
"""

import contextlib
import os

from sweet_jax.data.readers import Reader
from sweet_jax.data.tables import Table, find_column, make_record
from sweet_jax.inference.engine_table import EngineEntry


def obstacle(model, precision):
    return os.environ.get("OWN_ENGINE_OBSTACLE")


ENGINE = EngineEntry("numpy_engine", obstacle="own_extension:obstacle")


class Lines:
    """Appends a line for each value, and the names of what is attached."""

    def __init__(self, workdir, training, step):
        self.file = (workdir / "own_tracker.txt").open("a")
        self.training = training

    def add(self, name, value, step):
        self.file.write(f"{self.training} {name} {step}\n")

    def attach(self, workdir):
        self.file.write(f"attached {(workdir / 'results.json').exists()}\n")

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


class NeedsPackage(Lines):
    package, install = "no_such_package", "pip install no-such-package"


class DamagedError(ValueError):
    """Raised for a line without the separator."""


@contextlib.contextmanager
def open_rows(path, columns):
    """A line for each row: the label, which is a number or a boolean, a bar, and the text."""
    names = ("label", "text")

    def records(columns):
        indices = [find_column(name, names) for name in columns.names]
        for row, line in enumerate(path.read_text().splitlines(), start=1):
            label, bar, text = line.partition("|")
            if not bar:
                raise DamagedError(f"line {row} has no bar")
            label = {"true": True, "false": False}[label] if label.isalpha() else float(label)
            values = (label, text)
            yield make_record(tuple(values[i] for i in indices), columns, row, row, row)

    yield Table(names, records)


READER = Reader(open_rows, (DamagedError,), count_rows=lambda path: len(path.open().readlines()))
