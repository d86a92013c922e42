"""A picture of the report's first screen, by Chromium if available, otherwise by matplotlib."""

import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.simulation import read_curve
from sweet_jax.files import atomic_write
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.report.details import ReportDetails, recommended_threshold
from sweet_jax.report.figures import curve_figure
from sweet_jax.report.verdict import describe_training, verdict

_BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
_SIZE = "1200,900"  # pixels
_SECONDS = 60  # time limit for the browser to start and draw
# No network, no user profile, and no scroll bars in the picture.
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--hide-scrollbars", "--virtual-time-budget=4000"),
)


def photograph_page(page: Path, picture: Path) -> bool:
    """Writes a PNG of the top of a page with Chromium; returns whether that succeeded."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "page.png"
        command = [browser, *_FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={_SIZE}"]
        command += [f"--screenshot={taken}", page.resolve().as_uri()]
        try:
            subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if not taken.exists():
            return False
        with atomic_write(picture) as aside:
            shutil.copyfile(taken, aside)
    return True


def draw_first_screen(
    picture: Path, analysis: Analysis, results: Mapping[str, Any], details: ReportDetails
) -> None:
    """Draws the text of the first screen and the curve as a PNG."""
    best = results["best_replica"]
    threshold, _ = recommended_threshold(analysis, best, details)
    words = [
        describe_training(results, len(analysis.validation.identity.classes)),
        " ".join(verdict(analysis, results, best, threshold, details)),
    ]
    figure = curve_figure(analysis, results)
    (axes,) = figure.axes
    row = read_curve(analysis.curve, np.asarray([threshold]))
    point = row.cost[best, 0], ShownMetric.of(results["metric"]).value(row.score[best, 0])
    axes.plot(*point, "o", color="#c0392b", fillstyle="none", markersize=12, markeredgewidth=2)
    if details.times is not None and len(analysis.validation.cost) > 1:
        above = axes.secondary_xaxis("top")  # see `curve_chart`
        above.set_xticks(analysis.validation.cost, [f"{v:.3g}" for v in details.times.milliseconds])
        above.set_xlabel(f"milliseconds until each exit, a text of {details.times.tokens} tokens")
    axes.set_title("")
    text = "\n\n".join(textwrap.fill(line, 95) for line in words)
    figure.suptitle(text, fontsize=8, x=0.02, ha="left", parse_math=False)
    figure.set_size_inches(7, 7)
    with atomic_write(picture) as aside:
        figure.savefig(aside, dpi=150)
