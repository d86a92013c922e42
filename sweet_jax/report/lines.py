"""What is printed of results.json, as lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any


def exit_table(results: Mapping[str, Any]) -> str:
    """The table of exits of the best replica as text, the last line the cost of full score."""
    replica = results["replicas"][results["best_replica"]]
    metric, mean = results["metric"], results["mean"]
    heading: list[str] = []
    if len(results["replicas"]) > 1:
        heading.append(
            f"best of {len(results['replicas'])} replicas by area on calibration rows: seed "
            f"{replica['seed']}, learning rate {replica['learning_rate']:g}"
        )
    lines = exit_lines(replica["individual"], metric)
    keep = replica["full_score"]
    if keep is not None:
        cost, value = keep["validation"]
        lines.append(
            f"threshold {keep['threshold']!r} kept full {metric} on {results['n']['calibration']} "
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
    """What `individual` gives, as lines of text under a heading."""
    lines = [f"{'exit':>5} {'cost':>6} {metric:>9}  95% interval         n"]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"{row['layer']:>5} {row['cost']:>6.3f} {row['score']:>9.4f}  "
            f"[{low:.4f}, {high:.4f}] {row['n']:>5}"
        )
    return lines


def fitted_rows(results: Mapping[str, Any]) -> str:
    """What to call the rows that temperatures and thresholds were fitted on."""
    held_out = results["fitted_on"] == "held_out"
    return "calibration rows" if held_out else "validation rows (the preset's choice)"


def describe_divergence(row: Mapping[str, Any]) -> str:
    """One line for one replica and exit that diverged."""
    since = "" if row["step"] is None else f", since step {row['step']}"
    return (
        f"diverged: replica {row['replica']} (seed {row['seed']}, learning rate "
        f"{row['learning_rate']:g}), exit {row['exit']}: {row['what']}{since}"
    )
