"""Which loss trains which parameters, with exact zeros, and the independence of the exits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ISOLATED, TINIES, TINY, marked, write_checkpoint

from sweet_jax.config import Config
from sweet_jax.models.early_exit import EarlyExit, isolate
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.ownership import SHARED, leaves_by_owner, parameter_owners
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.objectives.single_label import SINGLE_LABEL
from sweet_jax.training.gradients import segment_gradients, whole_gradients
from sweet_jax.training.initialization import make_model

EXITS = (1, 3)
KEY = jax.random.key(1)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BATCH = {
    "input_ids": jax.random.randint(jax.random.key(2), (4, 7), 0, TINY.vocab_size),
    "token_type_ids": jnp.tile(jnp.array([0, 0, 0, 0, 1, 1, 1]), (4, 1)),
    "mask": jnp.arange(7)[None] < jnp.array([7, 5, 2, 6])[:, None],
    "labels": jnp.array([0, 1, 1, 0]),
    "row_mask": jnp.ones(4, bool),
}


def mean_loss(logits):
    """Returns the mean cross-entropy of every exit on the batch, [E]."""
    return SINGLE_LABEL.mean_loss(logits, BATCH["labels"], BATCH["row_mask"])


@functools.cache
def build(exits=EXITS, kind="bert", dropout=True, **options):
    """Returns (structure, random parameters), with no bias at its initial zero."""
    config = TINIES[kind] if dropout else dataclasses.replace(TINIES[kind], **NO_DROPOUT)
    model = EarlyExit(FAMILIES[kind].encoder(config, KEY), exits, 2, KEY, ExitConfig(**options))
    graphdef, values = nnx.split(model)
    params = nnx.to_pure_dict(values)
    # NumPy compiles nothing.
    noise = lambda x: x + 0.1 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(noise(np.asarray(x))), params)


def gradient(params, index, isolation, key, graphdef):
    def loss(params):
        logits = nnx.merge(graphdef, params)(BATCH, isolation, key)
        return mean_loss(logits)[index]

    return jax.grad(loss)(params)


# Compiled once for all exits of a model.
GRADIENT_OF_CONSTANT = jax.jit(gradient, static_argnames=("isolation", "graphdef"))
GRADIENT_OF_TRACED = jax.jit(gradient, static_argnames=("graphdef",))


def exit_gradient(graphdef, params, index, isolation, key=None):
    """Returns the gradient of one exit's loss."""
    traced = any(isinstance(a, jax.Array) for a in jax.tree.leaves(isolation))
    function = GRADIENT_OF_TRACED if traced else GRADIENT_OF_CONSTANT
    return function(params, jnp.asarray(index), isolation, key, graphdef)


def leaves_with_owners(params, gradient) -> list[tuple]:
    """Returns (owner, path, leaf) of every leaf of a gradient."""
    owners = jax.tree.leaves(parameter_owners(params, EXITS))
    paths = jax.tree_util.tree_leaves_with_path(gradient)
    return [(owner, *leaf) for owner, leaf in zip(owners, paths, strict=True)]


def untrained(path) -> bool:
    """Returns whether a leaf is a key bias, whose gradient is zero because softmax cancels it."""
    return any(getattr(p, "key", None) == "key" for p in path) and path[-1].key == "bias"


@pytest.mark.parametrize(
    ("kind", "key", "pooling"),
    [
        pytest.param("bert", None, "mean", marks=pytest.mark.slow),
        # The families that are missing here have BERT's layers.
        ("bert", jax.random.key(5), "first"),
        *(
            pytest.param(k, jax.random.key(5), "first", marks=pytest.mark.slow)
            for k in ("deberta", "deberta-v2", "mpnet")
        ),
        ("modernbert", jax.random.key(5), "first"),
        pytest.param("deberta-v2", jax.random.key(5), "mean", marks=pytest.mark.nightly),
    ],
)
def test_exit_loss_trains_only_own_parameters_under_full_isolation(kind, key, pooling):
    graphdef, params = build(kind=kind, pooling=pooling)
    for index, layer in enumerate(EXITS):
        gradient = exit_gradient(graphdef, params, index, 1.0, key)
        for owner, path, leaf in leaves_with_owners(params, gradient):
            if owner == layer:
                assert untrained(path) or np.any(leaf), path
            else:
                assert not np.any(leaf), path


def test_exit_loss_trains_all_layers_below_without_isolation():
    graphdef, params = build(kind="deberta-v2")
    for index, layer in enumerate(EXITS):
        gradient = exit_gradient(graphdef, params, index, 0.0)
        for owner, path, leaf in leaves_with_owners(params, gradient):
            trained = owner == layer or (owner < layer and path[0].key == "encoder")
            assert np.any(leaf) == trained or untrained(path), path


def test_parameter_owners_cover_all_parameters_and_refuse_unknown_ones():
    _, params = build(shared_pooler=True)
    owners = {owner for owner, _ in leaves_by_owner(params, EXITS)}
    assert owners == {SHARED, *EXITS}
    with pytest.raises(KeyError, match="no owner"):
        parameter_owners({"stranger": {"kernel": jnp.zeros(2)}}, EXITS)


def test_shared_pooler_gradient_is_sum_over_exits():
    graphdef, params = build(shared_pooler=True)
    gradients = [exit_gradient(graphdef, params, i, 1.0)["pooler"]["kernel"] for i in range(2)]
    assert all(np.any(g) for g in gradients)
    step = jax.jit(lambda params: segment_gradients(graphdef, params, BATCH, None)[0])
    total = step(params)["pooler"]["kernel"]
    np.testing.assert_allclose(total, gradients[0] + gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["deberta-v2", pytest.param("mpnet", marks=pytest.mark.slow)])
def test_shared_relative_table_gradient_is_sum_over_exits(kind):
    graphdef, params = build(kind=kind, shared_relative=True)
    gradients = [exit_gradient(graphdef, params, i, 1.0)["encoder"] for i in range(2)]
    owner_of = parameter_owners(params, EXITS, shared_relative=True)["encoder"]
    assert set(jax.tree.leaves(owner_of["relative"])) == {SHARED}
    assert SHARED not in jax.tree.leaves({**owner_of, "relative": None})
    step = jax.jit(lambda params: segment_gradients(graphdef, params, BATCH, None)[0])
    total = step(params)["encoder"]["relative"]
    parts = [jax.tree.leaves(gradient["relative"]) for gradient in gradients]
    for both, first, last in zip(jax.tree.leaves(total), *parts, strict=True):
        assert np.any(first)
        assert np.any(last)
        np.testing.assert_allclose(both, first + last, rtol=1e-5, atol=1e-7)
    assert not np.any(gradients[1]["embeddings"]["word"]["embedding"])


@pytest.mark.parametrize("kind", marked(ISOLATED))
def test_reference_preset_shares_only_pooler_and_relative_table(kind, tmp_path):
    config = Config(exits=EXITS, preset="reference").resolved()
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "tiny", kind)))
    graphdef, values = nnx.split(make_model(config, checkpoint, EXITS, 2, jax.random.key(0)))
    params = nnx.to_pure_dict(values)
    gradients = [exit_gradient(graphdef, params, i, 1.0) for i in range(2)]
    owner_of = parameter_owners(params, EXITS, shared_relative=config.relative == "shared")
    shared = set()
    for owner, (path, first), last in zip(
        jax.tree.leaves(owner_of),
        jax.tree_util.tree_leaves_with_path(gradients[0]),
        jax.tree.leaves(gradients[1]),
        strict=True,
    ):
        trains = (np.any(first), np.any(last))
        if owner == SHARED:
            shared.add(next(p.key for p in path if p.key in ("pooler", "relative")))
            assert trains == (True, True), path
        else:
            assert untrained(path) or trains == (owner == 1, owner == 3), path
    has_table = kind in ("deberta", "deberta-v2", "mpnet")
    assert shared == ({"pooler", "relative"} if has_table else {"pooler"})


@pytest.mark.slow
def test_isolation_scales_relative_table_gradient_at_every_boundary():
    exits = (1, 2, 3)
    graphdef, params = build(exits, "deberta")

    def table_gradient(index, isolation):
        return exit_gradient(graphdef, params, index, isolation)["encoder"]["relative"]["embedding"]

    # Directly and through the hidden states, every path to the table crosses two boundaries.
    full, part = table_gradient(2, 0.0), table_gradient(2, 0.5)
    own = table_gradient(0, 0.5)
    np.testing.assert_array_equal(own, table_gradient(0, 0.0))
    np.testing.assert_allclose(part, 0.25 * full, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("bert", jax.random.key(5)),
        pytest.param("deberta", None, marks=pytest.mark.slow),
        pytest.param("deberta-v2", jax.random.key(5), marks=pytest.mark.nightly),
    ],
)
def test_segment_gradients_equal_whole_gradients_under_full_isolation(kind, key):
    """Segment gradients compute an exit's layer at the first token alone."""
    graphdef, params = build(kind=kind, learning_to_exit="joint")
    by_segment, whole = (
        jax.jit(lambda params, f=function, a=arguments: f(graphdef, params, BATCH, *a))(params)
        for function, *arguments in (
            (segment_gradients, key),
            (whole_gradients, jnp.asarray(1.0), key),
        )
    )
    for actual, expected in zip(jax.tree.leaves(by_segment), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_isolation_scales_gradient_that_crosses_boundary():
    graphdef, params = build()
    read = lambda g: g["encoder"]["layers"][0]["intermediate"]["kernel"]
    full = read(exit_gradient(graphdef, params, 1, jnp.asarray(0.0)))
    for isolation in (0.25, jnp.asarray(0.25), jnp.asarray(1.0)):
        part = read(exit_gradient(graphdef, params, 1, isolation))
        np.testing.assert_allclose(part, (1 - isolation) * full, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("isolation", [0.25, 0.9, jnp.asarray(0.25), jnp.asarray(1.0)])
def test_isolate_does_not_change_hidden_states(isolation):
    h = jax.random.normal(KEY, (3, 5, 7)) * 100
    np.testing.assert_array_equal(isolate(h, isolation), h)


@pytest.fixture(scope="module")
def weighted_gradient():
    """Returns (structure, parameters, function of loss weights and isolations to the gradient)."""
    graphdef, params = build((1, 2, 3))

    def loss(params, weights, isolations):
        logits = nnx.merge(graphdef, params)(BATCH, isolations)
        return (mean_loss(logits) * weights).sum()

    compiled = jax.jit(jax.grad(loss))  # once: the isolations are arguments

    def gradient(weights, *isolations):
        weights = jnp.asarray(weights, jnp.float32)
        return compiled(params, weights, tuple(map(jnp.asarray, isolations)))

    return graphdef, params, gradient


def test_gradient_is_affine_in_isolation_of_one_boundary(weighted_gradient):
    *_, gradient = weighted_gradient
    opened, closed = (jax.tree.leaves(gradient([1, 1, 1], a, 0.5)) for a in (0.0, 1.0))
    assert sum(np.abs(x - y).max() > 1e-3 for x, y in zip(opened, closed, strict=True)) > 10
    for a in (0.25, 0.75):
        between = jax.tree.leaves(gradient([1, 1, 1], a, 0.5))
        for g, x, y in zip(between, opened, closed, strict=True):
            np.testing.assert_allclose(g, (1 - a) * x + a * y, rtol=1e-4, atol=1e-6)


def test_isolations_of_successive_boundaries_multiply(weighted_gradient):
    *_, gradient = weighted_gradient
    read = lambda g: g["encoder"]["layers"][0]["intermediate"]["kernel"]
    full, part = (read(gradient([0, 0, 1], *isolations)) for isolations in ((0.0, 0.0), (0.5, 0.2)))
    np.testing.assert_allclose(part, 0.5 * 0.8 * full, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("index", [0, 1])
def test_closed_boundary_blocks_gradient_exactly_when_other_is_half_open(weighted_gradient, index):
    graphdef, params, _ = weighted_gradient
    exits = (1, 2, 3)
    isolations = tuple(1.0 if b == index else jnp.asarray(0.5) for b in range(2))

    def loss(params, weights):
        logits = nnx.merge(graphdef, params)(BATCH, isolations)
        return (mean_loss(logits) * weights).sum()

    gradient = jax.jit(jax.grad(loss))
    for layer, weights in zip(exits, np.eye(3, dtype=np.float32), strict=True):
        grads = gradient(params, weights)
        reached = {e for e, leaf in leaves_by_owner(grads, exits) if np.any(leaf)}
        above = layer > exits[index]  # then the gradient ends at the closed boundary
        assert reached == {e for e in exits if e <= layer and (e > exits[index] or not above)}


def test_exit_logits_do_not_depend_on_presence_of_other_exits():
    @functools.partial(jax.jit, static_argnames="graphdef")
    def logits(params, key, graphdef):
        return nnx.merge(graphdef, params)(BATCH, 1.0, key)

    for kind, mask_key in (("bert", None), ("deberta", jax.random.key(9))):
        graphdef, params = build((1, 3), kind)
        larger_graphdef, larger_params = build((1, 2, 3), kind)
        two_exits = logits(params, mask_key, graphdef)
        three_exits = logits(larger_params, mask_key, larger_graphdef)
        np.testing.assert_allclose(two_exits, three_exits[jnp.array([0, 2])], atol=1e-6)


def test_logits_are_float32_when_activations_are_bfloat16():
    """The bias has the mean of a regression's targets; bfloat16 would round 2003.25 to 2000."""
    encoder = FAMILIES["bert"].encoder(TINY, KEY, jnp.bfloat16)
    model = EarlyExit(encoder, (1,), 1, KEY, ExitConfig("mean"), jnp.bfloat16)
    classifier = model.heads["1"].classifier
    classifier.bias[...] = jnp.full(1, 2003.25)
    classifier.kernel[...] = jnp.zeros(TINY.hidden_size)[:, None]
    np.testing.assert_array_equal(model(BATCH), np.full((1, 4, 1), 2003.25, np.float32))
