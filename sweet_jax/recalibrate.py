"""Refits a saved model's temperatures and thresholds on labelled rows, without touching weights.

  sweet-jax recalibrate --model=runs/x/model --labelled=new.csv

For a model whose texts have changed since it was trained. Every row is computed by all exits; their
answers fit temperatures, curves, thresholds and certificates anew, in a copy of the model beside it
(--output names another place). The rows must not be those that it was trained on. Prints what
changed. Exit status: 0 done, 2 the model or the rows will not do, 1 anything else.

"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import UserError
from sweet_jax.data.column_names import parse_names
from sweet_jax.data.file_lists import expand_files
from sweet_jax.data.label_checks import without_fraction
from sweet_jax.data.records import column_names, read_records
from sweet_jax.data.tables import Columns
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.operating_point import deployable_policies, make_resolver
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity
from sweet_jax.exits.resolver import ThresholdResolver
from sweet_jax.exits.simulation import simulate
from sweet_jax.files import expand_user, read_json, write_json
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import INT8_FILE, ModelArtifact, open_model
from sweet_jax.inference.engine import load_engine
from sweet_jax.inference.engine_choice import default_engine
from sweet_jax.inference.latency import LATENCY_FILE

_FEW = 30  # rows: one of fewer is more than 3 points of accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.recalibrate", __doc__ or "")
    parser.add_argument("--model", required=True, help="folder model/ of a run")
    parser.add_argument("--labelled", required=True, help="file of labelled rows, as in training")
    parser.add_argument("--text", help="its text columns, if not named as in training: a or a,b")
    parser.add_argument("--label", default="label", help="its label column (default label)")
    parser.add_argument("--output", help="folder to make (default: MODEL-recalibrated)")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    model = open_model(options.model)
    output = expand_user(options.output or f"{str(model.folder).rstrip('/')}-recalibrated")
    if output.exists():
        raise UserError(f"--output {str(output)!r} exists: choose another, or remove it")
    texts, labels = read_labelled(options, model)
    engine = load_engine(default_engine(model), model)
    logits, scores = compute_all_exits(model, engine, texts)
    outputs = ExitOutputs(
        logits[None],
        labels,
        np.asarray(model.layers),
        model.cost,
        None if scores is None else scores[None],
        identity=RunIdentity(
            split="calibration", policy=model.policy, metric=model.metric, classes=model.classes
        ),
    )
    resolver = make_resolver(outputs, deployable_policies(outputs))
    values = read_json(model.folder / "exits.json")
    temperatures = resolver.calibrator.temperatures
    full = analyse(outputs, outputs).operating_point(0)
    changed = values | {
        "temperatures": [t if np.isfinite(t) else None for t in temperatures.tolist()],
        "dials": resolver.as_dict()
        | {"full_score": None if full.threshold is None else full.as_dict()},
        "recalibrated_on": len(texts),
    }
    _write_copy(model.folder, output, changed)
    for line in _changes(model, outputs, resolver):
        print(line)
    print(f"written to {output}")


def read_labelled(
    options: argparse.Namespace, model: ModelArtifact
) -> tuple[list[Any], np.ndarray]:
    """Returns the texts of the labelled rows, and their classes, int32 [N].

    Raises UserError for a row without text or label, a label that the model does not have, and too
    few rows.
    """
    files = expand_files(options.labelled)
    present = column_names(files[0], options.text) if "," in (options.text or "") else ()
    columns = Columns(parse_names(options.text or "", present) or model.text_columns, options.label)
    # As in training, 1 and 1.0 are one label.
    index = {without_fraction(name): c for c, name in enumerate(model.classes)}
    index |= {name: c for c, name in enumerate(model.classes)}
    texts: list[Any] = []
    labels: list[int] = []
    for path in files:
        for record in read_records(path, columns):
            where = f"row {record.row} of {str(path)!r}"
            if record.error is not None or None in record.values:
                raise UserError(f"{where}: {record.error or 'a text or the label is empty'}")
            *parts, label = record.values
            number = index.get(label, index.get(without_fraction(label)))
            if number is None:
                known = ", ".join(map(repr, model.classes[:10]))
                raise UserError(f"{where}: label {label!r} is none of the model's: {known}")
            texts.append(parts[0] if len(parts) == 1 else tuple(parts))
            labels.append(number)
    if len(texts) < _FEW:
        raise UserError(
            f"{options.labelled!r} has {len(texts)} labelled rows: thresholds fitted on fewer than "
            f"{_FEW} say little of others; label more"
        )
    return texts, np.asarray(labels, np.int32)


def _write_copy(folder: Path, output: Path, values: Mapping[str, Any]) -> None:
    """Writes a copy of a model's folder with another exits.json, whole or not at all."""
    aside = output.with_name(f".{output.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(folder, aside, ignore=shutil.ignore_patterns(LATENCY_FILE, INT8_FILE))
        write_json(aside / "exits.json", values)
        aside.rename(output)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"--output {str(output)!r} cannot be written to ({error.strerror}): choose another"
        ) from error


def _changes(model: ModelArtifact, outputs: ExitOutputs, now: ThresholdResolver) -> list[str]:
    """Describes what changed: temperatures, and the threshold that keeps the last exit's metric."""
    metric, labels = outputs.metric, outputs.labels[0]
    lines = [f"{'exit':>6} {metric.name:>9}  temperature, on {len(labels)} rows"]
    rows = zip(model.layers, outputs.predictions[0], strict=True)
    for e, (layer, given) in enumerate(rows):
        value = compute_metric(metric, given, labels, len(model.classes))
        before, after = (r.calibrator.temperatures[e] for r in (model.resolver, now))
        lines.append(f"{layer:6d} {value:9.4f}  {before:.3f} -> {after:.3f}")
    for name, resolver in (("before", model.resolver), ("now", now)):
        threshold = resolver.resolve(model.policy).threshold
        if threshold is None:
            lines.append(f"{name}: no threshold keeps the full {metric.name}")
            continue
        point = simulate(
            outputs,
            model.policy,
            calibrators=[resolver.calibrator],
            thresholds=np.asarray([threshold]),
        )
        lines.append(
            f"{name}: threshold {threshold:.4f}, on these rows {metric.name} "
            f"{point.score[0, 0]:.4f} at cost {point.cost[0, 0]:.3f}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
