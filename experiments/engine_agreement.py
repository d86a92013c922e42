"""Agreement of the inference engines of trained models: float32 to 1e-4, int8's loss, its promises.

    sweet-jax quantize --run=runs/sst2 && sweet-jax quantize --run=runs/quickstart
    python -m experiments.engine_agreement --run=runs/sst2 --run=runs/quickstart [--data_dir=DIR]

Of each run: (1) jax and onnxruntime in float32 on the validation texts and as many training texts
as make 2,000: the largest difference of a probability at any exit, and the exits taken by the
run's policy at the thresholds whose mean cost over these texts is nearest to 0.25, 0.5 and 0.75,
where texts that exit elsewhere are listed with how far the confidence is from the threshold; (2)
the metric of every exit in int8 beside float32 on the validation rows, with the rows that changed;
(3) the certified risk with the answers of int8: the validation rows stand for all texts there are,
calibration rows are drawn from them with replacement 1,000 times, a threshold is fitted and
certified on each draw as after training, and the share of draws is counted whose threshold harms
more of the validation rows than its limit. A draw that certifies nothing breaks no promise.

Expected: differences at most 1e-4, other exits only where a confidence is within 1e-4 of the
threshold, no exit more than 0.5 points lower in int8, and a share of broken promises of at most
1 - level (0.05). Exit status 1 where one of them does not hold. Writes a JSON file with --output.
Cost: a MiniLM takes some 5 minutes on one core.

Shape letters: E exit, N texts, C classes.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import fit_calibrators
from sweet_jax.exits.certificates import candidate_thresholds, certify, count_losses, exit_losses
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.simulation import exact_curve
from sweet_jax.files import read_json, write_json
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import INT8_FILE, open_model
from sweet_jax.inference.engine import load_engine
from sweet_jax.objectives.objective import softmax
from sweet_jax.preparation import prepare
from sweet_jax.quantize import quantized_outputs
from sweet_jax.saved_config import read_saved_config

TEXTS, TOLERANCE, LOSS = 2000, 1e-4, 0.005
COSTS = (0.25, 0.5, 0.75)
LIMITS, LEVEL = (0.01, 0.02, 0.05), 0.95


def compare_float32(folder: Path, texts: list[Any]) -> dict[str, Any]:
    """Compares jax with onnxruntime: probabilities at all exits, and exits taken."""
    model = open_model(folder)
    temperatures = model.resolver.calibrator.temperatures
    scale = np.where(np.isfinite(temperatures), temperatures, 1)[:, None, None]
    found: dict[str, Any] = {}
    thresholds: list[float] = []
    for name in ("jax", "onnxruntime"):
        every = AdaptiveClassifier(model, engine=load_engine(name, model))
        logits, scores = compute_all_exits(model, every.engine, texts)  # [E, N, C]
        learned = None if scores is None else scores[None]
        labels = np.zeros(len(texts), int)  # not read
        outputs = ExitOutputs(logits[None], labels, model.layers, model.cost, learned)
        confidences = exit_confidences(outputs, model.policy, [every.calibrator])[0]  # [E, N]
        thresholds = thresholds or _thresholds(outputs, confidences)
        taken = [every.at(threshold=each).predict(texts).exits for each in thresholds]  # [N] each
        found[name] = (softmax(logits / scale), confidences, taken)
    (first, near, ours), (second, _, theirs) = found["jax"], found["onnxruntime"]
    others, ties = [], 0
    for cost, threshold, exits, other in zip(COSTS, thresholds, ours, theirs, strict=True):
        for row in np.flatnonzero(exits != other).tolist():
            at = model.layers.index(min(int(exits[row]), int(other[row])))
            distance = abs(float(near[at, row]) - threshold)
            ties += distance <= TOLERANCE
            listed = {"cost": cost, "text": row, "jax": int(exits[row])}
            others.append(listed | {"onnxruntime": int(other[row]), "from_threshold": distance})
    return {
        "texts": len(texts),
        "largest_difference": float(np.abs(first - second).max()),
        "exits": [[int((each == layer).sum()) for layer in model.layers] for each in ours],
        "other_exits": others,
        "ties": ties,
    }


def _thresholds(outputs: ExitOutputs, confidences: np.ndarray) -> list[float]:
    """Returns the thresholds whose mean costs are nearest to COSTS; each is a text's confidence."""
    curve = exact_curve(outputs, confidences[None])
    places = [int(np.abs(curve.cost[0] - cost).argmin()) for cost in COSTS]
    return [float(curve.threshold[0, place]) for place in places]


def count_broken(outputs: ExitOutputs, policy: str, draws: int, size: int) -> list[dict[str, Any]]:
    """Counts the draws of `size` rows whose certified threshold harms more than its limit.

    Args:
      outputs: of all texts there are, R = 1.
      policy: name of an exit policy.
      draws: how many.
      size: calibration rows of each, of which one half fits and the other is tested.

    Returns:
      of each of LIMITS: how many draws certified a threshold, and how many of these broke it.

    """
    rng, rows = np.random.default_rng(0), outputs.labels.shape[1]
    counts = np.zeros((len(LIMITS), 2), int)
    harmful = exit_losses(outputs, 0, "risk")  # [E, N]
    for _ in range(draws):
        drawn = rng.integers(0, rows, size)
        fitting, tested = (outputs.rows(half) for half in np.array_split(drawn, 2))
        calibrators = fit_calibrators(fitting)
        pair = [exit_confidences(each, policy, calibrators)[0] for each in (fitting, tested)]
        losses = count_losses(tested, 0, pair[1], candidate_thresholds(pair[0]), "risk")
        points = exit_confidences(outputs, policy, calibrators)[0]  # [E, N]
        for place, limit in enumerate(LIMITS):
            threshold = certify(losses, limit, LEVEL).threshold
            if threshold is not None:
                leaves = points >= threshold
                leaves[-1] = True
                harmed = np.take_along_axis(harmful, leaves.argmax(axis=0)[None], axis=0)
                counts[place] += 1, harmed.mean() > limit
    return [
        {"limit": limit, "certified": int(certified), "broken": int(broken) / draws}
        for limit, (certified, broken) in zip(LIMITS, counts, strict=True)
    ]


def examine(folder: Path, data_dir: str | None, draws: int) -> dict[str, Any]:
    """Returns what is compared of one run. Raises UserError for a run without int8.json."""
    if not (folder / "model" / INT8_FILE).exists():
        raise UserError(f"{str(folder)!r} has no {INT8_FILE}: run sweet-jax quantize first")
    config, _ = read_saved_config(folder)
    job = prepare(dataclasses.replace(config, data_dir=data_dir or config.data_dir))
    shown = [text[0] if len(text) == 1 else text for text in job.dataset.validation.texts]
    others = [text[0] if len(text) == 1 else text for text in job.texts]
    texts = [*shown, *others][:TEXTS]
    found: dict[str, Any] = {"float32": compare_float32(folder / "model", texts)}
    written = read_json(folder / "model" / INT8_FILE)
    names = ("float32", "int8", "changed", "lost", "gained", "float32_layers")
    found["int8"] = {name: written[name] for name in names}
    model = open_model(folder / "model", "int8")
    saved = ExitOutputs.load(folder / "exit_outputs" / "validation.npz").replica(0)
    rows = job.dataset.validation.texts
    quantized = quantized_outputs(model, load_engine("onnxruntime", model, "int8"), rows, saved)
    size = ExitOutputs.load(folder / "exit_outputs" / "calibration.npz").labels.shape[1]
    broken = count_broken(quantized, model.policy, draws, size)
    found["risk"] = {"draws": draws, "rows": size, "level": LEVEL, "limits": broken}
    return found


def report(name: str, found: dict[str, Any]) -> bool:
    """Prints what was found of a run; returns whether all holds."""
    float32, int8, risk = found["float32"], found["int8"], found["risk"]
    largest, others = float32["largest_difference"], float32["other_exits"]
    print(f"{name}: float32 on {float32['texts']} texts: probabilities differ by {largest:.1e}")
    print(f"  other exits: {len(others)} of {len(COSTS)} x {float32['texts']}, ties", end=" ")
    print(f"within {TOLERANCE}: {float32['ties']}")
    print(f"  that exit at each layer: {', '.join(map(str, float32['exits']))}")
    for other in others:
        print(f"    {other}")
    for key, values in int8.items():
        print(f"  {key:>14}: {' '.join(f'{value:.4g}' for value in values)}")
    for each in risk["limits"]:
        print(
            f"  risk {each['limit']}: certified in {each['certified']} of {risk['draws']} draws, "
            f"broken in {each['broken']:.3f}, promised at most {1 - risk['level']:.3f}"
        )
    metrics = (int8["float32"], int8["int8"])
    lowest = min(after - before for before, after in zip(*metrics, strict=True))
    worst = max(each["broken"] for each in risk["limits"])
    holds = largest <= TOLERANCE and float32["ties"] == len(others)
    return holds and lowest >= -LOSS and worst <= 1 - risk["level"]


def main() -> int:
    """Prints what was found of each run; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="append", required=True, help="directory of a run; repeats")
    parser.add_argument("--data_dir", help="where its data set lies now, if it was moved")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    found = {
        Path(run).name: examine(Path(run), options.data_dir, options.draws) for run in options.run
    }
    if options.output:
        write_json(options.output, found)
    held = [report(name, values) for name, values in found.items()]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
