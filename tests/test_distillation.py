"""Self-distillation, on rows with labels and without, and the last exit trained first."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_early_exit import BATCH, EXITS, build, untrained
from test_step import settings

from sweet_jax.config import from_mapping
from sweet_jax.data.padding import pad_rows
from sweet_jax.errors import UserError
from sweet_jax.models.ownership import leaves_by_owner
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.preparation import prepare
from sweet_jax.training.gradients import segment_gradients, whole_gradients
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.input_pipeline import training_batches
from sweet_jax.training.losses import Distillation, TrainingLoss, distillation_loss
from sweet_jax.training.step import init_state, train_step

LABELED = jnp.array([True, False, True, False])


def divergence(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of softmax over the last axis, in float64."""
    p, q = (np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True) for z in (wanted, found))
    return (p * np.log(p / q)).sum(axis=-1)


def two(logits: np.ndarray) -> np.ndarray:
    return np.stack([np.zeros_like(logits), logits], axis=-1)


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        ("single_label", lambda t, z: 4 * divergence(t / 2, z / 2)),
        ("multi_label", lambda t, z: 4 * divergence(two(t / 2), two(z / 2)).mean(axis=-1)),
        ("regression", lambda t, z: (z[..., 0] - t[..., 0]) ** 2),
    ],
)
def test_the_loss_is_the_divergence_of_softened_answers(objective, rows):
    """At a temperature of 2, which numbers have no use for; a row of padding does not count."""
    logits = jax.random.normal(jax.random.key(0), (3, 4, 3)) * 2
    teacher, mask = jax.random.normal(jax.random.key(1), (4, 3)) * 2, jnp.arange(4) < 3
    loss = TrainingLoss(OBJECTIVES[objective], (), Distillation(1.0, 2.0))
    found = jax.jit(functools.partial(distillation_loss, loss))(logits, teacher, mask)
    wanted = rows(np.asarray(teacher, np.float64), np.asarray(logits, np.float64))[:, :3]
    np.testing.assert_allclose(found, wanted.mean(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(distillation_loss(loss, teacher, teacher, mask), 0, atol=1e-6)


def picked(params) -> dict:
    """The heads and a layer of each segment: a gradient of less compiles in less time."""
    layers = params["encoder"]["layers"]
    return {"heads": params["heads"], "layers": {n: layers[n]["output"] for n in (0, 2)}}


def put(params, part):
    layers = dict(params["encoder"]["layers"])
    for number, output in part["layers"].items():
        layers[number] = layers[number] | {"output": output}
    return params | {"heads": part["heads"], "encoder": params["encoder"] | {"layers": layers}}


@pytest.mark.slow
def test_the_gradient_is_that_of_labels_and_of_the_last_exit_s_answer():
    """Rows without labels have a part in the second only; weights of exits multiply both."""
    graphdef, params = build()
    # Segment by segment the answer is computed beforehand: under the same masks.
    key = jax.random.key(5)
    batch = BATCH | {"labeled": LABELED, "labels": jnp.where(LABELED, BATCH["labels"], 1)}

    def reference(part):
        first, last = nnx.merge(graphdef, put(params, part))(batch, 1.0, key)
        answer = jax.lax.stop_gradient(jax.nn.softmax(last / 3))
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(z[::2], batch["labels"][::2]).mean()
            for z in (first, last)
        ]
        soft = 9 * optax.softmax_cross_entropy(first / 3, answer).mean()
        return 0.25 * (losses[0] + 0.5 * soft) + losses[1]

    def ours(params):
        loss = TrainingLoss(weights=(0.25, 1.0), distillation=Distillation(0.5, 3.0))
        grads, metrics, _ = segment_gradients(graphdef, params, batch, key, loss)
        return picked(grads), metrics

    found, metrics = jax.jit(ours)(params)
    wanted = jax.jit(jax.grad(reference))(picked(params))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert float(metrics.distillation[0]) > 0
    assert float(metrics.distillation[1]) == 0


@pytest.mark.parametrize("by_segment", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_but_the_student_learns_from_rows_without_labels(by_segment):
    """The last exit's own parameters get exact zeros, whether boundaries are open or closed."""
    graphdef, params = build()
    batch = BATCH | {"labeled": jnp.zeros(4, bool)}
    loss = TrainingLoss(distillation=Distillation(1.0, 2.0))

    def ours(params):
        if by_segment:
            return segment_gradients(graphdef, params, batch, None, loss)[0]
        return whole_gradients(graphdef, params, batch, 0.0, None, loss)[0]

    paths = jax.tree_util.tree_leaves_with_path(jax.jit(ours)(params))
    owners = [owner for owner, _ in leaves_by_owner(params, EXITS)]
    for owner, (path, leaf) in zip(owners, paths, strict=True):
        assert np.any(leaf) == (owner == 1) or (owner == 1 and untrained(path)), path


def test_the_last_exit_alone_is_trained_first_with_open_boundaries():
    chosen = settings(None, exits=(1, 2, 3), isolation=(1.0,), last_exit_first=0.4, total_steps=10)
    for step, alone in ((0, True), (3, True), (4, False), (9, False)):
        now = jnp.asarray(step)
        assert [float(a) for a in chosen.isolation_at(now)] == [0.0 if alone else 1.0] * 2
        first = 0.0 if alone else 1.0
        assert [float(w) for w in chosen.loss_at(now).weights] == [first, first, 1.0]
    open_ = dataclasses.replace(chosen, isolation=(0.0,), loss_weights=((2.0, 2.0),) * 3)
    assert open_.isolation_at(jnp.asarray(0)) == (0.0, 0.0)
    assert [float(w) for w in open_.loss_at(jnp.asarray(9)).weights] == [2.0] * 3


@pytest.mark.slow
def test_steps_before_and_after_the_last_exit_s_share():
    """Before it the other exits' heads rest, and the last one's loss trains the first segment."""
    graphdef, params = build()
    chosen = settings(graphdef, isolation=(1.0,), last_exit_first=0.5)

    @jax.jit
    def moments(number):
        state = init_state(params, 1e-2, 0)._replace(step=number)
        return picked(train_step(chosen, state, BATCH)[0].opt_state.mu)

    before, after = (moments(jnp.asarray(number)) for number in (4, 5))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(before["heads"]["1"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves((before["heads"]["3"], before["layers"])))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(after))


@pytest.fixture
def distilled(options, tmp_path) -> dict:
    """Config values with rows without labels: 4 of the data, 3 new ones of which two are alike."""
    known = Path(options["data_files"]).read_text().splitlines()[1:5]
    new = ['"word7 word8"', '"word7 word8"', "word9"]
    texts = ["text,other", *(f"{line.rsplit(',', 1)[0]},x" for line in known)]
    (tmp_path / "new.csv").write_text("\n".join([*texts, *(f"{text},x" for text in new), ""]))
    return options | {
        "unlabeled_files": str(tmp_path / "new.csv"),
        "distillation_weight": 1.0,
        "train_size": 1000,
        "seeds": (0, 1),
    }


def test_rows_without_labels_are_new_texts_and_half_of_every_batch(distilled, one_device):
    job = prepare(from_mapping(distilled))
    assert len(job.unlabeled) == 2
    training = job.training_job(model_specs(job.config)[0], Path("unused"))
    batches = training_batches(training, SimpleNamespace(place=lambda *given: given))
    (tokens, rows, lengths), _ = batches(1)
    assert rows.shape == (2, 16)
    known = len(job.train)
    assert all(set(row[:8]) <= set(own) for row, own in zip(rows, job.rows.training, strict=True))
    assert all(sorted(row[8:]) == [-1] * 6 + [known, known + 1] for row in rows.tolist())
    batch = pad_rows(tokens, rows, lengths)
    np.testing.assert_array_equal(batch["labeled"], (rows >= 0) & (rows < known))
    np.testing.assert_array_equal(batch["row_mask"], rows >= 0)
    place, length = rows[0, 8], tokens.lengths[rows[0, 8]]
    start = job.unlabeled.starts[place - known]
    np.testing.assert_array_equal(
        batch["input_ids"][0, 8, :length], job.unlabeled.input_ids[start : start + length]
    )
    plain = from_mapping({k: v for k, v in distilled.items() if k != "unlabeled_files"})
    assert prepare(plain).digest != job.digest
    assert "labeled" not in pad_rows(job.train, rows[:, :8], lengths)


def test_rows_without_labels_that_are_all_known_are_refused(distilled):
    config = from_mapping(distilled | {"unlabeled_files": distilled["data_files"]})
    with pytest.raises(UserError, match="has no text that is not among the training or validation"):
        prepare(config)
