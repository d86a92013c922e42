"""Counts the bits in which two finished runs differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np

# Keys of results.json, and files, that hold times.
_TIMES = ("timing",)


def differing_bits(ours: Path, theirs: Path) -> tuple[int, list[str]]:
    """Returns how many bits were compared, and the names of the contents that differ with counts.

    Compared are the saved model, the outputs of all exits, the probe, the refit, the search of the
    learning rate, the training log, results.json without times, and the state of the last
    checkpoint: parameters, optimizer, step and the best state so far.
    """
    one, other = contents(ours), contents(theirs)
    total, found = 0, []
    for name in sorted({*one, *other}):
        a, b = one.get(name, b""), other.get(name, b"")
        total += 8 * max(len(a), len(b))
        if a != b:
            found.append(f"{name}: {_count(a, b)}")
    return total, found


def count_bits(found: list[str]) -> int:
    """Returns the sum of the counts that `differing_bits` returned."""
    return sum(int(text.rpartition(": ")[2]) for text in found)


def _count(a: bytes, b: bytes) -> int:
    """Returns the number of differing bits; all of the longer one where the lengths differ."""
    if len(a) != len(b):
        return 8 * max(len(a), len(b))
    return int(np.bitwise_count(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum())


def contents(run: Path) -> dict[str, bytes]:
    """Returns what is compared of a run, by name."""
    found: dict[str, bytes] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if any(
            part.startswith(".") or part == "checkpoints" for part in path.parts[len(run.parts) :]
        ):
            continue
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found |= {f"{name}/{key}": arrays[key].tobytes() for key in arrays}
        elif path.suffix in (".safetensors", ".jsonl") or path.name == "tokenizer.json":
            found[name] = path.read_bytes()
        elif path.suffix == ".json":
            found[name] = _without_times(json.loads(path.read_text()))
    for folder in sorted((run / "checkpoints").glob("*")):
        found |= {f"checkpoints/{folder.name}{key}": v for key, v in _state(folder).items()}
    return found


def _without_times(value: Any) -> bytes:
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k not in _TIMES}
    return json.dumps(value, sort_keys=True).encode()


def _state(folder: Path) -> dict[str, bytes]:
    """Returns the arrays of the newest checkpoint of a training, by their paths, and its step."""
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
    found = {jax.tree_util.keystr(at): np.asarray(x).tobytes() for at, x in leaves}
    return found | {"/step": str(max(steps)).encode()}
