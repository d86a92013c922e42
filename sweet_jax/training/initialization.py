"""The initial state of a training: models with pretrained, random or grown weights.

Shape letters: R replica.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sweet_jax.config import AUTO, Config
from sweet_jax.errors import UserError
from sweet_jax.methods import METHODS
from sweet_jax.models.attention import check_attention
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.layers import derive_key
from sweet_jax.models.ownership import parameter_owners
from sweet_jax.models.pretrained import Checkpoint
from sweet_jax.optimizers import OPTIMIZERS
from sweet_jax.training.checkpoint import has_checkpoint, read_params
from sweet_jax.training.growth import BaseRun, merge_grown_params
from sweet_jax.training.optimizer import check_optimizer
from sweet_jax.training.probe import read_classifiers, refit_path, with_classifiers
from sweet_jax.training.sharding import add_replica_axis
from sweet_jax.training.step import Params, State


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Names one model that is trained for all replicas, and the layers of its exits."""

    name: str
    exits: tuple[int, ...]


def model_specs(config: Config) -> tuple[ModelSpec, ...]:
    """Returns the models that the config's method trains: one for each exit, or a single one."""
    if METHODS[config.method].model_per_exit:
        return tuple(ModelSpec(f"depth_{e:02d}", (e,)) for e in config.exits)
    return (ModelSpec("exits_" + "_".join(map(str, config.exits)), config.exits),)


def make_model(
    config: Config, checkpoint: Checkpoint, exits: tuple[int, ...], classes: int, key: jax.Array
) -> EarlyExit:
    """Builds a model that ends at its last exit, with random parameters drawn from `key`."""
    encoder = with_training_dropout(config, checkpoint).encoder(key, config.dtype, depth=exits[-1])
    encoder.set_attention(config.attention)
    return EarlyExit(
        encoder,
        exits,
        classes,
        key,
        ExitConfig(
            # "" means that no checkpoint was checked for the pooling it declares.
            pooling="first" if config.pooling in ("", AUTO) else config.pooling,
            shared_pooler=config.pooler == "shared",
            shared_relative=config.relative == "shared",
            learning_to_exit=config.learning_to_exit,
            remat=config.remat,
            owners=tuple(checkpoint.family.owners.items()),
        ),
        config.dtype,
    )


def with_training_dropout(config: Config, checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with the dropout rates that the config trains it with.

    Raises UserError if the attention implementation in the config does not support that dropout.
    """
    if config.attention_dropout == "off":
        values = dataclasses.replace(checkpoint.config, attention_probs_dropout_prob=0.0)
        checkpoint = dataclasses.replace(checkpoint, config=values)
    check_attention(
        config.attention,
        config.checkpoint,
        obstacle=checkpoint.family.fused_attention_obstacle,
        config=checkpoint.config,
        dtype=config.dtype,
        backend=jax.default_backend(),
    )
    return checkpoint


def initial_state(
    config: Config,
    checkpoint: Checkpoint,
    model: ModelSpec,
    classes: int,
    base: BaseRun | None = None,
) -> tuple[nnx.GraphDef, State]:
    """Returns the model's structure and the stacked state [R, ...] on the host.

    Each parameter comes from the run `base` if it has it, otherwise from the pretrained checkpoint
    if it has it, and otherwise it is random, drawn from the replica's seed. Raises UserError if the
    checkpoints of `base` are missing or damaged, or if the optimizer cannot be used.
    """
    encoder = checkpoint.weights.first_layers(model.exits[-1])
    pooler = checkpoint.weights.pooler
    trunks = None if base is None else _base_params(base)  # [R', ...]

    @jax.jit
    def draw(key: jax.Array) -> tuple[nnx.GraphDef, Params]:
        """Draws all parameters except the encoder's, which the compiler then never computes."""
        graphdef, values = nnx.split(make_model(config, checkpoint, model.exits, classes, key))
        params = nnx.to_pure_dict(values)
        return graphdef, {name: part for name, part in params.items() if name != "encoder"}

    def one(seed: int, rate: float) -> tuple[nnx.GraphDef, Params, Params]:
        """Returns a replica's structure, parameters, and those that are trained (None: is not)."""
        graphdef, drawn = draw(derive_key(jax.random.key(seed), "parameters"))
        params = drawn | {"encoder": encoder}
        if pooler is not None:
            for holder in [params, *params["heads"].values()]:
                if "pooler" in holder:
                    holder["pooler"] = pooler
        if checkpoint.weights.final_norm is not None:
            for head in params["heads"].values():
                head["norm"] = checkpoint.weights.final_norm
        trained = params
        if base is not None:
            number = base.replica_of(seed, rate)
            params = merge_grown_params(params, jax.tree.map(lambda x: x[number], trunks))
            owners = checkpoint.family.owners.items()
            owner_of = parameter_owners(params, model.exits, owners=owners)
            trained = jax.tree.map(lambda o, x: None if o in base.exits else x, owner_of, params)
        return graphdef, params, trained

    replicas = config.replicas()
    graphdefs, params, trained = zip(*(one(*replica) for replica in replicas), strict=True)
    seeds, rates = zip(*replicas, strict=True)
    on_host: dict[str, Any] = {
        "params": jax.tree.map(lambda *x: np.stack(x), *params),
        "opt_state": _initial_opt_state(config.optimizer, trained),
        "step": np.zeros(len(replicas), np.int32),
        "learning_rate": np.asarray(rates, np.float32),
        "seed": np.asarray(seeds, np.uint32),
    }
    return graphdefs[0], State(**on_host)


def _initial_opt_state(name: str, trained: Sequence[Params]) -> Any:
    """Returns the optimizer's state [R, ...] before the first step, on the host.

    Args:
      name: name of the optimizer.
      trained: parameters of each replica; None for those that are not trained.

    Raises:
      UserError: if the optimizer cannot be used.

    """
    optimizer = OPTIMIZERS[name]
    if check_optimizer(name, optimizer, trained[0]):
        shapes = jax.eval_shape(optimizer.init, trained[0])
        # np.zeros takes no memory until it is written to.
        return jax.tree.map(lambda x: np.zeros((len(trained), *x.shape), x.dtype), shapes)
    opt_states = [jax.device_get(optimizer.init(params)) for params in trained]
    return jax.tree.map(lambda *x: np.stack(x), *opt_states)


def base_checkpoint_folder(base: BaseRun) -> Path:
    """Returns the folder of a base run's checkpoints. Raises UserError if there are none."""
    (model,) = model_specs(base.config)
    folder = base.folder / "checkpoints" / model.name
    if not has_checkpoint(folder):
        raise UserError(_lost(base))
    return folder


def _base_params(base: BaseRun) -> Params:
    """Reads a base run's trained parameters [R', ...] to the host; all keys are strings."""
    params = read_params(base_checkpoint_folder(base))
    if params is None:
        raise UserError(_lost(base))
    params = add_replica_axis(params, len(base.replicas))
    only_probe = base.config.epochs == 0 and base.config.head_init == "probe"
    # With a probe alone, the checkpoint already holds the heads that were fitted on this encoder.
    if base.config.head_refit and not only_probe:
        (model,) = model_specs(base.config)
        classifiers = read_classifiers(refit_path(base.folder, model.name))
        if classifiers is None:
            raise UserError(_lost(base))
        params = with_classifiers(params, base.exits, classifiers, range(len(base.exits)))
    return params


def _lost(base: BaseRun) -> str:
    return (
        f"grow_from {str(base.folder)!r} has no intact checkpoint: run its command again with the "
        "same workdir"
    )
