"""Pairs of texts, read by their two means: the pooling, from rows to every engine and program."""

import dataclasses
import json
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

from sweet_jax import AdaptiveClassifier, export
from sweet_jax.config import Config
from sweet_jax.data.batches import encode_pairs
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.saved_tokenizer import SavedTokenizer, load_saved_tokenizer
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.models.pooling import means_of_pair
from sweet_jax.pipeline import run
from sweet_jax.preparation import prepare

MASK = np.arange(6)[None] < np.array([6, 4, 3])[:, None]
STARTS = np.asarray([3, 1, 2])
SECOND = np.arange(6)[None] >= STARTS[:, None]


def test_the_features_of_a_pair():
    h = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    found = means_of_pair(jnp.asarray(h), jnp.asarray(MASK), jnp.asarray(SECOND))
    assert found.shape == (3, 20)
    for row, (start, end) in enumerate([(3, 6), (1, 4), (2, 3)]):
        u, v = h[row, :start].mean(axis=0), h[row, start:end].mean(axis=0)
        wanted = np.concatenate([u, v, abs(u - v), u * v])
        np.testing.assert_allclose(found[row], wanted, atol=1e-6)
    with pytest.raises(ValueError, match="second_start"):
        means_of_pair(jnp.asarray(h), jnp.asarray(MASK), None)


def test_padding_is_not_read_and_gets_no_gradient():
    h = jax.random.normal(jax.random.key(0), (3, 6, 5))
    spoilt = jnp.where(MASK[..., None], h, jnp.nan)
    for starts in (STARTS, [6, 4, 0]):  # also pairs of which one text has no token
        second = jnp.arange(6)[None] >= jnp.asarray(starts)[:, None]
        pool = lambda x, s=second: means_of_pair(x, jnp.asarray(MASK), s)
        np.testing.assert_array_equal(pool(spoilt), pool(h))
        gradient = jax.grad(lambda x, p=pool: (p(x) ** 2).sum())(h)
        assert np.isfinite(gradient).all()
        assert not np.any(np.where(MASK[..., None], 0, gradient))


PAIRS = [("word1 word2", "word3"), ("", "word4"), ("word5", ""), ("word1 " * 20, "word2 " * 9)]


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "modernbert"])
def test_every_tokenizer_says_where_the_second_text_begins(tmp_path, kind):
    """As transformers reads its files and as a saved model does; types stay the tokenizer's."""
    checkpoint = locate_checkpoint(str(write_checkpoint(tmp_path / kind, kind)))
    tokenizer, saved = load_tokenizer(checkpoint), load_saved_tokenizer(checkpoint)
    assert isinstance(saved, SavedTokenizer) or kind == "roberta"  # whose files are repaired
    ids, types, starts = found = encode_pairs(tokenizer, PAIRS, 16)
    for own, again in zip(found, encode_pairs(saved, PAIRS, 16), strict=True):
        for row, other in zip(own, again, strict=True):
            np.testing.assert_array_equal(row, other)
    for (_, second), own, kinds, start in zip(PAIRS, ids, types, starts, strict=True):
        if kinds.any():
            assert start == np.count_nonzero(kinds == 0)
        words = tokenizer.decode(own[start:], skip_special_tokens=True).split()
        assert words == second.split()[: len(words)]
        assert bool(words) == bool(second)
        assert second or start == len(own) - 1
    assert encode_pairs(tokenizer, [("word1",)], 16)[2] == []


def test_the_jax_engine_answers_as_the_one_pass_model(tmp_path):
    saved = Saved(tmp_path, "roberta", "pair", exits=(1, 3))
    check(saved, saved.confidence(), (16,), "jax", MODES[:1], full=False)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_onnx_runtime_answers_as_the_one_pass_model(tmp_path, kind):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
    saved = Saved(tmp_path, kind, "pair", learned=kind == "bert")
    check(saved, saved.confidence())
    if saved.scores is not None:
        check(saved, saved.scores, (5,), policy="learning_to_exit")


def unusual_pairs() -> list[tuple[str, str]]:
    texts = [*UNUSUAL, *WORDS[:20]]
    return list(zip(texts, texts[::-1], strict=True))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_python_s_program_answers_as_the_classifier(tmp_path, kind):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
    saved = Saved(tmp_path, kind, "pair")
    threshold = middle(saved.confidence())
    folder = tmp_path / "out"
    options = [f"--model={saved.folder}", f"--output={folder}", "--format=onnx"]
    assert export.main([*options, f"--threshold={threshold}"]) == 0
    wanted = AdaptiveClassifier.from_pretrained(folder, threshold=threshold)
    answers = wanted.predict(unusual_pairs())
    assert len(set(answers.exits)) > 1
    assert_same(load_python(folder).Classifier(folder).predict(unusual_pairs(), 7), answers)


@pytest.mark.slow
def test_stablehlo_answers_as_the_classifier(tmp_path):
    saved = Saved(tmp_path, "roberta", "pair")
    threshold, folder = middle(saved.confidence()), tmp_path / "out"
    options = [f"--model={saved.folder}", f"--output={folder}", f"--threshold={threshold}"]
    assert export.main(options) == 0
    ids, types, starts = encode_pairs(open_model(saved.folder).tokenizer, saved.texts, LONGEST)
    tokens = np.asarray([len(row) for row in ids], np.int32)
    padded = np.zeros((2, len(ids), LONGEST), np.int32)
    for place, rows in enumerate(zip(ids, types, strict=True)):
        padded[:, place, : tokens[place]] = rows
    arrays = (*padded, tokens, np.asarray(starts, np.int32))
    given, probability, layer = load_runner(folder).predict(folder, *arrays)
    wanted = AdaptiveClassifier.from_pretrained(saved.folder, engine="jax", threshold=threshold)
    answers = wanted.predict(saved.texts)
    assert layer.tolist() == answers.exits.tolist()
    assert (np.asarray(["a", "b", "c"])[given] == answers.labels).all()
    np.testing.assert_allclose(probability, answers.probabilities.max(axis=1), atol=1e-5)
    names = ("input_ids", "token_type_ids", "tokens", "second_start")
    np.savez(tmp_path / "tokens.npz", **dict(zip(names, arrays, strict=True)))
    runner = load_runner(folder)
    assert len(runner.read(tmp_path / "tokens.npz", LONGEST, pairs=True)) == 4
    np.savez(tmp_path / "lacks.npz", **dict(zip(names[:3], arrays[:3], strict=True)))
    with pytest.raises(ValueError, match="the array second_start is missing"):
        runner.read(tmp_path / "lacks.npz", LONGEST, pairs=True)


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory):
    """Whether two texts are the same."""
    rng = np.random.default_rng(0)
    lines = ["first,second,label"]
    for number in range(400):
        one, other = (" ".join(rng.choice(WORDS[:8], 3)) for _ in range(2))
        other = one if number % 2 else other
        lines.append(f"{one},{other},{'same' if one == other else 'different'}")
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


def test_a_probe_compares_the_texts_where_one_of_their_mean_cannot(config, tmp_path):
    found = {}
    for pooling in ("auto", "mean"):
        run(dataclasses.replace(config, pooling=pooling), tmp_path / pooling)
        values = json.loads((tmp_path / pooling / "results.json").read_text())
        found[pooling] = [row["score"] for row in values["replicas"][0]["individual"]]
        baseline = values["baselines"]
        assert [baseline[f"probe_{e}"]["score"] for e in (1, 3)] == found[pooling]
        assert values["pooling"] == {"auto": "pair"}.get(pooling, pooling)
        about = json.loads((tmp_path / pooling / "model" / "exits.json").read_text())
        assert (about["pooling"] == "pair") == (about["version"] == 7)
    assert found["auto"][0] > found["mean"][0] + 0.15
    rows = [line.split(",") for line in Path(config.data_files).read_text().splitlines()[1:101]]
    saved = AdaptiveClassifier.from_pretrained(tmp_path / "auto" / "model", engine="jax")
    answers = saved.predict([(first, second) for first, second, _ in rows])
    assert np.mean(answers.labels == np.asarray([label for *_, label in rows])) > 0.7


def test_token_types_that_the_checkpoint_does_not_have_are_refused(config):
    path = Path(config.checkpoint) / "tokenizer.json"
    path.write_text(path.read_text().replace('"type_id": 1', '"type_id": 2'))
    with pytest.raises(UserError, match=r"token type 2, .* type_vocab_size=2") as error:
        prepare(config)
    assert "\n" not in str(error.value)
    prepare(dataclasses.replace(config, text_columns="first"))


def test_auto_is_the_pooling_of_the_checkpoint_where_a_row_is_one_text(config):
    single = dataclasses.replace(config, text_columns="first")
    assert prepare(config).config.pooling == "pair"
    assert prepare(single).config.pooling == "mean"
    assert prepare(dataclasses.replace(config, pooling="")).config.pooling == "mean"
    declare(Path(config.checkpoint), {"pooling_mode": "cls"})
    assert prepare(config).config.pooling == "first"
    with pytest.raises(UserError, match=r"pooling='pair' .* but a row has one, 'first': set"):
        prepare(dataclasses.replace(single, pooling="pair"))
