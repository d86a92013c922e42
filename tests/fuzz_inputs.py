"""Feeds mutated files to the readers, which must read each or refuse it in one line.

  python tests/fuzz_inputs.py --count=10000

Each case mutates one file at random (changes, removes, repeats or inserts bytes) and reads it as
training, prediction or loading a model does. Prints for each kind of file how many were read and
refused and the longest time, and the largest memory. The exit status is 1 if a case ends in another
error or in one of several lines, or takes more than 20 s, or if memory exceeds 2 GiB.
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
    """A kind of file: its name, the bytes of a valid one, and the function that reads it."""

    name: str
    sound: bytes
    read: Callable[[Path], None]


class TooSlowError(BaseException):
    """Raised in a case that takes too long; a BaseException, so that no reader catches it."""


class Outcome(NamedTuple):
    """Holds the result of one case: "read", "refused" or "failed", with a failure's description."""

    result: str
    seconds: float
    why: str = ""


def mutate(original: bytes, rng: random.Random) -> bytes:
    """Returns the bytes after one to four random mutations."""
    data = bytearray(original)
    for _ in range(rng.randint(1, 4)):
        start, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 64, 512))
        match rng.randrange(5):
            case 0:
                data[start : start + size] = rng.randbytes(min(size, len(data) - start))
            case 1:
                del data[start : start + size]
            case 2:
                data[start:start] = data[start : start + size]
            case 3:
                data[start:start] = rng.choice(ODD)
            case _ if rng.random() < 0.2:
                del data[start:]
            case _:
                if data:
                    data[start % len(data)] ^= 1 << rng.randrange(8)
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
    """Reads the checkpoint in the folder of a file, and tokenizes with it."""
    checkpoint = open_checkpoint(str(path.parent))
    _ = checkpoint.weights
    encode(load_tokenizer(checkpoint), [("word1 word2",)], 16)


def cases(folder: Path) -> list[Case]:
    """Returns a case of every kind of file; writes valid files in the folder."""
    rows = [{"text": text, "label": label} for text, label in ROWS]
    quoted = [f'"{text.replace(chr(34), chr(34) * 2)}",{label}' for text, label in ROWS]
    table = "\n".join(["text,label", *quoted, ""]).encode()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    all_cases = [
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
        all_cases.append(Case(name, (checkpoint / name).read_bytes(), read_checkpoint))
    return all_cases


def run_case(case: Case, folder: Path, data: bytes) -> Outcome:
    """Reads mutated bytes in place of a case's file."""
    path = folder / "checkpoint" / case.name if case.read is read_checkpoint else folder / case.name
    path.write_bytes(data)
    began, result, failure = time.monotonic(), "read", ""
    signal.alarm(SECONDS)
    try:
        case.read(path)
    except UserError as error:
        result = "refused"
        if "\n" in str(error) or not str(error):
            result, failure = "failed", f"not one line: {str(error)!r:.300}"
    except BaseException:
        result, failure = "failed", traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
        path.write_bytes(case.sound)
    return Outcome(result, time.monotonic() - began, failure)


def largest_memory() -> int:
    """Returns the largest resident memory of this process so far, in MiB.

    Reads /proc if it exists, because ru_maxrss keeps the peak of the parent process across exec,
    here that of a pytest worker.
    """
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) // 1024
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
    selected = [c for c in cases(folder) if options.only in (None, c.name)]
    counts: dict[str, collections.Counter[str]] = {c.name: collections.Counter() for c in selected}
    longest = dict.fromkeys(counts, 0.0)
    all_passed = True
    for number in range(options.count):
        case = selected[number % len(selected)]
        data = mutate(case.sound, random.Random(f"{options.seed} {number}"))
        outcome = run_case(case, folder, data)
        counts[case.name][outcome.result] += 1
        longest[case.name] = max(longest[case.name], outcome.seconds)
        if outcome.result == "failed":
            all_passed = False
            print(f"case {number}, {case.name}: {outcome.why}", flush=True)
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{number}-{case.name}").write_bytes(data)
    shutil.rmtree(folder)
    peak = largest_memory()
    print("| file | read | refused | failed | longest, s |\n| --- | --- | --- | --- | --- |")
    for name, results in counts.items():
        columns = " | ".join(str(results[result]) for result in ("read", "refused", "failed"))
        print(f"| {name} | {columns} | {longest[name]:.2f} |")
    print(f"largest memory of the process: {peak} MiB")
    return 0 if all_passed and peak < MEBIBYTES else 1


if __name__ == "__main__":
    sys.exit(main())
