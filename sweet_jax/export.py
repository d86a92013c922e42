"""Exports a saved model as StableHLO programs, or as ONNX graphs for the onnxruntime engine.

  sweet-jax export --model=runs/x/model --output=exported --cost=0.5
  sweet-jax export --model=runs/x/model --output=onnx_model --format=onnx

With --format=onnx the output is a model folder like any other, for predict, serve and
AdaptiveClassifier. ONNX Runtime runs its graphs, so JAX and transformers are not needed. It keeps
the policies and targets of the model, and int8 if sweet-jax quantize fitted it. For the objective
single_label the folder also holds run.py (numpy, onnxruntime, tokenizers), run.mjs (Node.js) and
the page index.html, which run the model without sweet_jax, with the policy and the target set here.

With --format=stablehlo (the default) there is one program for each exit, which runs without
sweet_jax. The output folder holds stage_<layer>.bin (jax.export; any batch size, on CPU, GPU and
TPU), parameters.npz, model.json, which describes the chain of stages, and run.py, which runs it and
needs only jax, numpy and flatbuffers (pip install -e ".[export]"), with which jax.export reads and
writes programs. The inputs of a program are token ids padded to --length. The policy must be
confidence or raw_confidence (multi-label: also min_confidence; regression: stability). Exit status:
0 done, 2 the input is wrong, 1 anything else.

Shape letters: B batch, L length, H hidden, C classes.

"""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from sweet_jax.arguments import ArgumentParser, parse_targets, run_command
from sweet_jax.directories import whole_directory
from sweet_jax.errors import UserError, missing_package
from sweet_jax.files import write_json
from sweet_jax.inference import run_exported
from sweet_jax.inference.artifact import INT8_FILE, ModelArtifact, open_model
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.inference.engine import Stage
from sweet_jax.inference.engine_jax import JaxEngine, load_engine, run_stage, stage_parameters
from sweet_jax.inference.network import Network
from sweet_jax.inference.onnx_files import check_not_exported
from sweet_jax.poolings import POOLINGS

_FORMATS = ("stablehlo", "onnx")
_SHORTEST = 8  # the minimum of max_length too: fewer tokens leave hardly any room for text
_PLATFORMS = ("cpu", "cuda", "tpu")
_POLICIES = {  # policies that run.py implements, by objective
    "single_label": ("confidence", "raw_confidence"),
    "multi_label": ("confidence", "raw_confidence", "min_confidence"),
    "regression": ("stability",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.export", __doc__ or "")
    parser.add_model_arguments()
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default=_FORMATS[0],
        help=f"format of the export (default {_FORMATS[0]})",
    )
    parser.add_argument(
        "--length", type=int, help="tokens that texts are padded to (default: the model's maximum)"
    )
    options = parser.parse_args(argv)
    if options.format == "onnx":
        if options.length is not None:
            raise UserError(
                "--length applies only to --format=stablehlo: with --format=onnx texts may have "
                "any length; remove it"
            )
        if options.milliseconds is not None:
            raise UserError(
                "--milliseconds is measured on this machine, but a folder exported with "
                "--format=onnx runs on any machine: set --cost instead"
            )
    return options


def _run(options: argparse.Namespace) -> None:
    model = open_model(options.model)
    if options.format == "onnx":
        _export_onnx(model, options.policy, parse_targets(options), Path(options.output))
        return
    engine = load_engine(model)
    classifier = AdaptiveClassifier(model, options.policy, parse_targets(options), engine)
    length = model.max_length if options.length is None else options.length
    if not _SHORTEST <= length <= model.max_length:
        raise UserError(f"--length must be from {_SHORTEST} to {model.max_length}; got {length}")
    export(classifier, engine, Path(options.output), length)
    print(f"exported: {options.output}")


def _export_onnx(
    model: ModelArtifact, policy: str | None, target: Mapping[str, Any], folder: Path
) -> None:
    """Writes the folder, completely or not at all. Raises UserError, see `write_onnx`."""
    try:
        from sweet_jax.inference import onnx_runners
        from sweet_jax.inference.onnx_export import write_onnx
    except ImportError as error:
        package = missing_package(error)
        raise UserError(f'--format=onnx needs {package}: pip install -e ".[onnx]"') from error
    check_not_exported(model.folder)
    programs = model.objective.name == "single_label"
    if programs:
        policy = _runner_policy(policy, model.policy, onnx_runners.POLICIES)
    else:
        _announce_no_programs(model.objective.name, policy, target)
        policy = model.policy
    models = {"float32": model}
    if (model.folder / INT8_FILE).exists():
        models["int8"] = open_model(model.folder, "int8")
    for each in models.values():
        each.resolver.threshold(policy, **target)  # refuses the target before anything is written
    with whole_directory(folder) as aside:
        write_onnx(model, aside, tuple(models))
        if programs:
            onnx_runners.write_runners(models, aside, policy, target)
    print(f"exported: {folder}")


def _runner_policy(policy: str | None, own: str, known: Sequence[str]) -> str:
    """Returns the policy of run.py, run.mjs and index.html: the requested one, or the run's own.

    Args:
      policy: the requested policy; None for the run's own.
      own: the run's own policy; if it is not in `known`, "confidence" replaces it, with a note.
      known: the policies that these programs implement.

    Raises UserError if the requested policy is not in `known`.

    """
    names = ", ".join(known)
    if policy is None and own not in known:
        print(
            f"note: run.py, run.mjs and index.html do not implement the policy {own!r} and use "
            f"'confidence' instead; set --policy to one of {names} to choose another",
            file=sys.stderr,
        )
        return "confidence"
    if (policy or own) not in known:
        raise UserError(f"with --format=onnx, --policy must be one of {names}; got {policy!r}")
    return policy or own


def _announce_no_programs(objective: str, policy: str | None, target: Mapping[str, Any]) -> None:
    """Prints that run.py, run.mjs and index.html, which implement only single_label, are left out.

    Raises UserError for a policy or a target, which only these programs use.
    """
    if policy is not None or target:
        raise UserError(
            "with --format=onnx, --policy and targets apply only to run.py, run.mjs and "
            f"index.html, which do not implement objective={objective!r}: remove them here, and "
            "pass them to predict or serve"
        )
    print(
        f"note: run.py, run.mjs and index.html do not implement objective={objective!r} and are "
        "not written; predict, serve and AdaptiveClassifier can run this folder",
        file=sys.stderr,
    )


def export(classifier: AdaptiveClassifier, engine: JaxEngine, folder: Path, length: int) -> None:
    """Writes the folder, completely or not at all, with programs of L = `length`.

    run.py uses the classifier's policy and threshold. Raises UserError if it does not implement
    them, or if the folder already exists.
    """
    _check(classifier)
    with whole_directory(folder) as aside:
        _write_programs(classifier, engine, aside, length)


def _write_programs(
    classifier: AdaptiveClassifier, engine: JaxEngine, folder: Path, length: int
) -> None:
    """Writes a program for each stage, their parameters, and run.py."""
    model, chain = classifier.model, []
    parameters: dict[str, Any] = {}
    for stage in engine.stages():
        network = engine.networks[stage.network]
        own = stage_parameters(stage, network.params)
        names = {f"{stage.network}/{name}": value for name, value in own.items()}
        parameters |= names
        program = f"stage_{stage.end:02d}.bin"
        serialized = serialize_stage(network, stage, list(own.values()), length)
        (folder / program).write_bytes(serialized)
        values = {"layer": stage.end, "cost": float(model.cost[stage.exit]), "program": program}
        values |= _temperatures(classifier, stage)
        chain.append(values | {"embeds": stage.embeds, "parameters": list(names)})
    np.savez(folder / "parameters.npz", **parameters)
    about = {"format": 1, "classes": list(model.classes), "length": length}
    about |= {"threshold": classifier.threshold, "pad_id": engine.pad_id}
    if POOLINGS[model.pooling].pairs:
        about["pairs"] = True
    if model.objective.name != "single_label":
        about |= {"objective": model.objective.name, "policy": classifier.policy}
    write_json(folder / "model.json", about | {"stages": chain})
    shutil.copyfile(run_exported.__file__, folder / "run.py")


def _check(classifier: AdaptiveClassifier) -> None:
    objective = classifier.model.objective.name
    known = _POLICIES.get(objective)
    if known is None:
        raise UserError(
            f"run.py does not implement objective={objective!r}, only {', '.join(_POLICIES)}: use "
            "--format=onnx, or predict and serve with the model itself"
        )
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError('jax.export needs flatbuffers: pip install -e ".[export]"')
    if classifier.policy not in known:
        raise UserError(
            f"an exported model with objective={objective} needs --policy="
            f"{' or '.join(known)}; got {classifier.policy!r}"
        )
    if not np.isfinite(classifier.threshold):
        raise UserError(
            f"only a finite threshold can be exported; got {classifier.threshold:g}: set "
            "--threshold, or another target"
        )


def _temperatures(classifier: AdaptiveClassifier, stage: Stage) -> dict[str, float | None]:
    """Returns the temperatures of an exit's probabilities and of its confidence, for model.json."""
    fitted = classifier.calibrator.temperatures[stage.exit]
    # None: only raw_confidence, which uses no temperature, lets a text leave at this exit.
    temperature = float(fitted) if np.isfinite(fitted) else None
    confidence = 1.0 if classifier.policy == "raw_confidence" else temperature
    return {"temperature": temperature, "score_temperature": confidence}


def serialize_stage(network: Network, stage: Stage, params: list[Any], length: int) -> bytes:
    """Serializes the program of a stage, for any batch size B.

    A stage that embeds is a function (parameters, tokens int32 [B], input_ids, token_type_ids int32
    [B, L]) → (h [B, L, H], logits [B, C]). Other stages take h instead of the ids. With a pooling
    of pairs, the last argument is second_start int32 [B].
    """
    pairs = POOLINGS[network.pooling].pairs

    def run(params, tokens, *inputs):
        batch = {"mask": jnp.arange(length)[None] < tokens[:, None]}  # [B, L]
        h = inputs[0]
        if stage.embeds:
            batch |= {"input_ids": inputs[0], "token_type_ids": inputs[1]}
            h = None
        if pairs:
            batch["second_start"] = inputs[-1]
        h, logits, _ = run_stage(network, stage, params, h, batch)
        return h, logits

    (batch,) = jax.export.symbolic_shape("b")
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    state = jax.ShapeDtypeStruct((batch, length, network.hidden_size), "f4")
    inputs = [ids, ids] if stage.embeds else [state]
    specs = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in params]
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    inputs += [tokens] if pairs else []
    exported = jax.export.export(jax.jit(run), platforms=_PLATFORMS)(specs, tokens, *inputs)
    return bytes(exported.serialize())


if __name__ == "__main__":
    sys.exit(main())
