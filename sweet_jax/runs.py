"""Training from Python, and access to finished runs.

Shape letters: R replica, E exit, N examples, C classes, T thresholds.
"""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from sweet_jax.config import Config, from_mapping, warn_of_recipe
from sweet_jax.data.in_memory import write_rows
from sweet_jax.errors import UserError, short_repr
from sweet_jax.exits.analysis import Analysis, load_analysis
from sweet_jax.exits.operating_point import OperatingPoint
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import PolicyFunction, check_default_policy, policy_reference
from sweet_jax.exits.simulation import Curve, simulate
from sweet_jax.exits.targets import Target, check_targets
from sweet_jax.files import read_json
from sweet_jax.paths import expand_user, join_sources
from sweet_jax.recipe import OWN_DATA
from sweet_jax.run_directory import RUN_ROWS

if TYPE_CHECKING:
    import pandas as pd

    from sweet_jax.inference.classifier import AdaptiveClassifier


def train(
    data: Any,
    *,
    text: str | Sequence[str] = "",
    label: str = "label",
    validation: Any = None,
    workdir: str | Path,
    **config: Any,
) -> "Run":
    """Trains, evaluates, calibrates and reports on labeled texts, as `sweet-jax train` does.

    For the recommendation that the command prints at its end, call `Run.recommend`. The same call
    in the same workdir resumes an interrupted run, and returns a finished one. For a GLUE task, run
    a `Config` with `sweet_jax.pipeline.run`, as docs/reference/python.md shows.

    Args:
      data: name of a file, in any format of the command; or a pandas DataFrame, a
        `datasets.Dataset`, a PyArrow table or a dict of columns. Rows in memory are written to the
        workdir: only the text and label columns if `text` is set, otherwise all columns.
      text: name of the text column, or the two names of a pair; by default they are found.
      label: name of the label column.
      validation: rows to report on, like `data`; by default a fifth of `data` is split off.
      workdir: the directory of the run.
      **config: keys of `Config` that override those of the recipe `OWN_DATA`; `confidence` may be
        your own function, which is saved by its module and name.

    Raises UserError for invalid data, keys or workdir, or if JAX finds no device.

    """
    if not isinstance(workdir, str | os.PathLike):
        raise UserError(f"workdir must be a path; got {workdir!r}")
    folder = expand_user(str(workdir))
    made = run_config(data, folder, text=text, label=label, validation=validation, values=config)
    from sweet_jax.compilation_cache import enable_compilation_cache
    from sweet_jax.devices import check_devices
    from sweet_jax.pipeline import run  # imports JAX

    check_devices()
    enable_compilation_cache(least_seconds=1.0)
    run(made, folder)
    return Run(folder)


def run_config(
    data: Any,
    workdir: Path,
    *,
    text: str | Sequence[str],
    label: str,
    validation: Any,
    values: Mapping[str, Any],
) -> Config:
    """Returns the config of a run on some data; rows in memory are written to the workdir.

    See `train` for the arguments and errors; `values` are its `config`.
    """
    names = _names_of(text, label)
    kept = [*names, label] if names else []
    parts = {"train": data} | ({} if validation is None else {"validation": validation})
    files = [_file_of(part, name, workdir) for name, part in parts.items()]
    given = {"data_files": join_sources(files), "text_columns": _join(names), "label_column": label}
    if callable(own := values.get("confidence")):
        given["confidence"], values = policy_reference(own), {**values}
        del values["confidence"]
    config = from_mapping({**OWN_DATA, **given, **values})
    warn_of_recipe(config, OWN_DATA)
    for file, (name, part) in zip(files, parts.items(), strict=True):
        if not isinstance(part, str | Path):
            argument = "data" if name == "train" else name
            write_rows(part, kept, Path(file), workdir, argument)
    return config


def _names_of(text: Any, label: Any) -> list[str]:
    """Returns the names of the text columns; [] if they are to be found.

    Raises UserError if `text` or `label` holds no names of columns, but for example their values.
    """
    if not isinstance(label, str):
        raise UserError(f"label must be the name of the label column (str); got {_short(label)}")
    if isinstance(text, str):
        return [text] if text else []
    names = list(text) if isinstance(text, Iterable) else [text]
    if len(names) > 2 or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"text must be the name of the text column (str), or two names; got {_short(text)}"
        )
    return names


def _short(value: Any) -> str:
    return f"{type(value).__name__}: {short_repr(value, 40)}"


def _join(names: Sequence[str]) -> str:
    """Returns names in the format of the config key, those with a comma in quotes."""
    return names[0] if len(names) == 1 else ",".join(f'"{n}"' if "," in n else n for n in names)


def _file_of(data: Any, name: str, workdir: Path) -> str:
    """Returns the name of the file of some rows; rows in memory get a file in the workdir."""
    if isinstance(data, str | Path):
        return str(data)
    return str(workdir.resolve() / RUN_ROWS / f"{name}.arrow")


class Run:
    """Reads a finished run.

    Attributes:
      directory: the run directory.
      record: the contents of results.json.

    Raises UserError if the directory is not that of a finished run.

    """

    def __init__(self, directory: str | Path):
        self.directory = expand_user(str(directory))
        path = self.directory / "results.json"
        try:
            self.record: dict[str, Any] = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{str(self.directory)!r} is not a finished run: {path} cannot be read"
            ) from error

    @classmethod
    def load(cls, directory: str | Path) -> "Run":
        """Returns the run in a directory. Raises UserError if there is no finished run."""
        return cls(directory)

    @functools.cached_property
    def outputs(self) -> ExitOutputs:
        """The outputs of all exits on the validation rows, logits float32 [R, E, N, C]."""
        return self._outputs("validation")

    @functools.cached_property
    def calibration(self) -> ExitOutputs:
        """The outputs on the rows that temperatures and thresholds were fitted on."""
        return self._outputs("calibration")

    def _outputs(self, split: str) -> ExitOutputs:
        return ExitOutputs.load(self.directory / "exit_outputs" / f"{split}.npz")

    def analysis(self, policy: str | PolicyFunction | None = None) -> Analysis:
        """Returns the curves and operating points under a policy, by default the run's own."""
        return load_analysis(self.directory, policy)

    def curve(self, policy: str | PolicyFunction | None = None) -> Curve:
        """Returns the cost and metric at every threshold on the validation rows, [R, T] each."""
        if not policy:
            policy = self.outputs.identity.policy
            check_default_policy(policy, "this run")
        return simulate(self.outputs, policy, calibration=self.calibration)

    def operating_point(
        self, policy: str | PolicyFunction | None = None, **target: Unpack[Target]
    ) -> OperatingPoint:
        """Chooses the threshold for a target on calibration rows, for the saved replica.

        Raises UserError for milliseconds, which need a model's times: use `classifier` instead.
        """
        analysis = self.analysis(policy)
        return analysis.operating_point(
            analysis.best,
            target,  # type: ignore[arg-type] # mypy cannot tell a dict's keys
        )

    @property
    def results(self) -> "pd.DataFrame":
        """A table with a row for each exit of the saved replica, then one for each baseline.

        Columns: exit (the layer; missing for a baseline), baseline (its name; None for an exit),
        cost, the metric under its name, low and high (its 95% interval over rows), and n (number of
        rows). The metric is NaN if an exit diverged.
        """
        import pandas as pd

        metric = self.record["metric"]
        best = self.record["replicas"][self.record["best_replica"]]
        rows = [(row["layer"], None, row) for row in best["individual"]]
        rows += [(None, name, row) for name, row in self.record.get("baselines", {}).items()]
        return pd.DataFrame(
            {
                "exit": pd.array([layer for layer, _, _ in rows], dtype="Int64"),
                "baseline": [name for _, name, _ in rows],
                "cost": [row["cost"] for *_, row in rows],
                metric: np.asarray([row["score"] for *_, row in rows], np.float64),
                "low": np.asarray([row["interval"][0] for *_, row in rows], np.float64),
                "high": np.asarray([row["interval"][1] for *_, row in rows], np.float64),
                "n": [row["n"] for *_, row in rows],
            }
        )

    def report(self) -> Path:
        """Returns the path of the report, one HTML page that needs no network."""
        return self.directory / "report.html"

    def recommend(self, *, milliseconds: float | None = None, cost: float | None = None) -> str:
        """Times the saved model on this machine, and recommends an operating point for a budget.

        `sweet-jax train FILE --budget` prints the same at its end. The times are saved with the
        model, so that `classifier` takes milliseconds from then on, and the report is rewritten
        with them. Without a budget, the cheapest threshold that keeps the last exit's metric is
        recommended.

        Args:
          milliseconds: maximum mean time of a text of median length.
          cost: maximum mean fraction of the layers.

        Returns:
          A few lines with the metric and cost of the operating point, compared with all layers, and
          the commands to serve and predict with it.

        Raises UserError for more than one budget, or one out of range.

        """
        from sweet_jax.recommendation import recommend  # imports JAX if it is installed
        from sweet_jax.run_report import render_report

        budgets = {"milliseconds": milliseconds, "cost": cost}
        check_targets(budgets, "")
        target = {name: value for name, value in budgets.items() if value is not None}
        found = recommend(self.directory, target)
        render_report(self.directory, target)
        return found

    def classifier(self, **options: Any) -> "AdaptiveClassifier":
        """Loads the saved model; options are those of `AdaptiveClassifier.from_pretrained`.

        Pass a target (`cost=0.5`) rather than the threshold of an `OperatingPoint`.
        """
        from sweet_jax.inference.classifier import AdaptiveClassifier

        return AdaptiveClassifier.from_pretrained(self.directory / "model", **options)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})\n{self.results.to_string(index=False, na_rep='')}"

    def _repr_html_(self) -> str:
        """Returns the HTML table shown in notebooks."""
        return self.results.to_html(index=False, na_rep="")
