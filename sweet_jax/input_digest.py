"""Digests of what a run computes from, by which its processes notice that they read other files."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sweet_jax.distributed import all_gather
from sweet_jax.errors import UserError
from sweet_jax.preparation import PreparedRun

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def input_digests(job: PreparedRun, identity: Mapping[str, Any]) -> dict[str, str]:
    """Returns digests of everything that the numbers of a run depend on.

    Weights and tokens are hashed as they are in memory, so that checkpoints that differ only in
    their format are the same.

    Args:
      job: the prepared run.
      identity: config and digest of the data set, as JSON; see `config_values`.

    Returns:
      Hexadecimal digests; each key says, as the predicate of a sentence, what a process does whose
      digest differs.

    """
    name, weights = job.config.checkpoint, job.checkpoint.weights
    tokens = [
        (each.input_ids, each.token_type_ids, each.starts, each.pad_id)
        for each in (job.train, job.validation, job.unlabeled)
        if each is not None
    ]
    checkpoint = (str(job.checkpoint.config), weights.encoder, weights.pooler, dict(weights.exits))
    base = (job.base.folder / "results.json").read_text("utf-8") if job.base else ""
    package = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = [version(name) for name in _PACKAGES]
    return {
        "has a different config or reads different data": _digest(
            json.dumps(identity, sort_keys=True)
        ),
        "runs different versions of sweet_jax or its packages": _digest([package, versions]),
        f"reads different weights from checkpoint {name!r}": _digest(checkpoint),
        f"reads a different tokenizer from checkpoint {name!r}": _digest([tokens, tuple(job.rows)]),
        f"reads a different run from grow_from {job.config.grow_from!r}": _digest(base),
    }


def check_inputs(digests: Mapping[str, str]) -> None:
    """Compares the digests of all processes; all of them must call this.

    Raises UserError in a process whose digests differ from those of the primary process.
    """
    gathered = all_gather(" ".join(digests.values()).encode())
    own, first = gathered[jax.process_index()].split(), gathered[0].split()
    for what, ours, theirs in zip(digests, own, first, strict=True):
        if ours != theirs:
            raise UserError(
                f"this process {what} than the primary process: run the same command with the "
                "same files and packages in all processes"
            )


def _digest(tree: Any) -> str:
    """Returns a hexadecimal digest of a pytree of arrays, numbers and texts."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
