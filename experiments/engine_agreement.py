"""Checks trained models on the inference engines: agreement in float32, int8's loss, certificates.

    sweet-jax quantize --run=runs/sst2 && sweet-jax quantize --run=runs/quickstart
    python -m experiments.engine_agreement --run=runs/sst2 --run=runs/quickstart [--data_dir=DIR]

For each run:

1. It compares jax with onnxruntime in float32 on the validation texts and enough training texts to
   make 2,000: the largest difference of a probability at any exit, and the exits that texts take
   under the run's policy, at the thresholds whose mean costs over these texts are nearest to 0.25,
   0.5 and 0.75. It lists the texts that take different exits, with the distance of their confidence
   from the threshold.
2. It compares the metric of every exit in int8 and float32 on the validation rows, and counts the
   rows whose class changed.
3. It tests the certified risk with int8. The validation rows are the population, from which
   calibration rows are drawn with replacement 1,000 times. For each draw, a threshold is fitted and
   certified as after training; the certificate is broken if the threshold harms a larger fraction
   of the validation rows than its limit. A draw that certifies nothing breaks no certificate.

Expected: differences of at most 1e-4, different exits only if a confidence is within 1e-4 of the
threshold, no exit more than 0.5 points lower in int8, and certificates broken in at most a fraction
1 - level (0.05) of the draws. The exit status is 1 if one of these does not hold. With --output, it
writes a JSON file. Cost: for MiniLM, about 5 minutes on one core.

Shape letters: E exit, N texts, C classes.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.arguments import ArgumentParser, run_command
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

TEXTS, TOLERANCE, MAX_LOSS = 2000, 1e-4, 0.005
COSTS = (0.25, 0.5, 0.75)
LIMITS, LEVEL = (0.01, 0.02, 0.05), 0.95


def compare_float32(folder: Path, texts: list[Any]) -> dict[str, Any]:
    """Compares the probabilities at all exits, and the exits taken, of jax and onnxruntime."""
    model = open_model(folder)
    temperatures = model.resolver.calibrator.temperatures
    scale = np.where(np.isfinite(temperatures), temperatures, 1)[:, None, None]
    by_engine: dict[str, Any] = {}
    thresholds: list[float] = []
    for name in ("jax", "onnxruntime"):
        classifier = AdaptiveClassifier(model, engine=load_engine(name, model))
        logits, scores = compute_all_exits(model, classifier.engine, texts)  # [E, N, C]
        learned = None if scores is None else scores[None]
        labels = np.zeros(len(texts), int)  # not used
        layers = np.asarray(model.layers)
        outputs = ExitOutputs(logits[None], labels, layers, model.cost, learned)
        confidences = exit_confidences(outputs, model.policy, [classifier.calibrator])[0]  # [E, N]
        thresholds = thresholds or _thresholds(outputs, confidences)
        taken = [classifier.at(threshold=t).predict(texts).exits for t in thresholds]  # [N] each
        by_engine[name] = (softmax(logits / scale), confidences, taken)
    probabilities, confidences, exits = by_engine["jax"]
    onnx_probabilities, _, onnx_exits = by_engine["onnxruntime"]
    differing, ties = [], 0
    for cost, threshold, ours, theirs in zip(COSTS, thresholds, exits, onnx_exits, strict=True):
        for row in np.flatnonzero(ours != theirs).tolist():
            exit_index = model.layers.index(min(int(ours[row]), int(theirs[row])))
            distance = abs(float(confidences[exit_index, row]) - threshold)
            ties += distance <= TOLERANCE
            text = {"cost": cost, "text": row, "jax": int(ours[row])}
            differing.append(text | {"onnxruntime": int(theirs[row]), "from_threshold": distance})
    return {
        "texts": len(texts),
        "largest_difference": float(np.abs(probabilities - onnx_probabilities).max()),
        "exits": [[int((each == layer).sum()) for layer in model.layers] for each in exits],
        "other_exits": differing,
        "ties": ties,
    }


def _thresholds(outputs: ExitOutputs, confidences: np.ndarray) -> list[float]:
    """Returns the confidences of texts whose mean costs as thresholds are nearest to COSTS."""
    curve = exact_curve(outputs, confidences[None])
    places = [int(np.abs(curve.cost[0] - cost).argmin()) for cost in COSTS]
    return [float(curve.threshold[0, place]) for place in places]


def count_broken(outputs: ExitOutputs, policy: str, draws: int, size: int) -> list[dict[str, Any]]:
    """Counts the draws whose certified threshold harms more rows than its limit.

    Args:
      outputs: outputs on the population, R = 1.
      policy: name of an exit policy.
      draws: number of draws.
      size: calibration rows of a draw; one half fits the threshold, the other certifies it.

    Returns:
      For each of LIMITS, the number of draws that certify a threshold, and the fraction of all
      draws whose certificate is broken.

    """
    rng, rows = np.random.default_rng(0), outputs.labels.shape[1]
    counts = np.zeros((len(LIMITS), 2), int)
    harmful = exit_losses(outputs, 0, "risk")  # [E, N]
    for _ in range(draws):
        drawn = rng.integers(0, rows, size)
        fitting, tested = (outputs.rows(half) for half in np.array_split(drawn, 2))
        calibrators = fit_calibrators(fitting)
        fitted, held_out, confidences = (
            exit_confidences(each, policy, calibrators)[0] for each in (fitting, tested, outputs)
        )  # [E, N] each
        losses = count_losses(tested, 0, held_out, candidate_thresholds(fitted), "risk")
        for place, limit in enumerate(LIMITS):
            threshold = certify(losses, limit, LEVEL).threshold
            if threshold is not None:
                leaves = confidences >= threshold
                leaves[-1] = True
                harmed = np.take_along_axis(harmful, leaves.argmax(axis=0)[None], axis=0)
                counts[place] += 1, harmed.mean() > limit
    return [
        {"limit": limit, "certified": int(certified), "broken": int(broken) / draws}
        for limit, (certified, broken) in zip(LIMITS, counts, strict=True)
    ]


def check_run(folder: Path, data_dir: str | None, draws: int) -> dict[str, Any]:
    """Returns the results of a run, by check. Raises UserError if it has no int8.json."""
    if not (folder / "model" / INT8_FILE).exists():
        raise UserError(f"{str(folder)!r} has no {INT8_FILE}: run sweet-jax quantize first")
    config, _ = read_saved_config(folder)
    job = prepare(dataclasses.replace(config, data_dir=data_dir or config.data_dir))
    rows = [*job.dataset.validation.texts, *job.texts][:TEXTS]
    texts = [row[0] if len(row) == 1 else row for row in rows]
    results: dict[str, Any] = {"float32": compare_float32(folder / "model", texts)}
    recorded = read_json(folder / "model" / INT8_FILE)
    names = ("float32", "int8", "changed", "lost", "gained", "float32_layers")
    results["int8"] = {name: recorded[name] for name in names}
    model = open_model(folder / "model", "int8")
    saved = ExitOutputs.load(folder / "exit_outputs" / "validation.npz").replica(0)
    engine = load_engine("onnxruntime", model, "int8")
    quantized = quantized_outputs(model, engine, job.dataset.validation.texts, saved)
    size = ExitOutputs.load(folder / "exit_outputs" / "calibration.npz").labels.shape[1]
    broken = count_broken(quantized, model.policy, draws, size)
    results["risk"] = {"draws": draws, "rows": size, "level": LEVEL, "limits": broken}
    return results


def report(name: str, results: dict[str, Any]) -> bool:
    """Prints the results of a run; returns whether all checks passed."""
    float32, int8, risk = results["float32"], results["int8"], results["risk"]
    largest, differing = float32["largest_difference"], float32["other_exits"]
    print(f"{name}: float32 on {float32['texts']} texts: probabilities differ by {largest:.1e}")
    print(
        f"  different exits: {len(differing)} of {len(COSTS)} x {float32['texts']}, of which "
        f"{float32['ties']} are within {TOLERANCE} of the threshold"
    )
    print(f"  texts that leave at each layer: {', '.join(map(str, float32['exits']))}")
    for text in differing:
        print(f"    {text}")
    for key, values in int8.items():
        print(f"  {key:>14}: {' '.join(f'{value:.4g}' for value in values)}")
    for each in risk["limits"]:
        print(
            f"  risk {each['limit']}: certified in {each['certified']} of {risk['draws']} draws, "
            f"broken in {each['broken']:.3f}, at most {1 - risk['level']:.3f} allowed"
        )
    metrics = (int8["float32"], int8["int8"])
    lowest = min(after - before for before, after in zip(*metrics, strict=True))
    worst = max(each["broken"] for each in risk["limits"])
    agrees = largest <= TOLERANCE and float32["ties"] == len(differing)
    return agrees and lowest >= -MAX_LOSS and worst <= 1 - risk["level"]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the results of each run; returns the exit status."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser("experiments.engine_agreement", __doc__ or "")
    parser.add_argument(
        "--run", action="append", required=True, help="folder of a run; may be repeated"
    )
    parser.add_argument("--data_dir", help="folder of its data set, if it was moved")
    parser.add_argument(
        "--draws", type=int, default=1000, help="draws of calibration rows; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    if options.draws < 1:
        raise UserError(f"--draws must be 1 or more; got {options.draws}")
    results = {
        Path(run).name: check_run(Path(run), options.data_dir, options.draws) for run in options.run
    }
    if options.output:
        write_json(options.output, results)
    passed = [report(name, values) for name, values in results.items()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
