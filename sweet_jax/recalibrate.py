"""Refits a saved model's temperatures and thresholds on new rows, without changing its weights.

  sweet-jax recalibrate --model=runs/x/model --labelled=new.csv
  sweet-jax recalibrate --model=runs/x/model --audit_log=audit.jsonl

Use this if the texts have changed since the model was trained. Labeled rows, which must not be
rows that it was trained on, are run through all exits. The log of sweet-jax serve --audit contains
the outputs of all exits but no labels: the predictions of the full model take their place, so the
metric in the new copy is the agreement with the full model. Temperatures, curves, thresholds and
certificates are refitted in a copy of the model next to it (--output sets another folder). The
changes are printed, and saved in the copy as recalibration.json. Exit status: 0 done, 2 the model
or the rows cannot be used, 1 anything else.

"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.data.column_names import columns_for_model
from sweet_jax.data.file_lists import expand_files
from sweet_jax.data.records import column_names, read_records
from sweet_jax.data.tables import Columns, missing_column
from sweet_jax.directories import check_new_output, copy_files, whole_directory
from sweet_jax.errors import UserError
from sweet_jax.files import read_json, replace_nonfinite, write_json
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import INT8_FILE, ModelArtifact, open_model
from sweet_jax.inference.audit_identity import describe_audited
from sweet_jax.inference.audit_log import read_audit_log
from sweet_jax.inference.engine import load_engine
from sweet_jax.inference.engine_choice import default_engine
from sweet_jax.inference.onnx_files import PROGRAMS
from sweet_jax.inference.recalibration import (
    bound_warning,
    change_lines,
    describe_changes,
    fit_by_agreement,
    fit_by_labels,
    updated_exits,
)
from sweet_jax.objectives.label_checks import cut_label, list_labels
from sweet_jax.paths import expand_user

_FEW = 30  # minimum rows: with fewer, one row is more than 3 points of accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.recalibrate", __doc__ or "")
    parser.add_argument("--model", required=True, help="model/ folder of a run")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--labelled", help="file of labeled rows, as in training")
    rows.add_argument("--audit_log", help="log of sweet-jax serve --audit, which needs no labels")
    parser.add_argument(
        "--text", help="text columns of the file if not named as in training: a or a,b"
    )
    parser.add_argument("--label", default="label", help="label column of the file (default label)")
    parser.add_argument("--output", help="folder to create (default: MODEL-recalibrated)")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    model = open_model(options.model)
    output = expand_user(options.output or f"{str(model.folder).rstrip('/')}-recalibrated")
    check_new_output(output)  # before anything is computed
    if options.audit_log:
        found = fit_by_agreement(model, *_read_log(options.audit_log, model))
    else:
        texts, labels = read_labelled(options, model)
        engine = load_engine(default_engine(model), model)
        found = fit_by_labels(model, *compute_all_exits(model, engine, texts), labels)
    changes = describe_changes(model, found)
    files = {
        "exits.json": updated_exits(read_json(model.folder / "exits.json"), found),
        "recalibration.json": replace_nonfinite(changes),
    }
    _write_copy(model.folder, output, files)
    for line in change_lines(changes):
        print(line)
    if warning := bound_warning(changes):
        print(warning, file=sys.stderr)
    print(f"written to {output}")


def _read_log(path: str, model: ModelArtifact) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the logits and scores of all exits for the audited texts, see `read_audit_log`.

    Raises UserError for too few texts, or a log of another model or of a precision other than
    float32, to which exits.json applies.
    """
    logits, scores = read_audit_log(path, describe_audited(model, "float32"))
    if logits.shape[1] < _FEW:
        raise UserError(
            f"{path!r} has {logits.shape[1]} audited texts, but reliable thresholds need at least "
            f"{_FEW}: let the server run longer, or raise --audit"
        )
    return logits, scores


def read_labelled(
    options: argparse.Namespace, model: ModelArtifact
) -> tuple[list[Any], np.ndarray]:
    """Returns the texts and the targets of the labeled rows; targets that are classes: int32 [N].

    Raises UserError as `columns_for_model` does, and for a row without text or label, a label that
    the model does not know, too few rows, or rows that all have the same label.
    """
    files = expand_files(options.labelled)
    present = column_names(files[0], options.text) if "," in (options.text or "") else ()
    column = model.objective.column
    names = columns_for_model(options.text, present, model.text_columns)
    columns = Columns(names, options.label, several_labels=column.several)
    texts: list[Any] = []
    labels: list[str] = []
    for path in files:
        for record in read_records(path, columns):
            where = f"row {record.row} of {str(path)!r}"
            *parts, label = record.values or (None,)
            label = "" if label is None and column.several else label  # a row with no labels
            missing = missing_column(record.values, columns)
            if record.error is not None or missing is not None:
                raise UserError(f"{where}: {record.error or f'column {missing!r} is empty'}")
            try:
                column.read([label], model.classes, [tuple(parts)])
            except UserError as error:
                if model.objective.agrees is None:
                    raise UserError(f"{where}: {error}") from error
                raise UserError(
                    f"{where}: label {cut_label(label)!r} is not one of the model's labels: "
                    f"{list_labels(model.classes)}"
                ) from error
            texts.append(parts[0] if len(parts) == 1 else tuple(parts))
            labels.append(label)
    if len(texts) < _FEW:
        raise UserError(
            f"{options.labelled!r} has {len(texts)} labeled rows, but reliable thresholds need at "
            f"least {_FEW}: label more"
        )
    targets = column.read(labels, model.classes, [(str(text),) for text in texts])
    if (targets == targets[0]).all():
        raise UserError(
            f"all rows of {options.labelled!r} have the label {cut_label(labels[0])!r} (column "
            f"{options.label!r}): reliable thresholds need rows of different labels"
        )
    return texts, targets


def _write_copy(folder: Path, output: Path, files: Mapping[str, Any]) -> None:
    """Writes a copy of a model's folder with other JSON files, completely or not at all.

    The copy lacks the files that depend on the former thresholds: int8.json, the model card, and
    the programs of an exported folder. The times of stages do not depend on them, and are copied.
    """
    stale = {INT8_FILE, "README.md"}
    if (folder / "run.py").exists():
        stale |= {*PROGRAMS, "run.py", "model.json"}
        print(
            "note: run.py, run.mjs and index.html use the former thresholds and are left out; "
            "predict, serve and AdaptiveClassifier can run the copy",
            file=sys.stderr,
        )
    with whole_directory(output) as aside:
        copy_files(folder, aside, stale)
        for name, values in files.items():
            write_json(aside / name, values)


if __name__ == "__main__":
    sys.exit(main())
