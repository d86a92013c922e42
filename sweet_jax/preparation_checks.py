"""Checks of a config against the checkpoint, the data and the objects that it names."""

import jax
import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens
from sweet_jax.data.load import Dataset
from sweet_jax.errors import UserError, one_line
from sweet_jax.exits.policies import UnlabeledOutputs, exit_confidences, policy_rule
from sweet_jax.models.pretrained import Checkpoint
from sweet_jax.optimizers import LEARNING_RATE_SCHEDULES


def try_schedule(name: str) -> None:
    """Raises UserError for a schedule that cannot be traced, or is not elementwise."""
    schedule = LEARNING_RATE_SCHEDULES[name]
    for shape in ((), (4,)):
        try:
            share = jax.eval_shape(schedule, jax.ShapeDtypeStruct(shape, np.float32))
        except Exception as error:  # a function can raise anything
            raise UserError(
                f"learning_rate_schedule {name!r} failed: {type(error).__name__}: "
                f"{one_line(error)}; use jax.numpy, and no branches on values"
            ) from error
        if getattr(share, "shape", None) != shape:
            raise UserError(
                f"learning_rate_schedule {name!r} must return an array of the shape {shape} of its "
                f"argument; got {share}"
            )


def try_policy(config: Config, dataset: Dataset) -> None:
    """Raises UserError for an exit policy that fails on outputs of the run's shapes."""
    if policy_rule(config.policy).curve:  # which is fitted later, on calibration rows
        return
    shape = (1, len(config.exits), 2, len(dataset.classes))
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    scores = logits[..., 0] if config.learning_to_exit else None
    layers = np.asarray(config.exits)
    exit_confidences(UnlabeledOutputs(logits, layers, scores, dataset.objective), config.policy)


def check_checkpoint(checkpoint: Checkpoint, config: Config) -> None:
    """Raises UserError for a config that the checkpoint's family or sizes do not allow."""
    _check_family(checkpoint, config)
    depth, positions = config.depth or checkpoint.depth, checkpoint.config.positions
    if depth > checkpoint.depth:
        raise UserError(
            f"depth={depth} is more than the {checkpoint.depth} layers of "
            f"{config.checkpoint!r}: remove it to use all of them"
        )
    if config.exits[-1] != depth:
        what = "depth" if config.depth else f"the encoder's last layer, {depth} for"
        where = str(depth) if config.depth else f"{config.checkpoint!r}"
        raise UserError(
            f"exits must end with {what} {where}; got {','.join(map(str, config.exits))}"
        )
    if positions is not None and config.max_length > positions:
        raise UserError(
            f"max_length={config.max_length} is more than the {positions} positions of "
            f"{config.checkpoint!r}: set --config.max_length={positions} or less"
        )


def _check_family(checkpoint: Checkpoint, config: Config) -> None:
    """Raises UserError if all exits train parameters that the config wants to keep apart."""
    obstacle = checkpoint.family.isolation_obstacle
    if obstacle and (any(config.isolation) or config.conflict_every):
        asked = f"method={config.method} with isolation={config.isolation[-1]:g}"
        fix = "set --config.method=early_exit"
        if not any(config.isolation):
            asked, fix = f"conflict_every={config.conflict_every}", "remove it"
        raise UserError(
            f"{asked} needs exits with layers of their own, but {config.checkpoint!r} has "
            f"model_type={checkpoint.model_type}, whose {obstacle}: {fix}"
        )
    shared = [g for g, owner in checkpoint.family.owners.items() if owner == "shared"]
    if shared and (config.segment_parallel or config.grow_from):
        asked = "segment_parallel" if config.segment_parallel else "grow_from"
        raise UserError(
            f"{asked} needs exits that are trained independently, but {config.checkpoint!r} has "
            f"model_type={checkpoint.model_type}, in which all exits train "
            f"{' and '.join(map(repr, shared))}: remove it"
        )


def check_token_types(checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Raises UserError for token types for which the checkpoint has no embedding.

    A checkpoint with one type uses it for every token; one without types ignores them.
    """
    types, largest = checkpoint.config.type_vocab_size, int(tokens.token_type_ids.max(initial=0))
    if 1 < types <= largest:
        raise UserError(
            f"the tokenizer in {str(checkpoint.folder)!r} produces token type {largest}, but the "
            f"checkpoint has type_vocab_size={types}: use the tokenizer it was trained with"
        )
