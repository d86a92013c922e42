"""The tutorial notebook: its cells run, and it becomes a page of the documentation."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorials" / "notebook.ipynb"


def load() -> tuple[dict, dict]:
    """Returns the notebook and the module docs/notebook.py."""
    return json.loads(NOTEBOOK.read_text()), runpy.run_path(str(ROOT / "docs" / "notebook.py"))


@pytest.mark.slow
def test_notebook_cells_run_and_committed_outputs_have_the_same_kinds(
    checkpoint, tmp_path, one_device, restored_logging
):
    """A tiny random encoder replaces the real one."""
    notebook, module = load()
    options = {"head_init": "random", "head_refit": False, "epochs": 1, "rate_search": "full"}
    options |= {"checkpoint": str(checkpoint), "exits": (1, 2, 3), "learning_rates": 3e-3}
    options |= {"max_length": 16, "baselines": "none", "pooling": "first"}
    executed = module["execute"](notebook, {"workdir": str(tmp_path / "run"), "options": options})
    assert (tmp_path / "run" / "results.json").exists()
    executed_outputs = [
        cell["outputs"] for cell in executed["cells"] if cell["cell_type"] == "code"
    ]
    tables = [
        o for outputs in executed_outputs for o in outputs if "text/html" in o.get("data", {})
    ]
    assert len(tables) == 4  # rows, the run, the curve, the predictions
    committed = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    kinds = [
        [[o["output_type"] for o in outputs] for outputs in cells]
        for cells in (executed_outputs, committed)
    ]
    assert kinds[0] == kinds[1]


def test_notebook_page_has_text_code_and_outputs():
    notebook, module = load()
    page = module["to_markdown"](notebook)
    assert page.startswith("# A notebook")
    assert page.count("```python\n") == sum(c["cell_type"] == "code" for c in notebook["cells"])
    assert '<div class="output"><div>' in page
    assert "validation: cost 0." in page
    notebook["cells"][1]["outputs"] = [{"output_type": "stream", "text": "a < b"}]
    assert '<pre class="output">a &lt; b</pre>' in module["to_markdown"](notebook)
