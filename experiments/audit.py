r"""Tests the audit of a server on real shifts, and its false alarms without a shift.

  sweet-jax train --config=configs/own.py --workdir=runs/sst2 --config.task=sst2 \
      --config.data_dir=DIR --config.train_size=4000 --config.learning_rates=1e-4
  sweet-jax train ag_news/train.parquet --test=ag_news/validation.parquet --output=runs/ag_news \
      --text=text --config.train_size=3000 --config.learning_rates=1e-4
  python -m experiments.audit --sst2=runs/sst2 --ag_news=runs/ag_news --data_dir=DIR

Requests are validation rows drawn with replacement. After 2,000 of them, they are CoLA's sentences
(from DIR/cola/{train,validation}.parquet), or one class of AG News grows to all requests. The
audited requests are tested as by `sweet-jax serve --audit`. A day has 50,000 requests, of which 2%
are audited. It writes audit.json and README.md to --output. Cost: the two runs, and 10 minutes.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.audit_simulation import (
    DAY,
    DAYS,
    REPEATS,
    SHIFT_REPEATS,
    Rows,
    agreement_delays,
    count_false_alarms,
    count_false_shifts,
    draw_agreement,
    serve_rows,
    shift_delays,
    summarize_delays,
)
from experiments.rendering import table_lines
from sweet_jax import Run
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.data.records import read_records
from sweet_jax.data.tables import Columns
from sweet_jax.errors import UserError
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.shift import (
    calibration_histograms,
    comparable_front,
    population_stability_index,
)
from sweet_jax.files import write_json, write_text
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.audit_statistics import certified_agreement
from sweet_jax.inference.classifier import AdaptiveClassifier


def compute_outputs(run: Run, name: str, workdir: Path, texts: list[str]) -> ExitOutputs:
    """Returns the outputs of all exits on other texts; stores them in WORKDIR/NAME.npz."""
    path = workdir / f"{name}.npz"
    if not path.exists():
        classifier = run.classifier(engine="onnxruntime")
        logits, _ = compute_all_exits(classifier.model, classifier.engine, texts)
        labels = logits[-1].argmax(-1)  # not used
        layers = np.asarray(classifier.layers)
        ExitOutputs(logits, labels, layers, identity=run.outputs.identity).save(path)
    return ExitOutputs.load(path)


def cola_texts(folder: Path) -> list[str]:
    """Returns up to 2,000 sentences each of CoLA's validation and training file."""
    columns = Columns(("sentence",), None)
    texts = []
    for split in ("validation", "train"):
        records = read_records(folder / "cola" / f"{split}.parquet", columns)
        texts += [record.values[0] for _, record in zip(range(2000), records, strict=False)]
    return texts


def stability(classifier: AdaptiveClassifier, rows: Rows) -> list[float]:
    """Returns the population stability index of each early exit; [] if it is unknown."""
    resolver, calibrator = classifier.model.resolver, classifier.calibrator
    front = comparable_front(resolver, classifier.policy_name, calibrator)
    return [
        population_stability_index(b.shares, b.count_in_bins(rows.reached[:, e]))
        for e, b in enumerate(calibration_histograms(front) if front else [])
    ]


def operating_points(run: Run) -> Iterator[tuple[str, AdaptiveClassifier, float]]:
    """Yields the name of an operating point, a classifier at it, and the agreement to test."""
    full = run.classifier(engine="onnxruntime")
    half = full.at(cost=0.5)
    certified = certified_agreement(half.model, half.rule, 0.95)
    assert certified is not None, "calibration rows certify some agreement"
    yield "cost=0.5", half, certified
    yield "agreement=0.9", full.at(agreement=0.9), 0.9


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns all results, as JSON values."""
    runs = {"sst2": Run.load(options.sst2), "ag_news": Run.load(options.ag_news)}
    texts = cola_texts(Path(options.data_dir))
    cola = compute_outputs(runs["sst2"], "cola", Path(options.workdir), texts)
    results: dict[str, Any] = {"shift": [], "stationary": [], "false_shifts": []}
    for task, run in runs.items():
        for name, classifier, target in operating_points(run):
            usual = serve_rows(classifier, run.outputs)
            about: dict[str, Any] = {"task": task, "operating_point": name, "target": target}
            about |= {"usual": float(usual.agrees.mean())}
            results["false_shifts"].append(about | {"rejected": count_false_shifts(usual)})
            first = name == "cost=0.5"
            for key, days in (("usual", 1), *([("target", 1), ("usual", 10)] if first else [])):
                counts = count_false_alarms(usual.agrees, about[key], days, DAYS // days)
                results["stationary"].append(about | {"held_to": key} | counts)
            shifts = {"cola": serve_rows(classifier, cola)} if task == "sst2" else {}
            if task == "ag_news":
                shifts = _rows_by_class(usual, run.outputs)
            for kind, rows in shifts.items():
                shift = _measure_shift(classifier, usual, rows, target, gradual=task == "ag_news")
                results["shift"].append(about | shift | {"shift": kind})
    return results


def _rows_by_class(rows: Rows, outputs: ExitOutputs) -> dict[str, Rows]:
    """Returns the rows of each class, by its name."""
    masks = {str(name): outputs.labels[0] == c for c, name in enumerate(outputs.identity.classes)}
    return {name: Rows(*(field[mask] for field in rows)) for name, mask in masks.items()}


def _measure_shift(
    classifier: AdaptiveClassifier, usual: Rows, shifted: Rows, target: float, *, gradual: bool
) -> dict[str, Any]:
    """Returns the effects of a shift and the delays of the alarms, with 2% and 10% audited.

    gradual: whether the shifted rows grow from none to all requests; else all requests change.
    """
    results: dict[str, Any] = {
        "shifted": float(shifted.agrees.mean()),
        "rows": len(shifted.agrees),
        "stability": stability(classifier, shifted),
        "usual_stability": stability(classifier, usual),
        "cost": [float(classifier.model.cost[rows.exits].mean()) for rows in (usual, shifted)],
    }
    for share in (0.02, 0.1):
        draw = draw_agreement(usual, shifted, share, gradual=gradual)
        delays = agreement_delays(usual, draw, target, share)
        results[f"delay_{share:g}"] = summarize_delays(delays)
    results["shift_delay"] = summarize_delays(shift_delays(usual, shifted, gradual=gradual))
    return results


_ABOUT = f"""Made by `python -m experiments.audit`, whose docstring has the commands of the two
models. Agreement with the full model is in per cent. PSI is the largest population stability index
of an early exit. At agreement=0.9 it is unknown, since the saved confidences of the calibration
rows are those of another calibrator; numbers there were computed before this was noticed, and do
not measure the shift. Delays are requests from the shift to an alarm: median [5%, 95%], and the
number of streams with an alarm, of {REPEATS} or {SHIFT_REPEATS}."""

_ABOUT_FALSE_ALARMS = f"""{DAYS} days of {DAY:,} requests, 2% audited, drawn from the validation
rows. The tested agreement is the target or, in the worst case, exactly the agreement on these rows.
The audit's test is run after every audited text; beside it is an exact binomial test at 5% every
hour."""


def render(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = ["# The audit on real shifts", "", _ABOUT, "", "## Shifts", ""]
    lines += _shift_table(results["shift"])
    lines += ["", "## False alarms", "", _ABOUT_FALSE_ALARMS, ""]
    lines += [*_false_alarm_table(results["stationary"]), ""]
    lines += [
        f"- {r['task']}, {r['operating_point']}: the shift alarm is raised by {r['rejected']} of "
        f"{DAYS} servers with 2,000 requests each and no shift."
        for r in results["false_shifts"]
    ]
    return "\n".join([*lines, ""])


def _shift_table(shifts: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for r in shifts:
        cells = [f"{100 * r[key]:.1f}" for key in ("target", "usual", "shifted")]
        pair = [r[key] for key in ("usual_stability", "stability")]
        cells.append(", ".join(f"{max(each):.2f}" if each else "unknown" for each in pair))
        cells.append("{:.2f}, {:.2f}".format(*r["cost"]))
        for name in ("delay_0.02", "delay_0.1", "shift_delay"):
            delay = r[name]
            low, median, high = ("never" if q is None else f"{q:,.0f}" for q in delay["quantiles"])
            cells.append(f"{median} [{low}, {high}]; {delay['raised']} of {delay['repeats']}")
        rows.append([r["task"], r["operating_point"], r["shift"], *cells])
    header = ["model", "operating point", "shift", "tested agreement", "agreement before", "after"]
    header += ["PSI before, after", "cost before, after", "agreement alarm at 2%", "at 10%"]
    return table_lines([*header, "shift alarm"], rows)


def _false_alarm_table(counts: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            *(r["task"], r["operating_point"], f"{100 * r[r['held_to']]:.1f}"),
            "worst case" if r["held_to"] == "usual" else "target",
            f"{r['servers']} servers, {r['days']} days each",
            *(f"{r[key]} ({r[key] / r['servers']:.1%})" for key in ("betting", "hourly")),
        ]
        for r in counts
    ]
    header = ["model", "operating point", "tested agreement", "which is", "runs"]
    return table_lines([*header, "audit", "hourly test"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    parser = ArgumentParser("experiments.audit", __doc__ or "")
    parser.add_argument("--sst2", required=True, help="folder of a run on SST-2")
    parser.add_argument("--ag_news", required=True, help="folder of a run on AG News")
    parser.add_argument("--data_dir", required=True, help="folder that contains cola/*.parquet")
    parser.add_argument(
        "--workdir", default="runs/audit", help="folder of stored outputs; default: %(default)s"
    )
    parser.add_argument(
        "--output",
        default="experiments/results/audit",
        help="folder of the results; default: %(default)s",
    )
    options = parser.parse_args(argv)
    if not Path(options.data_dir).is_dir():
        raise UserError(f"--data_dir {options.data_dir!r} is not a directory: set it to the folder")
    results = measure(options)
    write_json(Path(options.output) / "audit.json", results)
    write_text(Path(options.output) / "README.md", render(results))


if __name__ == "__main__":
    sys.exit(main())
