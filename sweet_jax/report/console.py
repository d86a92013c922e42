"""Formats results.json for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from sweet_jax.report.baselines import baseline_title


def exit_table(results: Mapping[str, Any]) -> str:
    """Formats the best replica's exits, the baselines, the threshold that keeps the full score, and
    the mean over seeds.
    """
    replica = results["replicas"][results["best_replica"]]
    metric, mean = results["metric"], results["mean"]
    heading: list[str] = []
    rows = "tuning" if results["n"].get("tuning") else "calibration"
    if len(results["replicas"]) > 1:
        heading.append(
            f"best of {len(results['replicas'])} replicas by area on {rows} rows: seed "
            f"{replica['seed']}, learning rate {replica['learning_rate']:g}"
        )
    lines = exit_lines(replica["individual"], metric)
    lines += baseline_lines(results.get("baselines", {}), metric)
    keep = replica["full_score"]
    if keep is not None:
        cost, value = keep["validation"]
        shown = keep.get("text", keep["threshold"])  # older runs have no text
        lines.append(
            f"threshold {shown} kept full {metric} on {results['n']['calibration']} "
            f"{fitted_rows(results)}; on {results['n']['validation']} validation rows it gives "
            f"{value:.4f} at cost {cost:.3f} (last exit {replica['individual'][-1]['score']:.4f})"
        )
    if len(mean["seeds"]) > 1:
        pairs = zip(mean["individual"], results["ci95"]["individual"], strict=True)
        each = ", ".join(f"{m['layer']}: {m['score']:.4f} ± {c['score']:.4f}" for m, c in pairs)
        lines.append(
            f"mean of {len(mean['seeds'])} seeds at learning rate {mean['learning_rate']:g}, with "
            f"95% interval: {each}"
        )
    return "\n".join(heading + lines)


def exit_lines(rows: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Formats what `individual_exits` returns, under a heading."""
    return _table("exit", [(str(row["layer"]), row) for row in rows], metric, ">")


def baseline_lines(rows: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    """Formats `baselines` of results.json, under a heading; no lines where there are none."""
    named = [(baseline_title(name), row) for name, row in rows.items()]
    return _table("baseline", named, metric, "<") if named else []


def _table(
    title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], metric: str, align: str
) -> list[str]:
    width = max(5, len(title), *(len(name) for name, _ in rows))
    lines = [f"{title:{align}{width}} {'cost':>6} {metric:>9}  95% interval         n"]
    for name, row in rows:
        low, high = row["interval"]
        lines.append(
            f"{name:{align}{width}} {row['cost']:>6.3f} {row['score']:>9.4f}  "
            f"[{low:.4f}, {high:.4f}] {row['n']:>5}"
        )
    return lines


def fitted_rows(results: Mapping[str, Any]) -> str:
    """Names the rows that temperatures and thresholds were fitted on."""
    held_out = results["fitted_on"] == "held_out"
    return "calibration rows" if held_out else "validation rows (the preset's choice)"


def describe_divergence(row: Mapping[str, Any]) -> str:
    """Describes in one line a replica's exit that collapsed or diverged."""
    since = "" if row["step"] is None else f", since step {row['step']}"
    who = (
        f"replica {row['replica']} (seed {row['seed']}, learning rate {row['learning_rate']:g}), "
        f"exit {row['exit']}"
    )
    what, _, name = row["what"].partition(" to class ")
    if what == "collapsed":
        return f"collapsed: {who} gives every row the class {name}{since}"
    return f"diverged: {who}: {row['what']}{since}"
