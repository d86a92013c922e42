"""Rewrites the report of a finished run from the files in its directory."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweet_jax.config import Config
from sweet_jax.data.batches import longer_than
from sweet_jax.data.load import load_dataset
from sweet_jax.errors import AbsentFileError, UserError
from sweet_jax.exits.analysis import load_analysis
from sweet_jax.files import read_json
from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.engine_choice import tables_of_this_machine, typical_milliseconds
from sweet_jax.inference.latency_table import LatencyTable
from sweet_jax.recommendation import padded_token_counts
from sweet_jax.report.baselines import load_baselines
from sweet_jax.report.details import ExitTimes, ReportDetails, describe_split, report_title
from sweet_jax.report.page import write_report
from sweet_jax.saved_config import SAME_FOLDER, read_saved_config

log = logging.getLogger(__name__)


def render_report(run: Path, target: Mapping[str, float], *, picture: bool = False) -> None:
    """Rewrites report.html of a finished run.

    Args:
      run: the run directory.
      target: target of the operating point that is recommended, see `ReportDetails`.
      picture: whether to write report.png, a picture of the first screen; an old one is removed.

    Raises UserError if there is no finished run, or if the target needs times that are not known.

    """
    from sweet_jax.training.initialization import model_specs  # imports JAX
    from sweet_jax.training.metrics import read_metrics

    analysis = load_analysis(run)
    config, digest = read_saved_config(run, any_version=True)
    try:
        results = read_json(run / "results.json")
    except OSError as error:
        raise UserError(f"{str(run)!r} is not a finished run: {error}") from error
    except ValueError as error:
        raise UserError(
            f"{str(run / 'results.json')!r} is damaged ({error}): restore it, or train again in "
            "another directory"
        ) from error
    details = _read_details(run, config, digest, target)
    trained = {model.name: model.exits for model in model_specs(config)}
    page = run / "report.html"
    write_report(page, analysis, results, read_metrics(run), trained, details)
    page.with_suffix(".png").unlink(missing_ok=True)  # it shows the former report
    if picture:
        from sweet_jax.report.first_screen import draw_first_screen, photograph_page

        if not photograph_page(page, page.with_suffix(".png")):
            draw_first_screen(page.with_suffix(".png"), analysis, results, details)


def _read_details(
    run: Path, config: Config, digest: str, target: Mapping[str, float]
) -> ReportDetails:
    """Reads what the report shows in addition to the outputs, as far as it is available.

    Raises UserError for a damaged file, and for a target in milliseconds if no times are known.
    """
    model, baselines = open_model(run / "model"), run / "exit_outputs" / "baselines.npz"
    times, texts = None, _read_texts(config, digest)
    tables = tables_of_this_machine(model, "float32").values()
    if tables:  # use the times of the faster engine
        table = min(tables, key=lambda table: typical_milliseconds(table, model))
        times = _exit_times(model, table, texts)
    elif "milliseconds" in target:
        raise UserError(
            "--milliseconds needs times measured on this machine: run sweet-jax predict "
            f"--model={model.folder} --measure"
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
    """Returns the times of a text of median length, of a long text, and of each validation text."""
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
    """Returns the validation texts; None, with a warning, if the data are missing or changed."""
    try:
        dataset = load_dataset(config)
    except UserError as error:
        cure = f"; {SAME_FOLDER}" if isinstance(error, AbsentFileError) else ""
        log.warning("the report lists no mistakes, which quote texts: %s%s", error, cure)
        return None
    if dataset.digest() != digest:
        log.warning(
            "the report lists no mistakes, which quote texts: the data have changed since the run"
        )
        return None
    return dataset.validation.texts
