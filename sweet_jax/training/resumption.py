"""The state that a training starts from: the newest checkpoint's, or the initial one."""

from typing import Any

from sweet_jax.training.best_state import BestStateTracker
from sweet_jax.training.checkpoint import CheckpointMismatchError, Checkpoints, abstract_state
from sweet_jax.training.parallel import ExecutionPlan
from sweet_jax.training.sharding import reshard, to_host
from sweet_jax.training.step import State


def restore_state(
    checkpoints: Checkpoints, plan: ExecutionPlan, tracker: BestStateTracker | None, state: State
) -> tuple[int, State]:
    """Returns the step and state to start from: the newest checkpoint's, or the initial ones.

    Also sets the best state of the tracker.
    """
    if tracker is None:
        restored = restore_newest(checkpoints, abstract_state(state, plan.shardings))
        return restored or (0, reshard(state, plan.shardings))
    tree = {"state": state, "best": tracker.best}
    shardings = {"state": plan.shardings, "best": tracker.shardings}
    restored = restore_newest(checkpoints, abstract_state(tree, shardings))
    step, tree = restored or (0, reshard(tree, shardings))
    best = tree["best"]
    tracker.best = best._replace(area=to_host(best.area), step=to_host(best.step))
    return step, tree["state"]


def restore_newest(checkpoints: Checkpoints, like: Any) -> tuple[int, Any] | None:
    """Returns `checkpoints.restore(like)`, also for checkpoints of earlier versions.

    These call the optimizer state "adam", since they had no other optimizer.

    like: a state, or a dict with the state under "state".

    Raises CheckpointMismatchError if the checkpoint has another structure than either.
    """
    try:
        return checkpoints.restore(like)
    except CheckpointMismatchError:
        alone = isinstance(like, State)
        own = like if alone else like["state"]
        older = {"adam" if k == "opt_state" else k: v for k, v in own._asdict().items()}
        restored = checkpoints.restore(older if alone else like | {"state": older})
        assert restored is not None, "there is a checkpoint, which did not match"
        step, tree = restored
        values = tree if alone else tree["state"]
        state = State(**{"opt_state" if k == "adam" else k: v for k, v in values.items()})
        return step, state if alone else tree | {"state": state}
