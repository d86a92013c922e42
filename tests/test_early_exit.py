"""Who trains what: exact zeros of gradients, and exits that do not know of each other."""

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
    """Mean cross-entropy of every exit on the batch, [E]."""
    return SINGLE_LABEL.mean_loss(logits, BATCH["labels"], BATCH["row_mask"])


@functools.cache
def build(exits=EXITS, kind="bert", dropout=True, **options):
    """Structure and random parameters, with no bias at its initial zero."""
    config = TINIES[kind] if dropout else dataclasses.replace(TINIES[kind], **NO_DROPOUT)
    model = EarlyExit(FAMILIES[kind].encoder(config, KEY), exits, 2, KEY, ExitConfig(**options))
    graphdef, values = nnx.split(model)
    params = nnx.to_pure_dict(values)
    # By NumPy, which compiles nothing.
    noise = lambda x: x + 0.1 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(noise(np.asarray(x))), params)


def gradient(params, index, isolation, key, graphdef):
    def loss(params):
        logits = nnx.merge(graphdef, params)(BATCH, isolation, key)
        return mean_loss(logits)[index]

    return jax.grad(loss)(params)


# Compiled once for all exits of a model.
CONSTANT = jax.jit(gradient, static_argnames=("isolation", "graphdef"))
MOVING = jax.jit(gradient, static_argnames=("graphdef",))


def exit_gradient(graphdef, params, index, isolation, key=None):
    """Gradient of one exit's loss alone."""
    moving = any(isinstance(a, jax.Array) for a in jax.tree.leaves(isolation))
    function = MOVING if moving else CONSTANT
    return function(params, jnp.asarray(index), isolation, key, graphdef)


def untrained(path) -> bool:
    """Rows of tables that no token of the batch reads, and the key bias, which softmax cancels."""
    return any(getattr(p, "key", None) == "key" for p in path) and path[-1].key == "bias"


@pytest.mark.parametrize(
    ("kind", "key", "pooling"),
    [
        pytest.param("bert", None, "mean", marks=pytest.mark.slow),
        # The layers of the other families are BERT's.
        ("bert", jax.random.key(5), "first"),
        *(
            pytest.param(k, jax.random.key(5), "first", marks=pytest.mark.slow)
            for k in ("deberta", "deberta-v2", "mpnet")
        ),
        ("modernbert", jax.random.key(5), "first"),
        pytest.param("deberta-v2", jax.random.key(5), "mean", marks=pytest.mark.slow),
    ],
)
def test_sweet_gives_each_exit_its_own_parameters_and_no_other(kind, key, pooling):
    graphdef, params = build(kind=kind, pooling=pooling)
    for index, layer in enumerate(EXITS):
        gradient = exit_gradient(graphdef, params, index, 1.0, key)
        owner_of = jax.tree.leaves(parameter_owners(params, EXITS))
        paths = jax.tree_util.tree_leaves_with_path(gradient)
        for owner, (path, leaf) in zip(owner_of, paths, strict=True):
            if owner == layer:
                assert untrained(path) or np.any(leaf), path
            else:
                assert not np.any(leaf), path


def test_early_exit_reaches_all_below():
    graphdef, params = build(kind="deberta-v2")
    for index, layer in enumerate(EXITS):
        gradient = exit_gradient(graphdef, params, index, 0.0)
        owner_of = jax.tree.leaves(parameter_owners(params, EXITS))
        paths = jax.tree_util.tree_leaves_with_path(gradient)
        for owner, (path, leaf) in zip(owner_of, paths, strict=True):
            mine = owner == layer or (owner < layer and path[0].key == "encoder")
            assert np.any(leaf) == mine or untrained(path), path


def test_every_parameter_has_an_owner():
    _, params = build(shared_pooler=True)
    found = {owner for owner, _ in leaves_by_owner(params, EXITS)}
    assert found == {SHARED, *EXITS}
    with pytest.raises(KeyError, match="no owner"):
        parameter_owners({"stranger": {"kernel": jnp.zeros(2)}}, EXITS)


def test_a_shared_pooler_gets_every_exit_s_gradient():
    graphdef, params = build(shared_pooler=True)
    each = [exit_gradient(graphdef, params, i, 1.0)["pooler"]["kernel"] for i in range(2)]
    assert all(np.any(g) for g in each)
    step = jax.jit(lambda params: segment_gradients(graphdef, params, BATCH, None)[0])
    total = step(params)["pooler"]["kernel"]
    np.testing.assert_allclose(total, each[0] + each[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["deberta-v2", pytest.param("mpnet", marks=pytest.mark.slow)])
def test_a_shared_table_of_relative_positions_gets_every_exit_s_gradient(kind):
    graphdef, params = build(kind=kind, shared_relative=True)
    each = [exit_gradient(graphdef, params, i, 1.0)["encoder"] for i in range(2)]
    owner_of = parameter_owners(params, EXITS, shared_relative=True)["encoder"]
    assert set(jax.tree.leaves(owner_of["relative"])) == {SHARED}
    assert SHARED not in jax.tree.leaves({**owner_of, "relative": None})
    step = jax.jit(lambda params: segment_gradients(graphdef, params, BATCH, None)[0])
    total = step(params)["encoder"]["relative"]
    parts = [jax.tree.leaves(gradient["relative"]) for gradient in each]
    for whole, first, last in zip(jax.tree.leaves(total), *parts, strict=True):
        assert np.any(first)
        assert np.any(last)
        np.testing.assert_allclose(whole, first + last, rtol=1e-5, atol=1e-7)
    assert not np.any(each[1]["embeddings"]["word"]["embedding"])


@pytest.mark.parametrize("kind", marked(ISOLATED))
def test_under_reference_exits_share_the_pooler_and_the_relative_table_only(kind, tmp_path):
    config = Config(exits=EXITS, preset="reference").resolved()
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "tiny", kind)))
    graphdef, values = nnx.split(make_model(config, checkpoint, EXITS, 2, jax.random.key(0)))
    params = nnx.to_pure_dict(values)
    each = [exit_gradient(graphdef, params, i, 1.0) for i in range(2)]
    owner_of = parameter_owners(params, EXITS, shared_relative=config.relative == "shared")
    shared = set()
    for owner, (path, first), last in zip(
        jax.tree.leaves(owner_of),
        jax.tree_util.tree_leaves_with_path(each[0]),
        jax.tree.leaves(each[1]),
        strict=True,
    ):
        trains = (np.any(first), np.any(last))
        if owner == SHARED:
            shared.add(next(p.key for p in path if p.key in ("pooler", "relative")))
            assert trains == (True, True), path
        else:
            assert untrained(path) or trains == (owner == 1, owner == 3), path
    tables = kind in ("deberta", "deberta-v2", "mpnet")
    assert shared == ({"pooler", "relative"} if tables else {"pooler"})


@pytest.mark.slow
def test_isolation_scales_the_table_s_gradient_at_every_boundary():
    exits = (1, 2, 3)
    graphdef, params = build(exits, "deberta")

    def table_gradient(index, isolation):
        return exit_gradient(graphdef, params, index, isolation)["encoder"]["relative"]["embedding"]

    # Through the table alone: what comes through the hidden states is scaled by the same.
    full, part = table_gradient(2, 0.0), table_gradient(2, 0.5)
    own = table_gradient(0, 0.5)
    np.testing.assert_array_equal(own, table_gradient(0, 0.0))
    np.testing.assert_allclose(part, 0.25 * full, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("bert", jax.random.key(5)),
        pytest.param("deberta", None, marks=pytest.mark.slow),
        pytest.param("deberta-v2", jax.random.key(5), marks=pytest.mark.slow),
    ],
)
def test_segment_by_segment_is_the_whole_with_stop_gradient(kind, key):
    """The one computes only the first token of an exit's layer where the other computes all."""
    graphdef, params = build(kind=kind, learning_to_exit="joint")
    parts, whole = (
        jax.jit(lambda params, f=function, a=arguments: f(graphdef, params, BATCH, *a))(params)
        for function, *arguments in (
            (segment_gradients, key),
            (whole_gradients, jnp.asarray(1.0), key),
        )
    )
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_isolation_scales_the_gradient_that_crosses():
    graphdef, params = build()
    read = lambda g: g["encoder"]["layers"][0]["intermediate"]["kernel"]
    full = read(exit_gradient(graphdef, params, 1, jnp.asarray(0.0)))
    for isolation in (0.25, jnp.asarray(0.25), jnp.asarray(1.0)):
        part = read(exit_gradient(graphdef, params, 1, isolation))
        np.testing.assert_allclose(part, (1 - isolation) * full, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("isolation", [0.25, 0.9, jnp.asarray(0.25), jnp.asarray(1.0)])
def test_isolation_leaves_the_hidden_state_as_it_is(isolation):
    h = jax.random.normal(KEY, (3, 5, 7)) * 100
    np.testing.assert_array_equal(isolate(h, isolation), h)


@pytest.fixture(scope="module")
def weighted():
    """(structure, parameters, gradient of the weighted losses of exits 1, 2, 3 by isolation)."""
    graphdef, params = build((1, 2, 3))

    def loss(params, weights, each):
        logits = nnx.merge(graphdef, params)(BATCH, each)
        return (mean_loss(logits) * weights).sum()

    compiled = jax.jit(jax.grad(loss))  # once: the isolations are arguments

    def gradient(weights, *each):
        return compiled(params, jnp.asarray(weights, jnp.float32), tuple(map(jnp.asarray, each)))

    return graphdef, params, gradient


def test_the_gradient_is_affine_in_the_isolation_of_a_boundary(weighted):
    """(1 - a) times what comes through an open boundary and a times what a closed one leaves."""
    *_, gradient = weighted
    opened, closed = (jax.tree.leaves(gradient([1, 1, 1], a, 0.5)) for a in (0.0, 1.0))
    assert sum(np.abs(x - y).max() > 1e-3 for x, y in zip(opened, closed, strict=True)) > 10
    for a in (0.25, 0.75):
        between = jax.tree.leaves(gradient([1, 1, 1], a, 0.5))
        for g, x, y in zip(between, opened, closed, strict=True):
            np.testing.assert_allclose(g, (1 - a) * x + a * y, rtol=1e-4, atol=1e-6)


def test_the_isolations_of_boundaries_multiply_on_the_way_down(weighted):
    *_, gradient = weighted
    read = lambda g: g["encoder"]["layers"][0]["intermediate"]["kernel"]
    full, part = (read(gradient([0, 0, 1], *each)) for each in ((0.0, 0.0), (0.5, 0.2)))
    np.testing.assert_allclose(part, 0.5 * 0.8 * full, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("index", [0, 1])
def test_a_closed_boundary_lets_exactly_nothing_through_whatever_the_other_does(weighted, index):
    graphdef, params, _ = weighted
    exits = (1, 2, 3)
    each = tuple(1.0 if b == index else jnp.asarray(0.5) for b in range(2))

    def loss(params, weights):
        logits = nnx.merge(graphdef, params)(BATCH, each)
        return (mean_loss(logits) * weights).sum()

    gradient = jax.jit(jax.grad(loss))
    for layer, weights in zip(exits, np.eye(3, dtype=np.float32), strict=True):
        grads = gradient(params, weights)
        reached = {e for e, leaf in leaves_by_owner(grads, exits) if np.any(leaf)}
        above = layer > exits[index]  # then the gradient ends at the closed boundary
        assert reached == {e for e in exits if e <= layer and (e > exits[index] or not above)}


def test_an_exit_does_not_depend_on_the_others():
    @functools.partial(jax.jit, static_argnames="graphdef")
    def answer(params, key, graphdef):
        return nnx.merge(graphdef, params)(BATCH, 1.0, key)

    for kind, mask_key in (("bert", None), ("deberta", jax.random.key(9))):
        graphdef, params = build((1, 3), kind)
        other, more = build((1, 2, 3), kind)
        first = answer(params, mask_key, graphdef)
        second = answer(more, mask_key, other)
        np.testing.assert_allclose(first, second[jnp.array([0, 2])], atol=1e-6)


def test_an_exit_answers_in_float32_whatever_the_activations_are():
    """The mean of a regression's targets is in the bias: 2003.25 is 2000 in bfloat16."""
    encoder = FAMILIES["bert"].encoder(TINY, KEY, jnp.bfloat16)
    model = EarlyExit(encoder, (1,), 1, KEY, ExitConfig("mean"), jnp.bfloat16)
    classifier = model.heads["1"].classifier
    classifier.bias[...] = jnp.full(1, 2003.25)
    classifier.kernel[...] = jnp.zeros(TINY.hidden_size)[:, None]
    np.testing.assert_array_equal(model(BATCH), np.full((1, 4, 1), 2003.25, np.float32))
