"""Selects the layers of an int8 model that stay in float32, so that no exit loses accuracy.

Shape letters: E exit, N rows, C classes.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs

_LOSS = 0.005  # maximum loss of an exit's metric; for a larger loss, layers stay in float32
# The same for an error in the targets' units: its maximum growth, relative to float32.
_GROWTH = 0.01
# Rounding changes the predictions of uncertain rows for better and for worse. A loss with a larger
# p-value than this does not justify a layer in float32, which takes three times as long as in int8.
_CHANCE = 0.1


def select_float32_layers(
    exact: ExitOutputs,
    quantize: Callable[[Sequence[int]], ExitOutputs],
    *,
    shared: bool = False,
) -> tuple[list[int], ExitOutputs]:
    """Selects layers to keep in float32 so that no exit loses too much, see `_find_losses`.

    Each layer up to the deepest exit that loses is kept in float32 by itself. The layers are ranked
    by the squared error that remains in the logits of the exits that lose, since the metric is too
    coarse: it changes by whole rows. Then the best layers of this ranking are kept together, one
    more at a time, until no exit loses. Prints the result.

    Args:
      exact: outputs in float32.
      quantize: function from the layers that stay in float32 to the outputs of the int8 model on
        the same rows.
      shared: whether all layers share their parameters, and so have the same precision.

    Returns:
      (layers in float32, ascending; outputs with them). There are no such layers if no exit loses
      with all layers in int8, or if exits lose whichever layers are kept.

    """
    first = quantize(())
    losing = _find_losses(exact, first, tell=True)
    if not losing:
        return [], first
    depth = int(exact.layers[-1 if shared else losing[-1]])
    groups = [[*range(1, depth + 1)]] if shared else [[layer] for layer in range(1, depth + 1)]

    def error(outputs: ExitOutputs) -> float:
        return float(np.nanmean((outputs.logits - exact.logits)[:, losing] ** 2))

    ranked = sorted(groups, key=lambda group: error(quantize(group)))
    named = ", ".join(str(exact.layers[exit]) for exit in losing)
    text = f"exit {named} would lose more than {100 * _LOSS} points in int8"
    if has_unit(exact):
        text = f"the error of exit {named} would be more than {_GROWTH:.0%} larger in int8"
    for count in range(1, len(ranked) + 1):
        layers = sorted(itertools.chain(*ranked[:count]))
        quantized = quantize(layers)
        if not _find_losses(exact, quantized):
            print(f"{text}: layer {', '.join(map(str, layers))} of {exact.layers[-1]} in float32")
            return layers, quantized
    print(f"{text}, whichever layers stay in float32")
    return [], first


def _find_losses(exact: ExitOutputs, quantized: ExitOutputs, *, tell: bool = False) -> list[int]:
    """Returns the indices of the exits that lose too much, and more than chance explains.

    Too much is more than _LOSS of the metric or, if the metric is an error in the targets' units,
    growth of the error by more than _GROWTH.

    Args:
      exact: outputs in float32.
      quantized: outputs in int8, on the same rows.
      tell: whether to print losses that chance explains.

    """
    paired = compare_exits(exact, quantized)
    losing = []
    for exit, (before, after) in enumerate(zip(paired["float32"], paired["int8"], strict=True)):
        loses, text = describe_loss(exact, before, after)
        if not loses:
            continue
        lost, gained = _changed_rows(exact, quantized, exit, paired)
        probability = sign_test(lost, gained)
        if probability <= _CHANCE:
            losing.append(exit)
        elif tell:
            print(
                f"exit {exact.layers[exit]} {text} in int8 on {exact.labels.shape[1]} calibration "
                f"rows ({lost} lost, {gained} gained), which may be due to chance (p = "
                f"{probability:.2f}): no layer stays in float32 for it; to keep layers in float32, "
                "name them with --float32_layers"
            )
    return losing


def has_unit(outputs: ExitOutputs) -> bool:
    """Returns whether the metric is a regression's error in the units of the targets."""
    return outputs.objective.agrees is None and outputs.metric.is_error


def describe_loss(exact: ExitOutputs, before: float, after: float) -> tuple[bool, str]:
    """Returns whether int8 loses too much of a metric, and a phrase that says how much."""
    if not has_unit(exact):
        return before - after > _LOSS, f"loses {100 * (before - after):.1f} points"
    growth = (before - after) / max(-before, 1e-300)  # the metric is the negative of the error
    return growth > _GROWTH, f"has an error {growth:.1%} larger"


def _changed_rows(
    before: ExitOutputs, after: ExitOutputs, exit: int, paired: Mapping[str, list[Any]]
) -> tuple[int, int]:
    """Returns the numbers of rows that an exit predicts worse and better in int8."""
    if "lost" in paired:
        return paired["lost"][exit], paired["gained"][exit]
    targets = before.labels[0].astype(np.float64)
    old, new = (np.abs(o.predictions[0, exit] - targets) for o in (before, after))
    return int((new > old).sum()), int((new < old).sum())


def sign_test(lost: int, gained: int) -> float:
    """Returns the probability of at least `lost` losses among all changes, by chance alone.

    This is the exact one-sided test of McNemar (1947): by chance, each change is a loss with
    probability 1/2.
    """
    changes = lost + gained
    return sum(math.comb(changes, count) for count in range(lost, changes + 1)) / 2**changes


def exit_metrics(outputs: ExitOutputs) -> list[float]:
    """Returns the metric of each exit."""
    classes = outputs.logits.shape[-1]
    targets = outputs.labels[0]
    return [compute_metric(outputs.metric, p, targets, classes) for p in outputs.predictions[0]]


def compare_exits(before: ExitOutputs, after: ExitOutputs) -> dict[str, list[Any]]:
    """Compares the exits in float32 and in int8 on the same rows.

    Returns:
      A list [E] for each key. "float32" and "int8" are metrics. If predictions are right or wrong,
      unlike a regression's, the other keys count rows: "changed" those whose prediction differs,
      "lost" those that are right only in float32, "gained" those that are right only in int8.

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
