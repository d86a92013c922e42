"""Feeds mutated files to the readers, which must read them or refuse them in one line.

  python tests/fuzz_inputs.py --count=10000

Each case damages one file at random (bytes changed, cut out, doubled, or odd ones put in) and reads
it as training, prediction or loading a model does. Prints for each kind of file how many were read
and refused, the longest time and the largest memory; the exit status is 1 if any case ended in
another error, in an error of several lines, took more than 20 s, or 2 GB.
"""

import argparse
import collections
import gzip
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pyarrow as pa
import pyarrow.parquet as pq
from tiny import write_checkpoint

from sweet_jax.config import Config
from sweet_jax.data.batches import encode
from sweet_jax.data.load import load_dataset
from sweet_jax.data.records import read_records
from sweet_jax.data.tables import Columns
from sweet_jax.errors import UserError
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pretrained import open_checkpoint

SECONDS, MEBIBYTES = 20, 2048
ROWS = [(f'text {i}, "quoted"\nand more', ("ham", "spam")[i % 2]) for i in range(60)]
ODD = [
    *(b'"', b'""', b",", b";", b"\t", b"\n", b"\r", b"\0", b"{", b"}", b"[", b"]", b":", b"\\"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"sep=;\n", b"null", b"NaN", b"-1", b"1e999"),
    *(b"9" * 400, b"[" * 2000, b'{"a":' * 500, "é\u0301".encode(), b"\x1f\x8b\x08"),
]


class Case(NamedTuple):
    """A kind of file: the bytes of a sound one, its name, and what reads it."""

    name: str
    sound: bytes
    read: Callable[[Path], None]


class TooSlowError(BaseException):
    """Raised in a case that takes too long; no reader takes it for one of its own errors."""


class Outcome(NamedTuple):
    """Holds the result of one case: "read", "refused" or "failed", with a failure's description."""

    result: str
    seconds: float
    why: str = ""


def mutate(sound: bytes, rng: random.Random) -> bytes:
    """Returns the bytes with one to four damages."""
    data = bytearray(sound)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 64, 512))
        match rng.randrange(5):
            case 0:
                data[at : at + size] = rng.randbytes(min(size, len(data) - at))
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at:at] = rng.choice(ODD)
            case _ if rng.random() < 0.2:
                del data[at:]
            case _:
                if data:
                    data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def read_table(path: Path) -> None:
    """Reads a file as prediction does, then as training does."""
    for _ in read_records(path, Columns(("text",))):
        pass
    for skip_invalid in (True, False):
        load_dataset(
            Config(task="own", data_files=str(path), text_columns="text", skip_invalid=skip_invalid)
        )


def read_checkpoint(path: Path) -> None:
    """Reads the checkpoint in whose folder a file lies, and tokenizes with it."""
    checkpoint = open_checkpoint(str(path.parent))
    _ = checkpoint.weights
    encode(load_tokenizer(checkpoint), [("word1 word2",)], 16)


def cases(folder: Path) -> list[Case]:
    """Returns a case of every kind of file; `folder` gets the sound files."""
    rows = [{"text": text, "label": label} for text, label in ROWS]
    quoted = [f'"{text.replace(chr(34), chr(34) * 2)}",{label}' for text, label in ROWS]
    table = "\n".join(["text,label", *quoted, ""]).encode()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    found = [
        Case("rows.csv", table, read_table),
        Case("rows.jsonl", lines.encode(), read_table),
        Case("rows.json", json.dumps(rows, indent=1).encode(), read_table),
        Case(
            "rows.csv.gz",
            gzip.compress("\n".join(["text,label", *quoted, ""]).encode()),
            read_table,
        ),
        Case("rows.parquet", (folder / "rows.parquet").read_bytes(), read_table),
    ]
    checkpoint = write_checkpoint(folder / "checkpoint")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        found.append(Case(name, (checkpoint / name).read_bytes(), read_checkpoint))
    return found


def run_case(case: Case, folder: Path, data: bytes) -> Outcome:
    """Reads mutated bytes in place of a case's file."""
    path = folder / "checkpoint" / case.name if case.read is read_checkpoint else folder / case.name
    path.write_bytes(data)
    began, result, why = time.monotonic(), "read", ""
    signal.alarm(SECONDS)
    try:
        case.read(path)
    except UserError as error:
        result = "refused"
        if "\n" in str(error) or not str(error):
            result, why = "failed", f"not one line: {str(error)!r:.300}"
    except BaseException:
        result, why = "failed", traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
        path.write_bytes(case.sound)
    return Outcome(result, time.monotonic() - began, why)


def largest_memory() -> int:
    """Returns the largest resident memory of this process so far, in MiB.

    From /proc where there is one: ru_maxrss keeps, across exec, what the process that started this
    one had, so that it would measure the tests' worker.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="name of one kind of file")
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    options = parser.parse_args(argv)

    def too_slow(*_) -> None:
        raise TooSlowError(f"more than {SECONDS} s")

    logging.disable()
    signal.signal(signal.SIGALRM, too_slow)
    folder = Path(tempfile.mkdtemp())
    kinds = [c for c in cases(folder) if options.only in (None, c.name)]
    counts: dict[str, collections.Counter[str]] = {c.name: collections.Counter() for c in kinds}
    longest = dict.fromkeys(counts, 0.0)
    sound = True
    for number in range(options.count):
        case = kinds[number % len(kinds)]
        data = mutate(case.sound, random.Random(f"{options.seed} {number}"))
        outcome = run_case(case, folder, data)
        counts[case.name][outcome.result] += 1
        longest[case.name] = max(longest[case.name], outcome.seconds)
        if outcome.result == "failed":
            sound = False
            print(f"case {number}, {case.name}: {outcome.why}", flush=True)
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{number}-{case.name}").write_bytes(data)
    shutil.rmtree(folder)
    peak = largest_memory()
    print("| file | read | refused | failed | longest, s |\n| --- | --- | --- | --- | --- |")
    for name, found in counts.items():
        shown = " | ".join(str(found[result]) for result in ("read", "refused", "failed"))
        print(f"| {name} | {shown} | {longest[name]:.2f} |")
    print(f"largest memory of the process: {peak} MiB")
    return 0 if sound and peak < MEBIBYTES else 1


if __name__ == "__main__":
    sys.exit(main())
