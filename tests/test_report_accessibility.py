"""The pages of reports and of the server's audit under axe-core.

On a wide and a narrow screen, in light and dark colors.
"""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_report_classes import TEXTS, analysis_of

from sweet_jax.config import from_mapping
from sweet_jax.inference.audit_statistics import AuditSummary, ExitAudit
from sweet_jax.report.baselines import Baseline
from sweet_jax.report.comparison import write_comparison
from sweet_jax.report.details import ExitTimes, ReportDetails
from sweet_jax.report.page import write_report
from sweet_jax.report.results import TrainingRecord, build_results
from sweet_jax.server.audit import AuditCounts
from sweet_jax.server.audit_page import render_page

RUN_AXE = """
const done = arguments[arguments.length - 1];
document.querySelectorAll("details").forEach(d => { d.open = true; });
axe.run().then(results => done([
  results.passes.length,
  results.violations.filter(v => ["serious", "critical"].includes(v.impact))
    .map(v => `${v.id}: ${v.nodes.map(n => n.html).slice(0, 3).join(" ")}`),
  document.documentElement.scrollWidth,
]));
"""


@pytest.fixture(scope="module")
def axe() -> str:
    folder = os.environ.get("SWEET_NODE_MODULES", "")
    path = Path(folder) / "axe-core" / "axe.min.js"
    if not folder or not path.is_file():
        pytest.skip("no axe-core (npm install axe-core; SWEET_NODE_MODULES=.../node_modules)")
    return path.read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    """Reports of few and of many classes with all their parts, and a comparison."""
    folder, paths = tmp_path_factory.mktemp("pages"), []
    for classes in (3, 77):
        analysis = analysis_of(classes)
        baselines = [Baseline("tfidf", np.arange(240) % classes, 0.0)]
        config = from_mapping({"exits": (1, 2, 4)}).resolved()
        results = build_results(config, analysis, TrainingRecord(100, baselines=baselines))
        times = ExitTimes(np.asarray([1.0, 2.0, 4.0]), 32, "a machine")
        details = ReportDetails("title", TEXTS, times, baselines, np.arange(240) % 2 == 0, 16)
        paths.append(folder / f"{classes}.html")
        write_report(paths[-1], analysis, results, [], {}, details)
    paths.append(folder / "compare.html")
    write_comparison(paths[-1], [("one", analysis), ("two", analysis)])
    for alarm in (None, 1.0):
        paths.append(folder / f"audit-{alarm}.html")
        exits = [
            ExitAudit(1, 0.9, 0.5, 0.4, 0.3, 0.01),
            ExitAudit(4, 1.0, 0.5, 0.6, *[math.nan] * 2),
        ]
        numbers = (0.95, 0.9, 0.98, 0.5, 0.6, 0.97, 0.95, 41.0)
        summary = AuditSummary(200, exits, *numbers, alarm, 2.0, alarm)
        audit = SimpleNamespace(
            running=True, summary=lambda s=summary: s, counts=lambda: AuditCounts(9000, 0, 3)
        )
        paths[-1].write_text(render_page(audit, "own"))
    return paths


@pytest.mark.slow
def test_pages_have_no_serious_axe_violations_and_fit_the_screen(pages, browser, axe):
    screen = {"deviceScaleFactor": 1, "mobile": False, "height": 900}
    try:
        for width, scheme in ((1200, "light"), (390, "dark")):
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen | {"width": width})
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            for page in pages:
                browser.get(page.as_uri())
                browser.execute_script(axe)
                passes, violations, page_width = browser.execute_async_script(RUN_AXE)
                assert passes > 15
                assert violations == [], page.name
                assert page_width <= width, page.name
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
