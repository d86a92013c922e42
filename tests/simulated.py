"""Outputs of simulated runs and readers of their pages, for tests of reports and `simulate`."""

from pathlib import Path

import numpy as np

from sweet_jax import ExitOutputs
from sweet_jax.exits.analysis import Analysis, analyse
from sweet_jax.exits.outputs import RunIdentity

NASTY = "<script>document.title='broken'</script>$x$"


def simulated_outputs(split: str, rows: int, replicas: int = 2) -> ExitOutputs:
    """Returns outputs of three exits; deeper ones are right more often, and surer if right."""
    rng = np.random.default_rng(len(split))
    labels = rng.integers(0, 2, rows)
    right = rng.random((replicas, 3, rows)) < np.asarray([0.7, 0.8, 0.9])[:, None]
    margin = np.where(right, 1, -1) * rng.exponential(np.where(right, 2.0, 0.7))
    sign = np.where(labels == 1, 1, -1)
    logits = np.stack([-margin * sign, margin * sign], axis=-1) / 2
    seeds = tuple((seed, 3e-4) for seed in range(replicas))
    identity = RunIdentity(task=NASTY, method="sweet", replicas=seeds)
    return ExitOutputs(logits, labels, [1, 2, 4], identity=identity)


def simulated_analysis() -> Analysis:
    return analyse(simulated_outputs("calibration", 200), simulated_outputs("validation", 300))


def traces(browser, chart: str) -> list[dict]:
    return browser.execute_script(f"return document.getElementById('{chart}').chart.traces")


def severe_errors(browser) -> list[dict]:
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def save_replica(analysis, replica: int, folder: Path) -> None:
    """Saves the outputs of one replica as those of a run."""
    for split in ("calibration", "validation"):
        rows = getattr(analysis, split).replica(replica)
        rows.save(folder / "exit_outputs" / f"{split}.npz")


def regression_analysis(diverged: tuple = (slice(0), slice(0))) -> Analysis:
    """Analyses a regression of two seeds and three exits; outputs are NaN at [R, E] = diverged."""
    rng = np.random.default_rng(0)
    targets = rng.normal(size=60)
    logits = targets + rng.normal(size=(2, 3, 60)) * np.asarray([1, 0.7, 0.3])[:, None]
    logits[diverged] = np.nan
    seeds = ((0, 1e-4), (1, 1e-4))
    identity = RunIdentity(objective="regression", policy="stability", replicas=seeds)
    rows = ExitOutputs(logits[..., None], targets, [1, 2, 4], identity=identity)
    return analyse(rows, rows)
