r"""Fits the thresholds of a run's saved model for int8, whose outputs differ slightly.

  sweet-jax quantize --run=runs/x
  sweet-jax predict --model=runs/x/model --precision=int8 --input=a.csv \
      --output=b.csv

The layers of the model multiply int8 matrices (engine=onnxruntime). Temperatures, curves,
thresholds and certificates are refitted on the outputs that the exits then have on the run's
calibration rows, and written to model/int8.json. The rows are not part of the model: they are read
from the files in the run's config. Run this on the kind of processor that will serve the model,
since processors round int8 products differently. If an exit loses more than 0.5 points on these
rows (regression: if its error grows by more than 1%), significantly so, the layers responsible are
kept in float32; they are found by trying each layer, and printed. --float32_layers sets them
instead. Prints the metric of every exit on the validation rows before and after, and how many
predictions changed. Exit status: 0 done, 2 the run or its data cannot be used, 1 anything else.

Shape letters: E exit, N rows.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import AbsentFileError, UserError, join_numbers
from sweet_jax.exits.operating_point import deployable_policies, make_resolver
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.files import replace_nonfinite, write_json
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import INT8_FILE, INT8_VERSION, ModelArtifact, open_model
from sweet_jax.inference.engine import Engine, load_engine
from sweet_jax.inference.float32_layers import (
    compare_exits,
    describe_loss,
    has_unit,
    select_float32_layers,
    sign_test,
)
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.saved_config import SAME_FOLDER, read_saved_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.quantize", __doc__ or "")
    parser.add_argument("--run", required=True, help="directory of a finished run")
    parser.add_argument("--data_dir", help="new location of its data set, if it was moved")
    parser.add_argument(
        "--float32_layers",
        help="comma-separated layers, numbered from 1, that stay in float32, or none; default: the "
        "layers that need it",
    )
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    folder = Path(options.run)
    config, digest = read_saved_config(folder)
    if options.data_dir:
        config = dataclasses.replace(config, data_dir=options.data_dir)
    model = open_model(folder / "model")
    engine = functools.partial(load_engine, "onnxruntime", model, "int8")
    shared = _shares_layers(model)
    asked = _read_layers(options.float32_layers, model.layers[-1], shared)
    every = engine(float32_layers=asked or ())  # before the data: it may not be installed
    from sweet_jax.preparation import prepare  # imports JAX

    try:
        job = prepare(config)
    except AbsentFileError as error:
        raise UserError(f"{error}; {SAME_FOLDER}") from error
    if job.digest != digest:
        raise UserError(f"{options.run!r} was trained on different data: restore the same files")
    about = json.loads((model.folder / "exits.json").read_text(encoding="utf-8"))
    seed, rate = about["seed"], about["learning_rate"]
    shown = job.dataset.validation.texts
    texts = shown
    if config.calibration == "held_out":
        replica = [own for own, _ in job.config.replicas()].index(seed)
        texts = [job.texts[row] for row in job.rows.calibration[replica]]
    saved = {name: _read_outputs(folder, name) for name in ("calibration", "validation")}
    replica = saved["validation"].identity.replicas.index((seed, rate))
    compared = 1 if job.config.tunes else len(saved["calibration"].logits)
    exact = saved["calibration"].replica(replica)
    chosen = every
    if asked is None:
        layers, fitted = select_float32_layers(
            exact,
            lambda layers: quantized_outputs(
                model, engine(float32_layers=layers) if layers else every, texts, exact
            ),
            shared=shared,
        )
        chosen = engine(float32_layers=layers) if layers else every
    else:
        layers, fitted = asked, quantized_outputs(model, every, texts, exact)
    resolver = make_resolver(fitted, deployable_policies(fitted), compared)
    before = saved["validation"].replica(replica)
    paired = compare_exits(before, quantized_outputs(model, chosen, shown, before))
    values = {"version": INT8_VERSION, "dials": resolver.as_dict(), "float32_layers": layers}
    write_json(model.folder / INT8_FILE, replace_nonfinite(values | paired))
    _print_table(before, paired)
    print(f"written to {model.folder / INT8_FILE}")


def _shares_layers(model: ModelArtifact) -> bool:
    """Returns whether all layers of a model share one set of parameters, as in ALBERT."""
    from sweet_jax.models.pretrained import open_checkpoint  # imports JAX

    return bool(open_checkpoint(str(model.networks[0][0])).family.isolation_obstacle)


def _read_layers(given: str | None, last: int, shared: bool) -> list[int] | None:
    """Returns the layers of --float32_layers in ascending order; None if it is not set.

    Raises UserError for a value that is not the number of a layer of the model, and for some, but
    not all, of several layers that share their parameters (`shared`).
    """
    if given is None:
        return None
    names = [] if given.strip() == "none" else given.split(",")
    wrong = [n for n in names if not (n.strip().isdecimal() and 1 <= int(n) <= last)]
    if wrong:
        raise UserError(
            f"--float32_layers must be layers from 1 to {last}, comma-separated, or none; got "
            f"{wrong[0]!r}"
        )
    layers = sorted({int(name) for name in names})
    if shared and len(layers) not in (0, last):
        raise UserError(
            f"--float32_layers is {given!r}, but the layers of this model share their parameters: "
            f"name all of them, {join_numbers(range(1, last + 1))}, or none"
        )
    return layers


def _read_outputs(folder: Path, split: str) -> ExitOutputs:
    return ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz")


def quantized_outputs(
    model: ModelArtifact, engine: Engine, texts: Sequence[Any], like: ExitOutputs
) -> ExitOutputs:
    """Returns the outputs of every exit on some texts; other fields are copied from `like`."""
    rows = [text[0] if len(text) == 1 else text for text in texts]
    logits, scores = compute_all_exits(model, engine, rows)  # [E, N, C], [E, N]
    learned = None if scores is None else scores[None]
    return dataclasses.replace(like, logits=logits[None], exit_scores=learned)


def _print_table(before: ExitOutputs, paired: dict[str, list[Any]]) -> None:
    """Prints the comparison of `compare_exits`, and a warning for each exit that loses too much."""
    rows = before.labels.shape[1]
    heads = "".join(f" {name:>9}" for name in paired)
    shown = ShownMetric.of(before.metric.name)
    name = f"{shown.name}{shown.better}"
    print(f"{'exit':>6}{heads}  {name} and rows, of {rows} validation rows")
    for layer, old, new, *counts in zip(before.layers, *paired.values(), strict=True):
        form = ">9.4g" if has_unit(before) else ">9.4f"
        metrics = "".join(f" {value:{form}}" for value in shown.values((old, new)))
        print(f"{layer:6d}{metrics}" + "".join(f" {count:9d}" for count in counts))
        loses, text = describe_loss(before, old, new)
        if loses:
            chance = f" (p = {sign_test(*counts[1:]):.2f} by chance)" if counts else ""
            print(
                f"warning: exit {layer} {text} in int8 on the validation rows{chance}: keep layers "
                "in float32 (--float32_layers), or serve this model in float32",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
