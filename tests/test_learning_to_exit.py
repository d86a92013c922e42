"""Learning-to-exit: its loss, the reach of its gradient, and runs whose policy it is."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from scipy.special import expit
from test_early_exit import BATCH, EXITS, KEY, build, untrained
from test_step import settings
from tiny import TINY

from sweet_jax import AdaptiveClassifier, ExitOutputs, load_encoder
from sweet_jax.config import Config, from_mapping
from sweet_jax.exits.analysis import load_analysis
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.models.bert import Bert
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.objectives.single_label import SINGLE_LABEL
from sweet_jax.pipeline import run
from sweet_jax.preparation import prepare
from sweet_jax.simulate import main as simulate_main
from sweet_jax.training.losses import compute_step_metrics, mean_exit_loss
from sweet_jax.training.metrics import find_failures
from sweet_jax.training.optimizer import clip_gradients
from sweet_jax.training.step import init_state, train_step


def test_exit_loss_is_squared_error_of_correctness():
    logits = jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [5.0, 0.0]])  # classes 0 1 0 0
    labels = jnp.array([0, 0, 1, 0])  # right, wrong, wrong, padding
    row_mask = jnp.array([True, True, True, False])
    scores = jnp.array([0.9, 0.2, 0.5, 0.0])
    expected = ((0.9 - 1) ** 2 + 0.2**2 + 0.5**2) / 3
    np.testing.assert_allclose(
        mean_exit_loss(SINGLE_LABEL.is_correct(logits, labels), scores, row_mask),
        expected,
        rtol=1e-6,
    )
    correct = SINGLE_LABEL.is_correct(jnp.stack([logits, -logits]), labels)
    losses = mean_exit_loss(correct, jnp.stack([scores, scores]), row_mask)
    expected_of_negated = (0.9**2 + (0.2 - 1) ** 2 + (0.5 - 1) ** 2) / 3
    np.testing.assert_allclose(losses, [expected, expected_of_negated], rtol=1e-6)


@pytest.mark.parametrize("mode", ["joint", "detached"])
def test_exit_loss_gradient_stays_in_its_segment_or_head(mode):
    graphdef, params = build(learning_to_exit=mode)

    def loss(params):
        output = nnx.merge(graphdef, params).forward(BATCH, 1.0)
        return compute_step_metrics(output, BATCH).exit_loss[1]

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        match tuple(p.key for p in path):
            case ("heads", "3", "learning_to_exit", _):
                reached = True
            case ("heads", "3", "pooler", _) | ("encoder", "layers", 1 | 2, *_):
                reached = mode == "joint"
            case _:  # the classifier too: correctness has no gradient
                reached = False
        assert np.any(leaf) == reached or untrained(path), path


@pytest.mark.nightly
def test_enabling_learning_to_exit_keeps_other_initial_params_and_dropout():
    def make(**options):
        graphdef, state = nnx.split(
            EarlyExit(Bert(TINY, KEY), EXITS, 2, KEY, ExitConfig(**options))
        )
        params = nnx.to_pure_dict(state)
        return (
            graphdef,
            {
                jax.tree_util.keystr(path): leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            },
            params,
        )

    graphdef, leaves, params = make()
    learned_graphdef, learned_leaves, learned_params = make(learning_to_exit="joint")
    assert len(learned_leaves) == len(leaves) + 2 * len(EXITS)
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, learned_leaves[name])
    kernels = [learned_params["heads"][str(e)]["learning_to_exit"]["kernel"] for e in EXITS]
    assert np.any(kernels[0] != kernels[1])
    dropout = jax.random.key(5)
    logits = [
        nnx.merge(g, p)(BATCH, key=dropout)
        for g, p in ((graphdef, params), (learned_graphdef, learned_params))
    ]
    np.testing.assert_allclose(*logits, atol=1e-6)


@pytest.mark.nightly
def test_detached_heads_do_not_change_training_of_other_params():
    """Gradients are clipped: if the heads counted in their owner's norm, its step would shrink."""
    trained = {}
    for mode in ("", "detached"):
        graphdef, params = build(learning_to_exit=mode)
        step_settings = settings(graphdef, learning_to_exit=mode, clip_norm=0.05)
        step = jax.jit(functools.partial(train_step, step_settings))
        state = init_state(params, 1e-2, 0)
        for _ in range(3):
            state, metrics = step(state, BATCH)
        assert (metrics.exit_loss is None) == (mode == "")
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        trained[mode] = {jax.tree_util.keystr(path): (path, leaf) for path, leaf in leaves}
        exit_heads = [params["heads"]["1"].get("learning_to_exit"), state.params["heads"]["1"]]
        if mode:
            assert np.all(exit_heads[0]["kernel"] != exit_heads[1]["learning_to_exit"]["kernel"])
    for name, (path, leaf) in trained[""].items():
        if not untrained(path):  # a gradient of rounding noise, which Adam scales up
            np.testing.assert_allclose(trained["detached"][name][1], leaf, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("by_owner", [True, False])
def test_owner_clip_norm_includes_only_joint_heads(by_owner):
    graphdef, params = build(learning_to_exit="joint")
    grads = jax.tree.map(jnp.ones_like, params)

    def clipped(mode, scale):
        for layer in map(str, EXITS):
            head = grads["heads"][layer]
            head["learning_to_exit"] = jax.tree.map(
                lambda g: jnp.full_like(g, scale), head["learning_to_exit"]
            )
        step_settings = settings(
            graphdef, learning_to_exit=mode, clip_norm=1.0, clip_by_owner=by_owner
        )
        return clip_gradients(grads, step_settings)

    small, large = (clipped("detached", scale) for scale in (1.0, 1e3))
    for layer in map(str, EXITS):
        exit_head = large["heads"][layer].pop("learning_to_exit")
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(exit_head)))
        assert norm == pytest.approx(1.0, rel=1e-5)
        small["heads"][layer].pop("learning_to_exit")
    jax.tree.map(np.testing.assert_array_equal, small, large)
    joint = clipped("joint", 1e3)["heads"]["1"]["classifier"]["bias"]
    assert joint[0] < 0.1 * small["heads"]["1"]["classifier"]["bias"][0]


def test_non_finite_exit_loss_is_reported():
    rows = [
        {"training": "t", "step": s, "loss": [[0.5, 0.5]], "predicted": [[-1, -1]]}
        | ({"exit_loss": [[0.2, None if s > 3 else 0.2]]} if s else {})
        for s in range(6)
    ]
    logits = np.eye(2, dtype=np.float32)[None, None, [0, 1]].repeat(2, axis=1)
    identity = RunIdentity(classes=("no", "yes"), replicas=((0, 1e-3),))
    outputs = ExitOutputs(logits, [0, 1], [1, 3], identity=identity)
    failures = find_failures(rows, {"t": (1, 3)}, outputs)
    assert [(f["exit"], f["what"], f["step"]) for f in failures] == [(3, "loss is not finite", 4)]


@pytest.mark.parametrize(
    ("values", "policy"),
    [
        ({}, "confidence"),
        ({"learning_to_exit": "joint"}, "learning_to_exit"),
        ({"learning_to_exit": "detached", "preset": "paper"}, "learning_to_exit"),
        ({"preset": "reference"}, "confidence_float32"),
        ({"learning_to_exit": "joint", "preset": "reference"}, "learning_to_exit_min_max"),
        (
            {"learning_to_exit": "joint", "preset": "reference", "exit_score": "learning_to_exit"},
            "learning_to_exit",
        ),
    ],
)
def test_run_policy_follows_learning_to_exit_and_preset(values, policy):
    assert Config(**values).resolved().policy == policy


@pytest.mark.parametrize(
    ("method", "mode"),
    [("sweet", "joint"), pytest.param("multi_model", "detached", marks=pytest.mark.nightly)],
)
def test_run_and_its_saved_model_use_learned_exit_scores(
    method, mode, options, tmp_path, one_device, capsys
):
    config = from_mapping(options | {"method": method, "learning_to_exit": mode})
    results = run(config, tmp_path)
    capsys.readouterr()
    assert results["policy"] == "learning_to_exit"
    np.testing.assert_array_less(results["replicas"][0]["grid"]["threshold"], 1 + 1e-9)
    splits = {
        split: ExitOutputs.load(tmp_path / "exit_outputs" / f"{split}.npz")
        for split in ("calibration", "validation")
    }
    for outputs, rows in zip(splits.values(), (10, 32), strict=True):
        assert outputs.exit_scores.shape == (1, 3, rows)
        assert outputs.exit_scores.min() > 0
        assert outputs.exit_scores.max() < 1
        assert outputs.identity.learning_to_exit == mode
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    exits = 1 if method == "multi_model" else 3
    assert all(np.shape(row["exit_loss"]) == (1, exits) for row in rows)
    _check_model(tmp_path / "model", prepare(config).validation, splits["validation"])
    _check_commands(tmp_path, capsys)


def test_model_of_a_run_whose_policy_needs_all_rows_has_the_policy_for_one_row(
    options, tmp_path, one_device
):
    changes = {"preset": "reference", "learning_to_exit": "joint"}
    assert run(from_mapping(options | changes), tmp_path)["policy"] == "learning_to_exit_min_max"
    classifier = AdaptiveClassifier.from_pretrained(tmp_path / "model", cost=0.9)
    assert classifier.policy == "learning_to_exit"
    saved = load_analysis(tmp_path).as_saved()
    assert saved.policy == "learning_to_exit"
    expected = saved.operating_point(saved.best, {"cost": 0.9}).threshold
    assert classifier.threshold == pytest.approx(expected)
    assert len(classifier.predict(["word1 word2"]).labels) == 1


def _check_model(folder, tokens, outputs):
    """Checks that tensors of the saved model give the evaluated exit scores."""
    exits = json.loads((folder / "exits.json").read_text())
    assert exits["policy"] == "learning_to_exit"
    ids = tokens.input_ids[None, slice(*tokens.starts[:2])]
    for model in exits["models"]:
        model_folder = folder / model["folder"]
        hidden = load_encoder(str(model_folder))(ids)
        tensors = safetensors.numpy.load_file(model_folder / "model.safetensors")
        for e in model["exits"]:
            name = f"exits.{e}.pooler.dense"
            pooled = np.asarray(hidden[e][0, 0]) @ tensors[f"{name}.weight"].T
            pooled = np.tanh(pooled + tensors[f"{name}.bias"])
            name = f"exits.{e}.learning_to_exit"
            assert tensors[f"{name}.weight"].shape == (1, 16)
            score = expit(pooled @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])[0]
            np.testing.assert_allclose(score, outputs.exit_scores[0, e - 1, 0], atol=1e-5)


def _check_commands(workdir, capsys):
    """Checks that simulate takes any policy, with the run's own as the default."""
    printed = {}
    for policy in ("", "learning_to_exit", "learning_to_exit_min_max", "confidence"):
        option = [f"--policy={policy}"] if policy else []
        assert simulate_main([f"--run={workdir}", "--cost=0.9", *option]) == 0
        printed[policy] = capsys.readouterr().out
    assert printed[""] == printed["learning_to_exit"]
    assert len(set(printed.values())) == 3
