"""Rows of scores.csv for the studies that store a record for each variant of each cell.

The columns are those of experiments.records. `exit` is empty for a baseline that reads no layer,
and `diverged` is "not recorded": these records do not hold the failures of a run.

Shape letters: S seed, E exit.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class StoredRecord(Protocol):
    """Describes a record, see experiments.panel_records and experiments.recipe_results.

    Its scores have `exits` float64 [S, E], of S seeds or of one, and `area` of the same seeds.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def n(self) -> Mapping[str, int]: ...
    @property
    def scores(self) -> Mapping[str, Any]: ...
    @property
    def about(self) -> Mapping[str, Any]: ...


def score_rows(study: str, task: str, variant: str, record: StoredRecord) -> list[dict[str, Any]]:
    """Returns the rows of a record: one for each kind of scores, seed and exit.

    variant: name of the variant; "baselines" for scores that are named by their baseline.
    """
    rows, config = [], record.config
    search = record.about.get("search") or {}
    rates = config["learning_rates"]
    chosen = search.get("learning_rate") or (rates[0] if len(rates) == 1 else "")
    for kind, scores in record.scores.items():
        layers = _layers(variant, kind, config["exits"], scores.exits.shape[1])
        for s, seed in enumerate(config["seeds"]):
            for e, layer in enumerate(layers):
                row = {
                    "study": study,
                    "task": task,
                    "method": kind if variant == "baselines" else config["method"],
                    "setting": f"{variant} {kind}",
                    "train_size": config["train_size"],
                    "learning_rate": "" if variant == "baselines" else chosen,
                    "seed": seed,
                    "exit": layer,
                    "metric": record.about.get("metric", "accuracy"),
                    "value": f"{scores.exits[s % len(scores.exits), e]:.6f}",
                    "n": record.n["validation"],
                    "area": f"{scores.area[s % len(scores.area)]:.6f}",
                    "diverged": "" if variant == "baselines" else "not recorded",
                }
                rows.append(row)
    return rows


def _layers(variant: str, kind: str, exits: Sequence[int], count: int) -> list[int | str]:
    """Returns the layers of a kind of scores; a baseline's is the number that ends its name."""
    if variant != "baselines":
        return list(exits[-count:])
    number = kind.rpartition("_")[2]
    return [int(number) if number.isdigit() else ""]
