"""The initial state of a training: the models of a method, pretrained, random or grown.

Shape letters: R replica.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from sweet_jax.config import Config, UserError
from sweet_jax.methods import METHODS
from sweet_jax.models.attention import check_attention
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.layers import derive_key
from sweet_jax.models.ownership import parameter_owners
from sweet_jax.models.pretrained import Checkpoint
from sweet_jax.training.checkpoint import has_checkpoint, read_params
from sweet_jax.training.growth import (
    base_config,
    base_replicas,
    base_run_directory,
    merge_grown_params,
    trained_replicas,
)
from sweet_jax.training.probe import read_classifiers, refit_path, with_classifiers
from sweet_jax.training.step import Params, State, init_state


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One model to be trained for all replicas, with its name and the layers of its exits."""

    name: str
    exits: tuple[int, ...]


def model_specs(config: Config) -> tuple[ModelSpec, ...]:
    """Returns the models that the config's method trains: one for each exit, or one in all."""
    if METHODS[config.method].model_per_exit:
        return tuple(ModelSpec(f"depth_{e:02d}", (e,)) for e in config.exits)
    return (ModelSpec("exits_" + "_".join(map(str, config.exits)), config.exits),)


def make_model(
    config: Config, checkpoint: Checkpoint, exits: tuple[int, ...], classes: int, seed: int
) -> EarlyExit:
    """Builds a model as deep as its last exit with random parameters from `seed`."""
    key = derive_key(jax.random.key(seed), "parameters")
    encoder = with_training_dropout(config, checkpoint).encoder(key, config.dtype, depth=exits[-1])
    encoder.set_attention(config.attention)
    return EarlyExit(
        encoder,
        exits,
        classes,
        key,
        ExitConfig(
            pooling=config.pooling or "first",  # "": no checkpoint was asked what it declares
            shared_pooler=config.pooler == "shared",
            shared_relative=config.relative == "shared",
            learning_to_exit=config.learning_to_exit,
            remat=config.remat,
        ),
        config.dtype,
    )


def with_training_dropout(config: Config, checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with the dropout that a config trains it with.

    Raises UserError where the attention that the config asks for does not go with it.
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
    config: Config, checkpoint: Checkpoint, training: ModelSpec, classes: int
) -> tuple[nnx.GraphDef, State]:
    """Returns the model's structure and the stacked state [R, ...] on the host.

    Parameters are pretrained where the checkpoint has them, else random by seed, and those of the
    run that the config grows from, where it does. Raises UserError where that run will not do.
    """
    encoder = checkpoint.weights.first_layers(training.exits[-1])
    pooler = checkpoint.weights.pooler
    base = base_config(config)
    trunks = [None] * len(config.replicas())
    if base is not None:
        trunks = base_params(config, base)

    def one(seed: int, rate: float, trunk: Params) -> tuple[nnx.GraphDef, State]:
        graphdef, values = nnx.split(make_model(config, checkpoint, training.exits, classes, seed))
        params = nnx.to_pure_dict(values)
        params["encoder"] = encoder
        if pooler is not None:
            for holder in [params, *params["heads"].values()]:
                if "pooler" in holder:
                    holder["pooler"] = pooler
        if checkpoint.weights.final_norm is not None:
            for head in params["heads"].values():
                head["norm"] = checkpoint.weights.final_norm
        trained = None
        if base is not None:
            params = merge_grown_params(params, trunk)
            owner_of = parameter_owners(params, training.exits)
            trained = jax.tree.map(lambda o, x: None if o in base.exits else x, owner_of, params)
        return graphdef, jax.tree.map(np.asarray, init_state(params, rate, seed, trained))

    pairs = zip(config.replicas(), trunks, strict=True)
    stacked = [one(*replica, trunk) for replica, trunk in pairs]
    return stacked[0][0], jax.tree.map(lambda *x: np.stack(x), *(state for _, state in stacked))


def base_checkpoint_folder(config: Config, base: Config) -> Path:
    """Returns the folder of the checkpoints that a config grows from; UserError for none."""
    (training,) = model_specs(base)
    folder = base_run_directory(config) / "checkpoints" / training.name
    if not has_checkpoint(folder):
        raise UserError(_lost(config, folder))
    return folder


def base_params(config: Config, base: Config) -> list[Params]:
    """Reads the trained parameters that each replica grows from, on the host, all keys text.

    Raises UserError where the run that a config grows from has lost its checkpoints.
    """
    folder = base_checkpoint_folder(config, base)
    params = read_params(folder)
    if params is None:
        raise UserError(_lost(config, folder))
    if len(trained_replicas(config)) == 1:  # without the axis R
        params = jax.tree.map(lambda x: x[None], params)
    if base.head_refit:
        (training,) = model_specs(base)
        found = read_classifiers(refit_path(base_run_directory(config), training.name))
        if found is None:
            raise UserError(_lost(config, folder))
        params = with_classifiers(params, base.exits, found, range(len(base.exits)))
    return [jax.tree.map(lambda x, r=r: x[r], params) for r in base_replicas(config)]


def _lost(config: Config, folder: Path) -> str:
    return (
        f"grow_from {config.grow_from!r} has no sound checkpoint in {str(folder)!r}: run its "
        "command again, in its workdir"
    )
