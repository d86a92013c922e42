"""Pairs of texts, whose exits compare them, from rows to every engine and exported program."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported_programs import UNUSUAL, assert_same, load_python
from saved_models import LONGEST, MODES, Saved, check, middle
from test_export import load_runner
from test_pooling import declare
from tiny import WORDS, write_checkpoint

from sweet_jax import AdaptiveClassifier, cli, export
from sweet_jax.config import Config
from sweet_jax.data.batches import encode_pairs
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.saved_tokenizer import SavedTokenizer, load_saved_tokenizer
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.models.pooling import SHARPNESS, aligned_pair, means_of_pair
from sweet_jax.pipeline import run
from sweet_jax.preparation import prepare

MASK = np.arange(6)[None] < np.array([6, 4, 3])[:, None]
STARTS = np.asarray([3, 1, 2])
SECOND = np.arange(6)[None] >= STARTS[:, None]


def test_pair_pooling_joins_means_difference_and_product():
    h = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    features = means_of_pair(jnp.asarray(h), jnp.asarray(MASK), jnp.asarray(SECOND))
    assert features.shape == (3, 20)
    for row, (start, end) in enumerate([(3, 6), (1, 4), (2, 3)]):
        u, v = h[row, :start].mean(axis=0), h[row, start:end].mean(axis=0)
        expected = np.concatenate([u, v, abs(u - v), u * v])
        np.testing.assert_allclose(features[row], expected, atol=1e-6)
    with pytest.raises(ValueError, match="second_start"):
        means_of_pair(jnp.asarray(h), jnp.asarray(MASK), None)


def mean_distance_to_counterparts(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Computes the alignment of one text [N, H] to another [M, H] token by token, [H]."""
    distances = []
    for x in own:
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in other]
        weights = np.exp(SHARPNESS * np.asarray(cosines))
        distances.append(abs(x - weights @ other / weights.sum()))
    return np.mean(distances, axis=0)


def test_aligned_pair_pooling_adds_mean_distances_to_counterparts():
    h = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    arguments = jnp.asarray(h), jnp.asarray(MASK), jnp.asarray(SECOND)
    features = aligned_pair(*arguments)
    assert features.shape == (3, 30)
    np.testing.assert_array_equal(features[:, :20], means_of_pair(*arguments))
    for row, (start, end) in enumerate([(3, 6), (1, 4), (2, 3)]):
        first, second = h[row, :start].astype(np.float64), h[row, start:end].astype(np.float64)
        sides = [(first, second), (second, first)]
        expected = np.concatenate([mean_distance_to_counterparts(*side) for side in sides])
        np.testing.assert_allclose(features[row, 20:], expected, atol=1e-5)
    with pytest.raises(ValueError, match="second_start"):
        aligned_pair(jnp.asarray(h), jnp.asarray(MASK), None)


def test_aligned_pair_pooling_finds_the_same_tokens_in_another_order():
    """The means of both texts are equal too, so the second pair differs in the distances alone."""
    h = np.random.default_rng(0).normal(size=(1, 4, 200)).astype(np.float32)
    flipped = np.stack([h[0, ::-1], h.mean(axis=1) + np.zeros((4, 1), np.float32)])  # [2, 4, H]
    pairs = jnp.asarray(np.concatenate([np.repeat(h, 2, axis=0), flipped], axis=1))
    second = jnp.tile(jnp.arange(8) >= 4, (2, 1))
    features = aligned_pair(pairs, jnp.ones((2, 8), bool), second)
    np.testing.assert_allclose(features[0, :800], features[1, :800], atol=1e-6)
    assert abs(features[0, 800:]).max() < 1e-3 < 0.2 < abs(features[1, 800:]).mean()


def test_aligned_pair_pooling_has_the_gradient_of_its_values():
    h = np.random.default_rng(1).normal(size=(2, 5, 3))
    with jax.enable_x64(True):
        mask = jnp.asarray([[True] * 5, [True] * 4 + [False]])
        pool = lambda x: aligned_pair(x, mask, jnp.arange(5)[None] >= jnp.asarray([[2], [3]])) ** 2
        gradient = jax.grad(lambda x: pool(x).sum())(jnp.asarray(h))
        assert gradient.dtype == jnp.float64
        for index in np.ndindex(h.shape):
            step = np.zeros_like(h)
            step[index] = 1e-3
            slope = (pool(h + step).sum() - pool(h - step).sum()) / 2e-3
            np.testing.assert_allclose(gradient[index], slope, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("function", [means_of_pair, aligned_pair])
def test_pair_pooling_ignores_padding_in_values_and_gradients(function):
    h = jax.random.normal(jax.random.key(0), (3, 6, 5))
    spoilt = jnp.where(MASK[..., None], h, jnp.nan)
    for starts in (STARTS, [6, 4, 0]):  # also pairs with one text without tokens
        second = jnp.arange(6)[None] >= jnp.asarray(starts)[:, None]
        pool = lambda x, s=second: function(x, jnp.asarray(MASK), s)
        np.testing.assert_array_equal(pool(spoilt), pool(h))
        gradient = jax.grad(lambda x, p=pool: (p(x) ** 2).sum())(h)
        assert np.isfinite(gradient).all()
        assert not np.any(np.where(MASK[..., None], 0, gradient))


PAIRS = [("word1 word2", "word3"), ("", "word4"), ("word5", ""), ("word1 " * 20, "word2 " * 9)]


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "modernbert"])
def test_tokenizers_give_the_start_of_the_second_text(tmp_path, kind):
    """Both the tokenizer of transformers and that of saved models do, with the same types."""
    checkpoint = locate_checkpoint(str(write_checkpoint(tmp_path / kind, kind)))
    tokenizer, saved = load_tokenizer(checkpoint), load_saved_tokenizer(checkpoint)
    assert isinstance(saved, SavedTokenizer) or kind == "roberta"  # whose files are repaired
    ids, types, starts = encoded = encode_pairs(tokenizer, PAIRS, 16)
    for actual, expected in zip(encoded, encode_pairs(saved, PAIRS, 16), strict=True):
        for row, expected_row in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(row, expected_row)
    for (_, second), row_ids, row_types, start in zip(PAIRS, ids, types, starts, strict=True):
        if row_types.any():
            assert start == np.count_nonzero(row_types == 0)
        words = tokenizer.decode(row_ids[start:], skip_special_tokens=True).split()
        assert words == second.split()[: len(words)]
        assert bool(words) == bool(second)
        assert second or start == len(row_ids) - 1
    assert encode_pairs(tokenizer, [("word1",)], 16)[2] == []


def test_jax_engine_equals_one_pass_model_on_pairs(tmp_path):
    saved = Saved(tmp_path, "roberta", "aligned_pair", exits=(1, 3))
    check(saved, saved.confidence(), (16,), "jax", MODES[:1], full=False)


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("bert", "aligned_pair"), ("roberta", "pair"), ("modernbert", "aligned_pair")],
)
def test_onnx_runtime_equals_one_pass_model_on_pairs(tmp_path, kind, pooling):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
    saved = Saved(tmp_path, kind, pooling, learned=kind == "bert")
    check(saved, saved.confidence())
    if saved.scores is not None:
        check(saved, saved.scores, (5,), policy="learning_to_exit")


def unusual_pairs() -> list[tuple[str, str]]:
    texts = [*UNUSUAL, *WORDS[:20]]
    return list(zip(texts, texts[::-1], strict=True))


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "aligned_pair"), ("roberta", "pair")])
def test_exported_python_program_equals_classifier_on_pairs(tmp_path, kind, pooling):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
    saved = Saved(tmp_path, kind, pooling)
    threshold = middle(saved.confidence())
    folder = tmp_path / "out"
    options = [f"--model={saved.folder}", f"--output={folder}", "--format=onnx"]
    assert export.main([*options, f"--threshold={threshold}"]) == 0
    classifier = AdaptiveClassifier.from_pretrained(folder, threshold=threshold)
    expected = classifier.predict(unusual_pairs())
    assert len(set(expected.exits)) > 1
    assert_same(load_python(folder).Classifier(folder).predict(unusual_pairs(), 7), expected)


@pytest.mark.slow
def test_exported_stablehlo_equals_classifier_on_pairs(tmp_path):
    saved = Saved(tmp_path, "roberta", "aligned_pair")
    threshold, folder = middle(saved.confidence()), tmp_path / "out"
    options = [f"--model={saved.folder}", f"--output={folder}", f"--threshold={threshold}"]
    assert export.main(options) == 0
    ids, types, starts = encode_pairs(open_model(saved.folder).tokenizer, saved.texts, LONGEST)
    tokens = np.asarray([len(row_ids) for row_ids in ids], np.int32)
    padded = np.zeros((2, len(ids), LONGEST), np.int32)
    for row, ids_and_types in enumerate(zip(ids, types, strict=True)):
        padded[:, row, : tokens[row]] = ids_and_types
    arrays = (*padded, tokens, np.asarray(starts, np.int32))
    predicted, probability, layer = load_runner(folder).predict(folder, *arrays)
    classifier = AdaptiveClassifier.from_pretrained(saved.folder, engine="jax", threshold=threshold)
    expected = classifier.predict(saved.texts)
    assert layer.tolist() == expected.exits.tolist()
    assert (np.asarray(["a", "b", "c"])[predicted] == expected.labels).all()
    np.testing.assert_allclose(probability, expected.probabilities.max(axis=1), atol=1e-5)
    names = ("input_ids", "token_type_ids", "tokens", "second_start")
    np.savez(tmp_path / "tokens.npz", **dict(zip(names, arrays, strict=True)))
    runner = load_runner(folder)
    assert len(runner.read(tmp_path / "tokens.npz", LONGEST, pairs=True)) == 4
    np.savez(tmp_path / "lacks.npz", **dict(zip(names[:3], arrays[:3], strict=True)))
    with pytest.raises(ValueError, match="the array second_start is missing"):
        runner.read(tmp_path / "lacks.npz", LONGEST, pairs=True)


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory):
    """Writes rows whose label says whether two texts are the same."""
    rng = np.random.default_rng(0)
    lines = ["first,second,label"]
    for number in range(400):
        first, second = (" ".join(rng.choice(WORDS[:8], 3)) for _ in range(2))
        second = first if number % 2 else second
        lines.append(f"{first},{second},{'same' if first == second else 'different'}")
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(pair_file, tmp_path):
    return Config(
        task="own",
        data_files=str(pair_file),
        text_columns="first,second",
        checkpoint=str(write_checkpoint(tmp_path / "checkpoint")),
        exits=(1, 3),
        method="early_exit",
        pooling="auto",
        head_init="probe",
        epochs=0,
        learning_rates=(1e-3,),
        max_length=16,
        train_size=320,
    )


def test_pair_pooling_probe_is_more_accurate_than_mean_pooling_probe(config, tmp_path):
    scores = {}
    for pooling in ("auto", "mean"):
        run(dataclasses.replace(config, pooling=pooling), tmp_path / pooling)
        values = json.loads((tmp_path / pooling / "results.json").read_text())
        scores[pooling] = [row["score"] for row in values["replicas"][0]["individual"]]
        baselines = values["baselines"]
        assert [baselines[f"probe_{e}"]["score"] for e in (1, 3)] == scores[pooling]
        assert values["pooling"] == {"auto": "aligned_pair"}.get(pooling, pooling)
        about = json.loads((tmp_path / pooling / "model" / "exits.json").read_text())
        assert (about["pooling"] == "aligned_pair") == (about["version"] == 7)
    assert scores["auto"][0] > scores["mean"][0] + 0.15
    rows = [line.split(",") for line in Path(config.data_files).read_text().splitlines()[1:101]]
    saved = AdaptiveClassifier.from_pretrained(tmp_path / "auto" / "model", engine="jax")
    predictions = saved.predict([(first, second) for first, second, _ in rows])
    assert np.mean(predictions.labels == np.asarray([label for *_, label in rows])) > 0.7


def test_run_that_began_with_pair_pooling_resumes_with_auto(config, tmp_path):
    """As "auto" was "pair" in older versions."""
    run(dataclasses.replace(config, pooling="pair"), tmp_path / "run")
    assert run(config, tmp_path / "run")["pooling"] == "pair"
    (tmp_path / "run" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not the config of a run"):
        run(config, tmp_path / "run")


def test_token_types_beyond_type_vocab_size_are_refused(config):
    path = Path(config.checkpoint) / "tokenizer.json"
    path.write_text(path.read_text().replace('"type_id": 1', '"type_id": 2'))
    with pytest.raises(UserError, match=r"token type 2, .* type_vocab_size=2") as error:
        prepare(config)
    assert "\n" not in str(error.value)
    prepare(dataclasses.replace(config, text_columns="first"))


def test_auto_pooling_depends_on_text_count_and_checkpoint(config):
    single = dataclasses.replace(config, text_columns="first")
    assert prepare(config).config.pooling == "aligned_pair"
    assert prepare(single).config.pooling == "mean"
    assert prepare(dataclasses.replace(config, pooling="")).config.pooling == "mean"
    declare(Path(config.checkpoint), {"pooling_mode": "cls"})
    assert prepare(config).config.pooling == "first"
    with pytest.raises(
        UserError, match=r"pooling='aligned_pair' .* but a row has one, 'first': set"
    ):
        prepare(dataclasses.replace(single, pooling="aligned_pair"))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "predict",
            ["--input={file}", "--output={folder}/out.jsonl", "--text_columns=first,first"],
        ),
        ("recalibrate", ["--labelled={file}", "--output={folder}/again", "--text=first,first"]),
    ],
)
def test_pair_of_one_column_with_itself_is_refused(
    sweet, pair_file, tmp_path, capsys, command, options
):
    model = shutil.copytree(sweet.classifier.model.folder, tmp_path / "model")
    saved = json.loads((model / "exits.json").read_text())
    (model / "exits.json").write_text(json.dumps(saved | {"text_columns": ["first", "second"]}))
    options = [option.format(file=pair_file, folder=tmp_path) for option in options]
    assert cli.main([command, f"--model={model}", *options]) == 2
    assert "first,first are the same column twice" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
