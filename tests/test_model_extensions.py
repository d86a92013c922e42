"""Poolings and encoder families of user modules, in training, prediction and export."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import TINIES, TINY, Reference, fine_tune, write_checkpoint

from sweet_jax import AdaptiveClassifier, export, registry
from sweet_jax.config import from_mapping
from sweet_jax.errors import UnknownNameError, UserError
from sweet_jax.inference.artifact import open_model
from sweet_jax.models import bert
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.encoder import Encoder, LayerNorm, first_tokens, linear
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.ownership import SHARED, parameter_owners
from sweet_jax.models.pooling import check_pooling, first_token
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.models.tensor_names import TensorNames
from sweet_jax.poolings import POOLINGS, Pooling
from sweet_jax.preparation import prepare

# A user's modules. Only the pooling's function, which is imported when it computes, needs JAX.
FACTS = """from sweet_jax.poolings import Pooling
MAX = Pooling("own_pooling_function:read_max")
SECOND = Pooling("own_pooling_function:nothing", first_only=True)
NARROW = Pooling(lambda h, mask, second: h[:, 0, :3])
"""
FUNCTION = """import jax.numpy as jnp
def read_max(h, mask, second):
    return jnp.max(jnp.where(mask[..., None], h, -jnp.inf), axis=1)
"""
EXITS = (1, 3)


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Yields a folder with importable modules of a user."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "own_pooling.py").write_text(FACTS)
    (folder / "own_pooling_function.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(folder)
    yield folder
    forget_modules()


def forget_modules():
    """Removes the modules from the caches of imports."""
    registry.import_entry.cache_clear()
    for name in ("own_pooling", "own_pooling_function"):
        sys.modules.pop(name, None)


def remove_modules(folder):
    """Deletes the modules, so that they can no longer be imported."""
    shutil.rmtree(folder)
    forget_modules()
    importlib.invalidate_caches()


def check_engines(reference: Reference) -> None:
    """Checks that every engine equals the run's evaluation at the last exit."""
    model = reference.classifier.model.folder
    for engine in ("jax", "onnxruntime"):
        classifier = AdaptiveClassifier.from_pretrained(model, engine=engine)
        classifier = classifier.at(threshold=float("inf"))
        _, probabilities, _ = reference.answers(classifier)
        predictions = classifier.predict(reference.texts, 8)
        np.testing.assert_allclose(predictions.probabilities, probabilities, atol=1e-4)


@pytest.mark.slow
def test_pooling_of_user_module_trains_predicts_and_exports(
    own_modules, checkpoint, tmp_path, capsys
):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    run, values = fine_tune(checkpoint, tmp_path, pooling="own_pooling:MAX", exits=EXITS, epochs=3)
    about = json.loads((run / "model" / "exits.json").read_text())
    assert (about["pooling"], about["first_only"]) == ("own_pooling:MAX", False)
    assert "own_pooling:MAX" not in tuple(POOLINGS)  # the registry does not list it
    # The last batch is not full, and a pooling of no tokens would be infinite.
    assert values["train_size"] % values["batch_size"]
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]).all() for line in losses)
    reference = Reference(run, values)
    check_engines(reference)
    texts = reference.texts[:8]
    expected = reference.classifier.predict(texts)
    assert np.isfinite(expected.probabilities).all()
    folders = {"stablehlo": tmp_path / "programs", "onnx": tmp_path / "graphs"}
    for kind, folder in folders.items():
        options = [f"--model={run / 'model'}", f"--output={folder}", f"--format={kind}"]
        assert export.main(options) == 0, capsys.readouterr().err
    remove_modules(own_modules)
    # The graphs contain the pooling, but without first_only, as in older folders, it is imported.
    predictions = AdaptiveClassifier.from_pretrained(folders["onnx"]).predict(texts)
    np.testing.assert_allclose(predictions.probabilities, expected.probabilities, atol=1e-5)
    problem = (
        "exits.json' needs the pooling 'own_pooling:MAX', which cannot be imported: "
        "ModuleNotFoundError: No module named 'own_pooling': install or import the package that"
    )
    path = folders["onnx"] / "exits.json"
    path.write_text(json.dumps({k: v for k, v in about.items() if k != "first_only"}))
    for folder in (run / "model", folders["onnx"]):
        with pytest.raises(UnknownNameError, match=problem):
            open_model(folder)


def test_pooling_attributes_are_read_without_importing_jax(own_modules):
    program = "import sys, sweet_jax.poolings as p; x = p.POOLINGS['own_pooling:MAX'].first_only"
    program += "; print(x, p.POOLINGS['mean'].width, 'jax' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=own_modules, capture_output=True, text=True
    )
    assert process.stdout == "False 1 False\n", process.stderr


def test_pooling_can_be_added_to_the_registry(options, monkeypatch):
    monkeypatch.setitem(POOLINGS, "begin", Pooling(first_token, first_only=True))
    assert prepare(from_mapping(options | {"pooling": "begin"})).config.pooling == "begin"
    pooled = ExitConfig("begin").reads(jnp.ones((2, 1, 3)), jnp.ones((2, 4), bool))
    assert pooled.shape == (2, 3)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ("own_pooling:MIN", "pooling 'own_pooling:MIN': AttributeError: .*; write module:OBJECT"),
        ("own_pooling:Pooling", "pooling 'own_pooling:Pooling' is of type type, not Pooling"),
        ("nowhere:MAX", "pooling 'nowhere:MAX': ModuleNotFoundError: No module named 'nowhere'"),
        ("meam", "unknown pooling 'meam': did you mean 'mean'"),
        ("own_pooling:SECOND", "pooling 'own_pooling_function:nothing': AttributeError"),
        (
            "own_pooling:NARROW",
            r"pooling 'own_pooling:NARROW' must return an array of shape \[2, 16\].* got \[2, 3\]",
        ),
    ],
)
def test_unusable_pooling_is_refused_in_one_line(own_modules, options, pooling, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(from_mapping(options | {"pooling": pooling}))
    assert "\n" not in str(error.value)


def test_failing_or_inconsistent_pooling_is_refused(monkeypatch):
    monkeypatch.setitem(POOLINGS, "own", Pooling(lambda h, mask, second: h[second.shape]))
    with pytest.raises(UserError, match=r"^pooling 'own' failed on h \[2, 8, 4\] and mask .*Error"):
        check_pooling("own", 4)
    with pytest.raises(ValueError, match="width 2 with dense=True"):
        Pooling(first_token, dense=True, width=2)


def test_saved_model_with_unknown_objective_or_pooling_is_refused(sweet, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sweet.classifier.model.folder, folder)
    about = json.loads((folder / "exits.json").read_text())
    for change, message in (
        ({"objective": "nowhere:MINE"}, "needs the objective 'nowhere:MINE', which cannot be impo"),
        ({"objective": "ranking"}, "needs the objective 'ranking', which is unknown: install or"),
        ({"pooling": "median"}, "needs the pooling 'median', which is unknown: install or import"),
        ({"pooling": ["mean"]}, "is damaged"),
        ({"objective": 5}, "is damaged"),
    ):
        (folder / "exits.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            open_model(folder)


class ToyLayer(nnx.Module):
    """A layer without attention: it mixes in the sum of all tokens."""

    def __init__(self, config, dtype, rngs):
        self.mix = linear(config, config.hidden_size, config.hidden_size, dtype, rngs)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, h, mask, key, relative=None, count=None):
        shown = jnp.where(mask[..., None], h, 0).sum(axis=1) / 8.0  # [B, H]
        first = first_tokens(h.reshape(-1, h.shape[-1]), h.shape[0], count)
        first = first.reshape(h.shape[0], -1, h.shape[-1])  # [B, Q, H]
        return self.norm(first + self.mix(first + shown[:, None]))


class Offset(nnx.Module):
    def __init__(self, size):
        self.bias = nnx.Param(jnp.zeros(size))


class Toy(Encoder):
    """An encoder with an additional group of parameters, `offset`."""

    EMBEDDINGS = bert.BertEmbeddings

    def __init__(self, config, key, dtype=jnp.float32):
        super().__init__(config, key, dtype)
        self.offset = Offset(config.hidden_size)

    def make_layer(self, number, dtype, rngs):
        return ToyLayer(self.config, dtype, rngs)

    def embed(self, input_ids, token_type_ids, mask, key=None):
        return (
            super().embed(input_ids, token_type_ids, mask, key) + self.offset.bias[...][None, None]
        )


TOY = EncoderFamily(
    model_type="toy",
    architecture="ToyModel",
    config=bert.BertConfig,
    encoder=Toy,
    names=TensorNames(
        prefix="toy",
        encoder=dict(bert.NAMES.encoder) | {"offset": "offset"},
        layer={"mix": "mix", "norm": "LayerNorm"},
    ),
    fused_attention_obstacle="its layers have no attention",
    owners={"offset": "first"},
)


@pytest.fixture
def toy(monkeypatch, tmp_path) -> Path:
    """Writes a checkpoint of a family that is registered for the test only."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    monkeypatch.setitem(TINIES, "toy", TINY)
    monkeypatch.setitem(tiny.WRITERS, "toy", tiny.write_words)
    return write_checkpoint(tmp_path / "toy", "toy")


@pytest.mark.slow
def test_encoder_family_of_user_trains_predicts_and_exports(toy, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    run, values = fine_tune(toy, tmp_path, exits=EXITS, epochs=3, pooling="mean")
    trained = open_checkpoint(str(run / "model"))
    assert trained.model_type == "toy"
    assert np.any(trained.weights.encoder["offset"]["bias"])
    reference = Reference(run, values)
    check_engines(reference)
    texts = reference.texts[:8]
    expected = reference.classifier.predict(texts)
    options = [f"--model={run / 'model'}", f"--output={tmp_path / 'graphs'}", "--format=onnx"]
    assert export.main(options) == 0, capsys.readouterr().err
    monkeypatch.delitem(FAMILIES, "toy")
    predictions = AdaptiveClassifier.from_pretrained(tmp_path / "graphs").predict(texts)
    np.testing.assert_allclose(predictions.probabilities, expected.probabilities, atol=1e-5)
    with pytest.raises(UserError, match=r"has model_type 'toy'; supported are bert, roberta"):
        open_checkpoint(str(run / "model"))


def test_saved_model_of_an_unknown_family_needs_the_package_that_defines_it(toy, monkeypatch):
    monkeypatch.delitem(FAMILIES, "toy")
    fix = ": install the package that defines this family"
    with pytest.raises(UserError, match="has model_type 'toy'; supported are bert") as error:
        open_checkpoint(str(toy))
    assert fix not in str(error.value)
    deeper = shutil.copytree(toy, toy / "depth_3")
    (toy / "exits.json").write_text("{}")
    for folder in (toy, deeper):
        with pytest.raises(UserError, match=f"model_type 'toy'; supported are bert.*albert{fix}$"):
            open_checkpoint(str(folder))


@pytest.mark.parametrize("named", [True, False])
def test_entry_point_adds_encoder_family(toy, monkeypatch, named):
    monkeypatch.delitem(FAMILIES, "toy")
    if not named:
        values = json.loads((toy / "config.json").read_text())
        values.pop("model_type")
        (toy / "config.json").write_text(json.dumps(values))
    point = EntryPoint("toy", "test_model_extensions:TOY", "sweet_jax.families")
    monkeypatch.setitem(vars(FAMILIES), "_references", {"toy": point.value})
    monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))
    assert open_checkpoint(str(toy)).family is TOY


def test_checkpoint_cannot_name_code_to_import_as_model_type(toy):
    values = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps(values | {"model_type": "own_family:TOY"}))
    with pytest.raises(UserError, match="has model_type 'own_family:TOY'"):
        open_checkpoint(str(toy))


def test_attention_setting_is_refused_for_layers_without_attention(options, toy):
    encoder = TOY.encoder(TINY, jax.random.key(0))
    encoder.set_attention("einsum")
    with pytest.raises(UserError, match="attention is 'xla', but layer 1 of Toy has no attention"):
        encoder.set_attention("xla")
    with pytest.raises(UserError, match="its layers have no attention; remove attention"):
        prepare(from_mapping(options | {"checkpoint": str(toy), "attention": "xla"}))


def test_declared_owner_of_parameter_group_is_applied_and_required(options, toy, monkeypatch):
    key = jax.random.key(0)
    config = ExitConfig("mean", owners=tuple(TOY.owners.items()))
    model = EarlyExit(TOY.encoder(TINY, key), EXITS, 2, key, config)
    params = nnx.to_pure_dict(nnx.split(model)[1])
    for owner, expected in (("first", EXITS[0]), ("shared", SHARED)):
        owners = parameter_owners(params, EXITS, owners=[("offset", owner)])
        assert owners["encoder"]["offset"] == {"bias": expected}
    with pytest.raises(UserError, match=r"parameters 'offset', .* EncoderFamily\.owners"):
        parameter_owners(params, EXITS)
    values = options | {"checkpoint": str(toy)}
    monkeypatch.setitem(FAMILIES, "toy", dataclasses.replace(TOY, owners={}))
    with pytest.raises(UserError, match=r"'offset', which no exit owns"):
        prepare(from_mapping(values))
    monkeypatch.setitem(FAMILIES, "toy", dataclasses.replace(TOY, owners={"offset": "shared"}))
    with pytest.raises(UserError, match=r"segment_parallel needs .* all exits train 'offset'"):
        prepare(from_mapping(values | {"segment_parallel": True}))


@pytest.mark.parametrize(
    ("table", "missing", "message"),
    [
        ("layer", "mix", "'layers/0/mix/bias': add 'mix' to 'layer' of its TensorNames"),
        ("encoder", "offset", "'offset/bias': add 'offset' to 'encoder' of its TensorNames"),
        (
            "encoder",
            "embeddings/norm",
            "'embeddings/norm/bias': add 'embeddings/norm' to 'encoder' of its TensorNames",
        ),
    ],
)
@pytest.mark.parametrize("typed", [True, False])
def test_parameter_without_a_tensor_name_is_refused(
    toy, monkeypatch, table, missing, message, typed
):
    entries = {k: v for k, v in getattr(TOY.names, table).items() if k != missing}
    names = dataclasses.replace(TOY.names, **{table: entries})
    monkeypatch.setitem(FAMILIES, "toy", dataclasses.replace(TOY, names=names))
    if not typed:  # the type is then guessed from the names of all families
        values = json.loads((toy / "config.json").read_text())
        (toy / "config.json").write_text(json.dumps(values | {"model_type": ""}))
    message = f"the encoder family 'toy' names no tensor for its parameter {message}"
    with pytest.raises(UserError, match=re.escape(message)):
        _ = open_checkpoint(str(toy)).weights


@pytest.mark.parametrize("owners", [{"layers": "first"}, {"offset": "last"}])
def test_invalid_declared_owners_are_refused(owners):
    with pytest.raises(ValueError, match="owners of toy"):
        dataclasses.replace(TOY, owners=owners)


def test_family_without_a_name_of_its_word_embeddings_is_refused():
    names = dataclasses.replace(TOY.names, encoder={"offset": "offset"})
    with pytest.raises(ValueError, match="names of toy: add 'embeddings/word'"):
        dataclasses.replace(TOY, names=names)
