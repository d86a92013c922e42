"""Fits the thresholds of a run's saved model for int8, whose answers differ a little.

  sweet-jax quantize --run=runs/x
  sweet-jax predict --model=runs/x/model --precision=int8 --input=new.csv --output=new.jsonl

The layers of the model multiply int8 (engine=onnxruntime); what an exit then answers on the run's
calibration rows fits its temperatures, curves, thresholds and certificates anew, in
model/int8.json. The rows are not in the model: they are read as the run's own config names them,
on the kind of processor that will serve the model, since processors round int8 products
differently. Where an exit loses more than 0.5 points on these rows (of numbers: where its error
grows by more than 1%), and more rows than chance explains, the layers that cost it most stay in
float32: those are found by trying each, and said.
--float32_layers names them instead. Prints the metric of every exit on the validation rows before
and after, and how many predictions changed. Exit status: 0 done, 2 the run
or its data will not do, 1 anything else.

Shape letters: E exit, N rows.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import UserError
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.operating_point import deployable_policies, make_resolver
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.files import replace_nonfinite, write_json
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import INT8_FILE, INT8_VERSION, ModelArtifact, open_model
from sweet_jax.inference.engine import Engine, load_engine
from sweet_jax.saved_config import read_saved_config

_LOSS = 0.005  # of an exit's metric, above which layers stay in float32
_GROWTH = 0.01  # of an exit's error in the targets' units, as a share of the error in float32
# Rounding turns predictions of uncertain rows both ways. A loss that this probability leaves to
# chance does not pay for a layer in float32, which takes three times as long as one in int8.
_CHANCE = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.quantize", __doc__ or "")
    parser.add_argument("--run", required=True, help="directory of a run that is complete")
    parser.add_argument("--data_dir", help="where its data set lies now, if it was moved")
    parser.add_argument(
        "--float32_layers",
        help="comma-separated layers that stay in float32, from 1, or none; default: those needed",
    )
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    folder = Path(options.run)
    config, digest = read_saved_config(folder)
    if options.data_dir:
        config = dataclasses.replace(config, data_dir=options.data_dir)
    model = open_model(folder / "model")
    engine = functools.partial(load_engine, "onnxruntime", model, "int8")
    asked = _read_layers(options.float32_layers, model.layers[-1])
    every = engine(float32_layers=asked or ())  # before the data is read: it may not be installed
    from sweet_jax.preparation import prepare  # imports JAX

    job = prepare(config)
    if job.digest != digest:
        raise UserError(f"{options.run!r} was trained on other data: give the same files")
    about = json.loads((model.folder / "exits.json").read_text())
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


def _read_layers(given: str | None, last: int) -> list[int] | None:
    """Returns the layers of --float32_layers, ascending; None where it is not given.

    Raises UserError for what is not the number of a layer of the model.
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
    return sorted({int(name) for name in names})


def _read_outputs(folder: Path, split: str) -> ExitOutputs:
    return ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz")


def quantized_outputs(
    model: ModelArtifact, engine: Engine, texts: Sequence[Any], like: ExitOutputs
) -> ExitOutputs:
    """Returns the outputs of every exit on some texts; all but logits and scores are `like`'s."""
    rows = [text[0] if len(text) == 1 else text for text in texts]
    logits, scores = compute_all_exits(model, engine, rows)  # [E, N, C], [E, N]
    learned = None if scores is None else scores[None]
    return dataclasses.replace(like, logits=logits[None], exit_scores=learned)


def select_float32_layers(
    exact: ExitOutputs, quantize: Callable[[Sequence[int]], ExitOutputs]
) -> tuple[list[int], ExitOutputs]:
    """Selects layers to keep in float32 so that no exit loses, see `_find_losses`, on some rows.

    Each layer up to the deepest exit that loses is tried alone, and ranked by the squared error
    that it leaves in the logits of the exits that lose: the metric itself moves by single rows.
    Then the first of the ranking are kept together, one more at a time. Prints what was found.

    Args:
      exact: the outputs in float32.
      quantize: the layers that stay in float32 → the outputs on the same rows in int8.

    Returns:
      (the layers, ascending; their outputs). No layer where that is enough, or where nothing is.

    """
    first = quantize(())
    losing = _find_losses(exact, first, tell=True)
    if not losing:
        return [], first
    layers = range(1, int(exact.layers[losing[-1]]) + 1)

    def error(outputs: ExitOutputs) -> float:
        return float(np.nanmean((outputs.logits - exact.logits)[:, losing] ** 2))

    ranked = sorted(layers, key=lambda layer: error(quantize([layer])))
    named = ", ".join(str(exact.layers[exit]) for exit in losing)
    told = f"exit {named} would lose more than {100 * _LOSS} points in int8"
    if _has_unit(exact):
        told = f"exit {named} would have an error more than {_GROWTH:.0%} larger in int8"
    for count in range(1, len(ranked) + 1):
        kept = sorted(ranked[:count])
        found = quantize(kept)
        if not _find_losses(exact, found):
            print(f"{told}: layer {', '.join(map(str, kept))} of {exact.layers[-1]} in float32")
            return kept, found
    print(f"{told}, whichever layers are in float32")
    return [], first


def _find_losses(exact: ExitOutputs, found: ExitOutputs, *, tell: bool = False) -> list[int]:
    """Returns the indices of the exits that lose too much, and more than chance explains.

    That is more than _LOSS of the metric, or of numbers more than _GROWTH of their mean error.

    Args:
      exact: the outputs in float32.
      found: those in int8, on the same rows.
      tell: whether a loss that chance explains is printed.

    """
    paired = compare_exits(exact, found)
    losing = []
    for exit, (before, after) in enumerate(zip(paired["float32"], paired["int8"], strict=True)):
        loses, text = _loss(exact, before, after)
        if not loses:
            continue
        lost, gained = _changed_rows(exact, found, exit, paired)
        probability = sign_test(lost, gained)
        if probability <= _CHANCE:
            losing.append(exit)
        elif tell:
            print(
                f"exit {exact.layers[exit]} {text} in int8 on {exact.labels.shape[1]} calibration "
                f"rows ({lost} lost, {gained} gained), which chance explains (p = "
                f"{probability:.2f}): no layer stays in float32 for it; --float32_layers names "
                "layers that are to"
            )
    return losing


def _has_unit(outputs: ExitOutputs) -> bool:
    """Returns whether the metric is an error in the units of targets that are numbers."""
    return outputs.objective.agrees is None and outputs.metric.is_error


def _loss(exact: ExitOutputs, before: float, after: float) -> tuple[bool, str]:
    """Returns whether a metric falls by too much from float32 to int8, and by how much in words."""
    if not _has_unit(exact):
        return before - after > _LOSS, f"loses {100 * (before - after):.1f} points"
    growth = (before - after) / max(-before, 1e-300)  # the metric is the negative of the error
    return growth > _GROWTH, f"has an error {growth:.1%} larger"


def _changed_rows(
    before: ExitOutputs, after: ExitOutputs, exit: int, paired: Mapping[str, list[Any]]
) -> tuple[int, int]:
    """Returns how many rows an exit predicts worse in int8, and how many better."""
    if "lost" in paired:
        return paired["lost"][exit], paired["gained"][exit]
    targets = before.labels[0].astype(np.float64)
    old, new = (np.abs(o.predictions[0, exit] - targets) for o in (before, after))
    return int((new > old).sum()), int((new < old).sum())


def sign_test(lost: int, gained: int) -> float:
    """Returns the probability of at least `lost` losses among as many changes, by chance alone.

    The exact one-sided test of McNemar (1947): each change is a loss with probability one half.
    """
    changes = lost + gained
    return sum(math.comb(changes, count) for count in range(lost, changes + 1)) / 2**changes


def exit_metrics(outputs: ExitOutputs) -> list[float]:
    """Returns the metric of each exit."""
    classes = outputs.logits.shape[-1]
    targets = outputs.labels[0]
    return [compute_metric(outputs.metric, p, targets, classes) for p in outputs.predictions[0]]


def compare_exits(before: ExitOutputs, after: ExitOutputs) -> dict[str, list[Any]]:
    """Compares the exits in float32 and in int8 on the same rows: a list [E] for each key.

    "float32" and "int8" are metrics; the others count rows, where predictions are right or wrong:
    "changed" those with another prediction, "lost" those that were right before alone, "gained"
    those that are right now alone.
    """
    agrees, targets = before.objective.agrees, before.labels[0]
    metrics: dict[str, list[Any]] = {"float32": exit_metrics(before), "int8": exit_metrics(after)}
    if agrees is None:
        return metrics
    counts: dict[str, list[Any]] = {"changed": [], "lost": [], "gained": []}
    for old, new in zip(before.predictions[0], after.predictions[0], strict=True):
        was, is_now = agrees(old, targets), agrees(new, targets)  # [N] each
        counts["changed"].append(int((~agrees(old, new)).sum()))
        counts["lost"].append(int((was & ~is_now).sum()))
        counts["gained"].append(int((~was & is_now).sum()))
    return metrics | counts


def _print_table(before: ExitOutputs, paired: dict[str, list[Any]]) -> None:
    """Prints what `compare_exits` found, with a warning where the metric falls by too much."""
    rows = before.labels.shape[1]
    heads = "".join(f" {name:>9}" for name in paired)
    print(f"{'exit':>6}{heads}  {before.metric.name} and rows, of {rows} validation rows")
    for layer, old, new, *counts in zip(before.layers, *paired.values(), strict=True):
        form = ">9.4g" if _has_unit(before) else ">9.4f"
        metrics = "".join(f" {value:{form}}" for value in (old, new))
        print(f"{layer:6d}{metrics}" + "".join(f" {count:9d}" for count in counts))
        loses, text = _loss(before, old, new)
        if loses:
            chance = f" (p = {sign_test(*counts[1:]):.2f} by chance)" if counts else ""
            print(
                f"warning: exit {layer} {text} in int8 on the validation rows{chance}: keep layers "
                "in float32 (--float32_layers names them), or serve this model in float32",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
