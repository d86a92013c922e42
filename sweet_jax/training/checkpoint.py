"""Checkpoints of the training state, saved with orbax and verified; the last two are kept.

A digest of its files is stored next to each checkpoint. A checkpoint whose digest is missing (the
process died while saving) or does not match (the files were damaged) is skipped in favor of the one
before.
"""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from sweet_jax.distributed import barrier, broadcast_from_primary, is_primary
from sweet_jax.errors import UserError
from sweet_jax.files import read_json, write_json
from sweet_jax.storage_errors import discard_after_storage_failure

log = logging.getLogger(__name__)


class CheckpointMismatchError(UserError):
    """Signals a checkpoint whose state has another structure than that of the training."""


class Checkpoints:
    """Saves and restores the checkpoints of one training in `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = _Manager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=LatestN(2),
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,  # left by a process that was killed while saving
            ),
        )

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of arrays as the checkpoint of `step`, unless there already is one."""
        if step in self._manager.all_steps():
            return
        with discard_after_storage_failure():
            if not self._manager.save(step, args=ocp.args.StandardSave(state)):
                raise RuntimeError(
                    f"step {step} was not saved in {self._folder}: it may have a later checkpoint"
                )
            self._manager.wait_until_finished()
        barrier("saved")
        if is_primary():
            write_json(_digest_path(self._folder, step), _digest(self._folder / str(step)))
            for path in self._folder.glob("*.digest.json"):
                if int(path.name.split(".")[0]) not in self._manager.all_steps():
                    path.unlink()
        barrier("digested")  # no process may end before the checkpoint has its digest

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Returns (step, state) of the newest intact checkpoint, or None if there is none.

        Damaged and incomplete checkpoints are removed with a warning.

        Args:
          like: pytree of jax.ShapeDtypeStruct with shardings.

        Raises:
          CheckpointMismatchError: if the state has another structure.

        """
        step = int(broadcast_from_primary(self._newest_sound() if is_primary() else 0))
        self._manager.reload()
        if step < 0:
            return None
        try:
            return step, self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except ValueError as error:
            if "structure" not in str(error):
                raise
            raise CheckpointMismatchError(
                f"the checkpoint of step {step} in {str(self._folder)!r} has the state of another "
                "optimizer: set the optimizer with which it was trained, or another workdir"
            ) from error

    def _newest_sound(self) -> int:
        """Returns the step of the newest intact checkpoint, or -1; removes damaged ones."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            if _is_sound(self._folder, step):
                return step
            log.warning(
                "the checkpoint of step %d in %s is damaged or incomplete: going back to %s",
                step,
                self._folder,
                "the one before" if step > min(self._manager.all_steps()) else "the start",
            )
            # Renaming works even if a file cannot be removed, such as an open file on NFS.
            aside = self._folder / f".unsound-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            _digest_path(self._folder, step).unlink(missing_ok=True)
            self._manager.reload()
        return -1

    def close(self) -> None:
        """Ends the manager's threads."""
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False: the training loop calls `preemption_requested` itself."""
        return False


def read_params(folder: Path) -> Any | None:
    """Reads the parameters of another run's newest checkpoint, without writing anything.

    Returns:
      A tree of NumPy arrays whose keys are all strings, or None if the newest checkpoint is not
      intact. An older intact checkpoint is not used, since its training was not finished.

    """
    names = {path.name.removesuffix(".digest.json") for path in folder.glob("*")}
    newest = max((int(name) for name in names if name.isdigit()), default=None)
    if newest is None or not _is_sound(folder, newest):
        return None
    path = (folder / str(newest) / "default").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = dict(checkpointer.metadata(path).item_metadata.tree)
        has_best = "best" in tree  # with epochs="auto", there are the best state and the last one
        like = {"params": (dict(tree["best"]) if has_best else tree)["params"]}
        like = {"best": like} if has_best else like
        host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        restore = ocp.args.PyTreeRestore(item=like, restore_args=host, partial_restore=True)
        restored = checkpointer.restore(path, args=restore)
        return (restored["best"] if has_best else restored)["params"]


def has_checkpoint(folder: Path) -> bool:
    """Returns whether a folder appears to hold a checkpoint, without reading it."""
    return any(folder.glob("*.digest.json"))


def abstract_state(state: Any, shardings: Any) -> Any:
    """Returns the shapes, dtypes and shardings of `state`, as `Checkpoints.restore` takes them.

    Args:
      state: pytree of arrays.
      shardings: one sharding for all arrays, or a tree of shardings with the structure of `state`.

    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def _digest_path(folder: Path, step: int) -> Path:
    return folder / f"{step}.digest.json"


def _is_sound(folder: Path, step: int) -> bool:
    try:
        expected = read_json(_digest_path(folder, step))
    except (OSError, ValueError):
        return False
    return expected == _digest(folder / str(step))


def _digest(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                name = str(path.relative_to(folder))
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
