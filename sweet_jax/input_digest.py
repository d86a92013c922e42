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
from sweet_jax.errors import UserError, short_repr
from sweet_jax.preparation import PreparedRun

_KEY_DIGITS = 12  # of the digest of a config key: those of all keys are exchanged in one message
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def input_digests(job: PreparedRun, identity: Mapping[str, Any]) -> dict[str, str]:
    """Returns digests of everything that the numbers of a run depend on.

    Weights and tokens are hashed as they are in memory, so that checkpoints that differ only in
    their format are the same.

    Args:
      job: the prepared run.
      identity: config and digest of the data set, as JSON; see `config_values`.

    Returns:
      Hexadecimal digests, in the order in which they are compared. Those of the config have the
      names of its keys; the name of any other says, as the predicate of a sentence, what a process
      does whose digest differs.

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
    config = {
        key: _digest(json.dumps(value))[:_KEY_DIGITS]
        for key, value in identity.items()
        if key != "data_sha256"
    }
    return {
        "runs different versions of sweet_jax or its packages": _digest([package, versions]),
        **config,  # before what depends on it
        "reads different data": _digest(identity["data_sha256"]),
        f"reads different weights from checkpoint {name!r}": _digest(checkpoint),
        f"reads a different tokenizer from checkpoint {name!r}": _digest([tokens, tuple(job.rows)]),
        f"reads a different run from grow_from {job.config.grow_from!r}": _digest(base),
    }


def check_inputs(digests: Mapping[str, str], identity: Mapping[str, Any]) -> None:
    """Compares the digests of all processes; all of them must call this.

    Args:
      digests: the result of `input_digests`.
      identity: the identity passed to it.

    Raises UserError in a process that differs from the primary process in the first digest in which
    any process does.

    """
    gathered = [each.split() for each in all_gather(" ".join(digests.values()).encode())]
    different = (
        what
        for place, what in enumerate(digests)
        if any(each[place] != gathered[0][place] for each in gathered)
    )
    what = next(different, None)  # in all processes the same
    if what is None:
        return
    fix = "run the same command with the same files and packages in all processes"
    number, place = jax.process_index(), list(digests).index(what)
    if what in identity:
        values = [each.decode() for each in all_gather(short_repr(identity[what]).encode())]
    if gathered[number][place] == gathered[0][place]:
        return
    if what in identity:
        raise UserError(
            f"this process has {what}={values[number]}, but the primary process has "
            f"{what}={values[0]}: {fix}"
        )
    raise UserError(f"this process {what} than the primary process: {fix}")


def _digest(tree: Any) -> str:
    """Returns a hexadecimal digest of a pytree of arrays, numbers and texts."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
