r"""The audit of a server on real shifts, and its false alarms where nothing shifts.

  sweet-jax train --config=configs/own.py --workdir=runs/sst2 --config.task=sst2 \
      --config.data_dir=DIR --config.train_size=4000 --config.learning_rates=1e-4
  sweet-jax train ag_news/train.parquet --test=ag_news/validation.parquet --output=runs/ag_news \
      --text=text --config.train_size=3000 --config.learning_rates=1e-4
  python -m experiments.audit --sst2=runs/sst2 --ag_news=runs/ag_news --data_dir=DIR

DIR/cola/{train,validation}.parquet is read for the shift. Requests are redraws of the validation
rows, and after 2,000 of them of CoLA's sentences, or of AG News with one class growing; the
audited ones of them go through the test that `sweet-jax serve --audit` runs. A day has 50,000
requests, of which 2% are audited. Cost: the two runs, and 10 minutes.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.rendering import table_lines
from sweet_jax import Run
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.data.records import read_records
from sweet_jax.data.tables import Columns
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.sequential import MeanTest, ShiftTest
from sweet_jax.exits.shift import calibration_histograms, population_stability_index
from sweet_jax.files import write_json, write_text
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.audit_statistics import certified_agreement
from sweet_jax.inference.classifier import AdaptiveClassifier

_BEFORE = 2000  # requests before the shift
_AFTER = 100_000  # requests after it, at most
_DAY, _SHARE, _DAYS = 50_000, 0.02, 200
_REPEATS = 40
_LEVEL = 0.975  # of each of two tests, as the server has it
_SHIFTS = 10  # repeats of the test of a shift


class Rows(NamedTuple):
    """Holds what a deployed model does on some rows."""

    agrees: np.ndarray  # bool [N], whether the answer is the full model's
    reached: np.ndarray  # float64 [N, E], largest confidence so far
    exits: np.ndarray  # int64 [N], index of the exit taken
    answers: np.ndarray  # float64 [N], confidence at the exit taken


def serve_rows(classifier: AdaptiveClassifier, outputs: ExitOutputs) -> Rows:
    """Returns what a classifier answers, by the outputs of all exits, R = 1."""
    found = exit_confidences(outputs, classifier.policy, [classifier.calibrator])[0]  # [E, N]
    leaves = found >= classifier.threshold
    leaves[-1] = True
    exits = leaves.argmax(axis=0)
    given = outputs.predictions[0]
    rows = np.arange(len(exits))
    agrees = given[exits, rows] == given[-1]
    return Rows(agrees, np.maximum.accumulate(found, axis=0).T, exits, found[exits, rows])


def delay(test: MeanTest, values: np.ndarray) -> tuple[MeanTest, int | None]:
    """Returns the test after values [N], and after how many it rejected; None if it did not."""
    for number, value in enumerate(values, start=1):
        test = test.observe(float(value))
        if test.rejected:
            return test, number
    return test, None


def delays(
    classifier: AdaptiveClassifier, before: Rows, drawn: Any, target: float, share: float
) -> Iterator[float]:
    """Yields after how many requests of a shift the alarm came, infinity where it did not.

    drawn: (generator, count) → rows of so many requests after the shift, audited.
    """
    for seed in range(_REPEATS):
        rng = np.random.default_rng(seed)
        usual = rng.choice(before.agrees, int(_BEFORE * share))
        test, early = delay(MeanTest(target, _LEVEL), usual)
        _, late = delay(test, drawn(rng, int(_AFTER * share)))
        yield -1.0 if early else np.inf if late is None else late / share


def shift_delays(before: Rows, after: Rows, *, grows: bool) -> Iterator[float]:
    """Yields after how many requests of a shift the test of it rejected, see `delays`."""
    for seed in range(_SHIFTS):
        rng, test = np.random.default_rng(seed), ShiftTest(_LEVEL)
        count = _BEFORE + 20_000
        part = (np.arange(count) - _BEFORE) / 20_000 if grows else np.arange(count) >= _BEFORE
        shifted = rng.random(count) < part
        usual, own = (rng.choice(rows.answers, count) for rows in (before, after))
        found = np.inf
        for number, value in enumerate(np.where(shifted, own, usual)):
            test = test.observe(float(value), rng.random())
            if test.rejected:
                found = number - _BEFORE
                break
        yield found


def false_shifts(rows: Rows) -> int:
    """Counts servers of 200 whose test of a shift rejects within 2,000 requests without one."""
    rejected = 0
    for seed in range(_DAYS):
        rng, test = np.random.default_rng(seed), ShiftTest(_LEVEL)
        for value in rng.choice(rows.answers, 2000):
            test = test.observe(float(value), rng.random())
        rejected += test.rejected
    return rejected


def _quantiles(delays: np.ndarray) -> list[float | None]:
    """Returns the 5%, 50% and 95% quantiles, None for infinity."""
    found = np.quantile(delays, [0.05, 0.5, 0.95], method="higher")
    return [float(q) if np.isfinite(q) else None for q in found]


def false_alarms(agrees: np.ndarray, target: float, days: int, servers: int) -> dict[str, int]:
    """Counts servers that raise a false alarm in so many days without a restart.

    By the test of the audit, looked at after every text, and by an exact binomial test at 5% of
    the texts so far, looked at every hour.
    """
    size = int(_DAY * _SHARE)
    betting = hourly = 0
    for seed in range(servers):
        values = np.random.default_rng(seed).choice(agrees, days * size)
        betting += delay(MeanTest(target, _LEVEL), values)[1] is not None
        seen = np.arange(1, 24 * days + 1) * size // 24
        agreeing = np.cumsum(values)[seen - 1]
        hourly += bool((stats.binom.cdf(agreeing, seen, target) <= 0.05).any())
    return {"servers": servers, "days": days, "betting": betting, "hourly": hourly}


def all_outputs(run: Run, name: str, workdir: Path, texts: list[str]) -> ExitOutputs:
    """Returns the outputs of all exits on other texts; kept in the workdir."""
    path = workdir / f"{name}.npz"
    if not path.exists():
        classifier = run.classifier(engine="onnxruntime")
        logits, _ = compute_all_exits(classifier.model, classifier.engine, texts)
        labels = logits[-1].argmax(-1)  # nobody's: they are not read
        ExitOutputs(logits, labels, classifier.layers, identity=run.outputs.identity).save(path)
    return ExitOutputs.load(path)


def cola_texts(folder: Path) -> list[str]:
    """Returns the sentences of CoLA's validation file and the first 2,000 of training."""
    columns = Columns(("sentence",), None)
    found = []
    for split, count in (("validation", 2000), ("train", 2000)):
        path = folder / "cola" / f"{split}.parquet"
        found += [
            r.values[0] for _, r in zip(range(count), read_records(path, columns), strict=False)
        ]
    return found


def stability(classifier: AdaptiveClassifier, rows: Rows) -> list[float]:
    """Returns the population stability index of each early exit on some rows."""
    policy = str(classifier.policy)
    bins = calibration_histograms(classifier.model.resolver.fronts[policy])
    return [
        population_stability_index(b.shares, b.count_in_bins(rows.reached[:, e]))
        for e, b in enumerate(bins)
    ]


def operating_points(run: Run) -> Iterator[tuple[str, AdaptiveClassifier, float]]:
    """Yields the name of an operating point, the classifier at it, and the agreement to keep."""
    whole = run.classifier(engine="onnxruntime")
    half = whole.at(cost=0.5)
    certified = certified_agreement(half.model, half.rule, 0.95)
    assert certified is not None
    yield "cost=0.5", half, certified
    yield "agreement=0.9", whole.at(agreement=0.9), 0.9


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Returns all results."""
    workdir = Path(options.workdir)
    runs = {"sst2": Run.load(options.sst2), "ag_news": Run.load(options.ag_news)}
    cola = all_outputs(runs["sst2"], "cola", workdir, cola_texts(Path(options.data_dir)))
    found: dict[str, Any] = {"shift": [], "stationary": [], "false_shifts": []}
    for task, run in runs.items():
        for name, classifier, target in operating_points(run):
            usual = serve_rows(classifier, run.outputs)
            about = {"task": task, "operating_point": name, "target": target}
            about |= {"usual": float(usual.agrees.mean())}
            found["false_shifts"].append(about | {"rejected": false_shifts(usual)})
            first = name == "cost=0.5"
            for held, days in (("usual", 1), *([("target", 1), ("usual", 10)] if first else [])):
                counts = false_alarms(usual.agrees, about[held], days, _DAYS // days)
                found["stationary"].append(about | {"held_to": held} | counts)
            shifts = {"cola": serve_rows(classifier, cola)} if task == "sst2" else {}
            if task == "ag_news":
                labels = run.outputs.labels[0]
                for c, label in enumerate(run.outputs.identity.classes):
                    part = np.flatnonzero(labels == c)
                    shifts[str(label)] = Rows(*(field[part] for field in usual))
            for kind, rows in shifts.items():
                found["shift"].append(
                    about
                    | _shift(classifier, usual, rows, target, grows=task == "ag_news")
                    | {"shift": kind}
                )
    return found


def _shift(
    classifier: AdaptiveClassifier, usual: Rows, rows: Rows, target: float, *, grows: bool
) -> dict[str, Any]:
    """Returns delays until the alarm at shares of 2% and 10%, and the shift itself.

    grows: the rows' share of the requests rises over 20,000 of them, from none to all; else it is
    all at once.
    """

    def drawn(share: float):
        def draw(rng: np.random.Generator, count: int) -> np.ndarray:
            part = np.minimum(np.arange(count) / share / 20_000, 1) if grows else np.ones(count)
            others, own = rng.choice(usual.agrees, count), rng.choice(rows.agrees, count)
            return np.where(rng.random(count) < part, own, others)

        return draw

    found: dict[str, Any] = {"shifted": float(rows.agrees.mean()), "rows": len(rows.agrees)}
    found["stability"] = stability(classifier, rows)
    found["usual_stability"] = stability(classifier, usual)
    found["cost"] = [float(classifier.model.cost[r.exits].mean()) for r in (usual, rows)]
    for share in (0.02, 0.1):
        each = np.asarray(list(delays(classifier, usual, drawn(share), target, share)))
        found[f"delay_{share:g}"] = {
            "raised": int(np.isfinite(each).sum() - (each < 0).sum()),
            "before": int((each < 0).sum()),
            "repeats": len(each),
            "quantiles": _quantiles(each),
        }
    each = np.asarray(list(shift_delays(usual, rows, grows=grows)))
    found["shift_delay"] = {
        "raised": int(np.isfinite(each).sum() - (each < 0).sum()),
        "before": int((each < 0).sum()),
        "repeats": len(each),
        "quantiles": _quantiles(each),
    }
    return found


def render(found: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "# The audit on real shifts",
        "",
        "Made by `python -m experiments.audit`, whose docstring",
    ]
    lines += [
        "has the commands of the two models. Agreement with the full model in per cent; PSI is the"
    ]
    lines += [
        "largest population stability index of an early exit; delays: requests from the shift to an"
    ]
    lines += [
        f"alarm, median [5%, 95%] and how many of {_REPEATS} or {_SHIFTS} draws.",
        "",
        "## Shifts",
        "",
    ]
    rows = []
    for r in found["shift"]:
        cells = [f"{100 * r[k]:.1f}" for k in ("target", "usual", "shifted")]
        cells += [f"{max(r['usual_stability']):.2f}, {max(r['stability']):.2f}"]
        cells += ["{:.2f}, {:.2f}".format(*r["cost"])]
        for name in ("delay_0.02", "delay_0.1", "shift_delay"):
            d = r[name]
            low, middle, high = ("never" if q is None else f"{q:,.0f}" for q in d["quantiles"])
            cells.append(f"{middle} [{low}, {high}]; {d['raised']} of {d['repeats']}")
        rows.append([r["task"], r["operating_point"], r["shift"], *cells])
    head = ["model", "operating point", "shift", "held to", "agreement before", "after"]
    head += ["PSI before, after", "cost before, after", "agreement alarm at 2%", "at 10%"]
    head += ["shift alarm"]
    lines += [*table_lines(head, rows), "", "## False alarms", ""]
    lines += [
        f"{_DAYS} days of {_DAY:,} requests, 2% audited, redrawn from the validation rows. Held to"
    ]
    lines += [
        "the target, or, which is the worst case, to the very agreement of these rows. Beside the"
    ]
    lines += [
        "audit's test, looked at after every text, an exact binomial test at 5% every hour.",
        "",
    ]
    rows = [
        [
            *(r["task"], r["operating_point"], f"{100 * r[r['held_to']]:.1f}"),
            "worst case" if r["held_to"] == "usual" else "target",
            f"{r['servers']} servers, {r['days']} days each",
            *(f"{r[k]} ({r[k] / r['servers']:.1%})" for k in ("betting", "hourly")),
        ]
        for r in found["stationary"]
    ]
    head = ["model", "operating point", "held to", "which is", "runs", "audit", "hourly test"]
    lines += [*table_lines(head, rows), ""]
    for r in found["false_shifts"]:
        lines += [
            f"- {r['task']}, {r['operating_point']}: the test of a shift rejects on "
            f"{r['rejected']} of {_DAYS} servers with 2,000 requests each and no shift."
        ]
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = ArgumentParser("experiments.audit", __doc__ or "")
    parser.add_argument("--sst2", required=True, help="directory of a run on SST-2")
    parser.add_argument("--ag_news", required=True, help="directory of a run on AG News")
    parser.add_argument("--data_dir", required=True, help="directory of cola/*.parquet")
    parser.add_argument("--workdir", default="runs/audit", help="where outputs are kept")
    parser.add_argument("--output", default="experiments/results/audit", help="for the results")

    def run() -> None:
        options = parser.parse_args(argv)
        found = study(options)
        write_json(Path(options.output) / "audit.json", found)
        write_text(Path(options.output) / "README.md", render(found))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
