"""Counts the bits in which two finished runs differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np

_TIMES = ("timing",)  # keys of results.json that hold times


def differing_bits(one: Path, other: Path) -> tuple[int, list[str]]:
    """Returns the number of bits compared, and what differs: names with numbers of bits.

    Compared are the saved model, the outputs of all exits, the probe, the refit, the search of the
    learning rate, the training log, results.json without times, and the state of the last
    checkpoint: parameters, optimizer, step, and the best state so far.
    """
    ours, theirs = read_contents(one), read_contents(other)
    total, differences = 0, []
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name, b""), theirs.get(name, b"")
        total += 8 * max(len(a), len(b))
        if a != b:
            differences.append(f"{name}: {_count(a, b)}")
    return total, differences


def count_bits(differences: list[str]) -> int:
    """Returns the sum of the numbers of bits in a list from `differing_bits`."""
    return sum(int(text.rpartition(": ")[2]) for text in differences)


def _count(a: bytes, b: bytes) -> int:
    """Returns the number of differing bits; of different lengths, all bits of the longer."""
    if len(a) != len(b):
        return 8 * max(len(a), len(b))
    return int(np.bitwise_count(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum())


def read_contents(run: Path) -> dict[str, bytes]:
    """Returns the contents of a run that are compared, by name."""
    contents: dict[str, bytes] = {}
    for path in sorted(run.rglob("*")):
        inside = path.relative_to(run)
        if any(part.startswith(".") or part == "checkpoints" for part in inside.parts):
            continue
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                contents |= {f"{inside}/{key}": arrays[key].tobytes() for key in arrays}
        elif path.suffix in (".safetensors", ".jsonl") or path.name == "tokenizer.json":
            contents[str(inside)] = path.read_bytes()
        elif path.suffix == ".json":
            contents[str(inside)] = _without_times(json.loads(path.read_text()))
    for folder in sorted((run / "checkpoints").glob("*")):
        state = _read_last_checkpoint(folder)
        contents |= {f"checkpoints/{folder.name}{key}": value for key, value in state.items()}
    return contents


def _without_times(value: Any) -> bytes:
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k not in _TIMES}
    return json.dumps(value, sort_keys=True).encode()


def _read_last_checkpoint(folder: Path) -> dict[str, bytes]:
    """Returns the arrays of a training's last checkpoint by their paths, and its step."""
    import jax
    import orbax.checkpoint as ocp

    steps = [int(p.name.split(".")[0]) for p in folder.glob("*.digest.json")]
    if not steps:
        return {}
    path = (folder / str(max(steps)) / "default").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = dict(checkpointer.metadata(path).item_metadata.tree)
        host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restore = ocp.args.PyTreeRestore(item=tree, restore_args=host)
        state = checkpointer.restore(path, args=restore)
    leaves = jax.tree.leaves_with_path(state)
    arrays = {jax.tree_util.keystr(at): np.asarray(x).tobytes() for at, x in leaves}
    return arrays | {"/step": str(max(steps)).encode()}
