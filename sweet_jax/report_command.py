"""Writes the report of a finished run anew, for a target, with the times measured since.

  sweet-jax report runs/quickstart                  report.html, with the recommended threshold
  sweet-jax report runs/quickstart --cost=0.5       the best metric within half of the layers
  sweet-jax report runs/quickstart --milliseconds=5 by the times that predict --measure found
  sweet-jax report runs/quickstart --png            report.png too: a picture of the first screen

Nothing is computed by the model. The report quotes texts only if the data files are unchanged. The
picture is taken by Chromium where there is one, and drawn by matplotlib elsewhere. Exit status: 0
done, 2 the input is wrong, 1 anything else.

"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import Config, UserError
from sweet_jax.data.batches import longer_than
from sweet_jax.data.load import load_dataset
from sweet_jax.exits.analysis import load_analysis
from sweet_jax.exits.targets import check_targets
from sweet_jax.files import expand_user, read_json
from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.engine_choice import tables_of_this_machine, typical_milliseconds
from sweet_jax.inference.latency_table import LatencyTable
from sweet_jax.recommendation import padded_token_counts
from sweet_jax.report.baselines import load_baselines
from sweet_jax.report.details import ExitTimes, ReportDetails, describe_split, report_title
from sweet_jax.report.page import write_report
from sweet_jax.saved_config import read_saved_config

log = logging.getLogger(__name__)

_TARGETS = {
    "cost": "largest mean cost, a share of the full model's layers",
    "accuracy": "smallest metric on calibration rows",
    "error": "largest error on calibration rows, where the run's metric is one",
    "milliseconds": "largest mean time of one text by itself, in the model alone, by the times "
    "that predict --measure or train FILE kept on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.report", __doc__ or "")
    parser.add_argument("run", metavar="DIR", help="directory of a finished run")
    target = parser.add_mutually_exclusive_group()
    for name, text in _TARGETS.items():
        target.add_argument(f"--{name}", type=float, help=text)
    parser.add_argument("--png", action="store_true", help="also report.png, of the first screen")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    values = {name: getattr(options, name) for name in _TARGETS}
    check_targets(values, "--")
    run, target = expand_user(options.run), {k: v for k, v in values.items() if v is not None}
    render_report(run, target, picture=options.png)
    print(f"report: {run / 'report.html'}")
    if options.png:
        print(f"first screen: {run / 'report.png'}")


def render_report(run: Path, target: Mapping[str, float], *, picture: bool = False) -> None:
    """Writes report.html of a finished run anew.

    Args:
      run: its directory.
      target: of the operating point that is recommended, see `ReportDetails`.
      picture: also write report.png, of the first screen.

    Raises UserError where there is no finished run, or a target that cannot be looked up.

    """
    from sweet_jax.training.initialization import model_specs  # imports JAX
    from sweet_jax.training.metrics import read_metrics

    analysis = load_analysis(run)
    config, digest = read_saved_config(run, any_version=True)
    try:
        results = read_json(run / "results.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{str(run)!r} is not a finished run: {error}") from error
    details = _read_details(run, config, digest, target)
    trained = {model.name: model.exits for model in model_specs(config)}
    page = run / "report.html"
    write_report(page, analysis, results, read_metrics(run), trained, details)
    if picture:
        from sweet_jax.report.first_screen import draw_first_screen, photograph_page

        if not photograph_page(page, page.with_suffix(".png")):
            draw_first_screen(page.with_suffix(".png"), analysis, results, details)


def _read_details(
    run: Path, config: Config, digest: str, target: Mapping[str, float]
) -> ReportDetails:
    """Reads what the report shows beside the outputs, as far as it is there.

    Raises UserError for a damaged file, and for milliseconds where no times are known.
    """
    model, baselines = open_model(run / "model"), run / "exit_outputs" / "baselines.npz"
    times, texts = None, _read_texts(config, digest)
    tables = tables_of_this_machine(model, "float32").values()
    if tables:  # of the faster engine
        table = min(tables, key=lambda table: typical_milliseconds(table, model))
        times = _exit_times(model, table, texts)
    elif "milliseconds" in target:
        raise UserError(
            f"--milliseconds needs times of this machine: sweet-jax predict --model={model.folder} "
            "--measure finds them"
        )
    return ReportDetails(
        title=report_title(config),
        texts=texts if config.report_texts else None,
        times=times,
        baselines=load_baselines(baselines) if baselines.exists() else (),
        cut=None if texts is None else longer_than(model.tokenizer, texts, config.max_length),
        max_length=config.max_length,
        target=target,
        split=describe_split(config),
    )


def _exit_times(
    model: ModelArtifact, table: LatencyTable, texts: Sequence[tuple[str, ...]] | None
) -> ExitTimes:
    """Returns the times of a text of the median length, of a long one, and of each one there is."""
    tokens = next((n for n in table.lengths if n >= model.median_tokens), table.lengths[-1])
    slow = None
    if tokens < model.long_tokens <= table.lengths[-1]:
        slow = float(table.until_exit(model.long_tokens)[-1])
    times = table.until_exit(model.median_tokens)
    each = None
    if texts is not None and (model.long_tokens or len(table.lengths) > 1):
        each = table.interpolate_until_exit(padded_token_counts(model, texts))
    return ExitTimes(times, tokens, table.machine, slow, model.long_tokens, each)


def _read_texts(config: Config, digest: str) -> Sequence[tuple[str, ...]] | None:
    """Returns the validation texts; None where the data are not those that the run was made on."""
    try:
        dataset = load_dataset(config)
    except UserError as error:
        log.warning("the report has no texts: %s", error)
        return None
    if dataset.digest() != digest:
        log.warning("the report has no texts: the data are not those of the run any more")
        return None
    return dataset.validation.texts


if __name__ == "__main__":
    sys.exit(main())
