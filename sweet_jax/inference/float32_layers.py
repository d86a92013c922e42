"""Selects the layers of an int8 model that stay in float32: those without which an exit loses.

Shape letters: E exit, N rows, C classes.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs

_LOSS = 0.005  # of an exit's metric, above which layers stay in float32
_GROWTH = 0.01  # of an exit's error in the targets' units, as a share of the error in float32
# Rounding turns predictions of uncertain rows both ways. A loss that this probability leaves to
# chance does not pay for a layer in float32, which takes three times as long as one in int8.
_CHANCE = 0.1


def select_float32_layers(
    exact: ExitOutputs,
    quantize: Callable[[Sequence[int]], ExitOutputs],
    *,
    shared: bool = False,
) -> tuple[list[int], ExitOutputs]:
    """Selects layers to keep in float32 so that no exit loses, see `_find_losses`, on some rows.

    Each layer up to the deepest exit that loses is tried alone, and ranked by the squared error
    that it leaves in the logits of the exits that lose: the metric itself moves by single rows.
    Then the first of the ranking are kept together, one more at a time. Prints what was found.

    Args:
      exact: the outputs in float32.
      quantize: the layers that stay in float32 → the outputs on the same rows in int8.
      shared: whether all layers share their parameters, and so are in one precision.

    Returns:
      (the layers, ascending; their outputs). No layer where that is enough, or where nothing is.

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
    told = f"exit {named} would lose more than {100 * _LOSS} points in int8"
    if has_unit(exact):
        told = f"exit {named} would have an error more than {_GROWTH:.0%} larger in int8"
    for count in range(1, len(ranked) + 1):
        kept = sorted(itertools.chain(*ranked[:count]))
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
        loses, text = describe_loss(exact, before, after)
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


def has_unit(outputs: ExitOutputs) -> bool:
    """Returns whether the metric is an error in the units of targets that are numbers."""
    return outputs.objective.agrees is None and outputs.metric.is_error


def describe_loss(exact: ExitOutputs, before: float, after: float) -> tuple[bool, str]:
    """Returns whether a metric falls by too much from float32 to int8, and by how much in words."""
    if not has_unit(exact):
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
