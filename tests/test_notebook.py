"""The tutorial notebook runs from its first cell to its last, and is shown as a page."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorials" / "notebook.ipynb"


def load() -> tuple[dict, dict]:
    """(the notebook, docs/notebook.py)"""
    return json.loads(NOTEBOOK.read_text()), runpy.run_path(str(ROOT / "docs" / "notebook.py"))


@pytest.mark.slow
def test_every_cell_runs(checkpoint, tmp_path, one_device, restored_logging):
    """With a tiny random encoder in the place of the real one."""
    notebook, module = load()
    quick = {"head_init": "random", "head_refit": False, "epochs": 1, "rate_search": "full"}
    quick |= {"checkpoint": str(checkpoint), "exits": (1, 2, 3), "learning_rates": 3e-3}
    quick |= {"max_length": 16, "baselines": "none", "pooling": "first"}
    done = module["execute"](notebook, {"workdir": str(tmp_path / "run"), "options": quick})
    assert (tmp_path / "run" / "results.json").exists()
    shown = [cell["outputs"] for cell in done["cells"] if cell["cell_type"] == "code"]
    tables = [o for outputs in shown for o in outputs if "text/html" in o.get("data", {})]
    assert len(tables) == 4  # rows, the run, the curve, the answers
    before = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    kinds = [[[o["output_type"] for o in outputs] for outputs in each] for each in (shown, before)]
    assert kinds[0] == kinds[1]  # what is kept in the repository is what the cells show


def test_its_page_has_text_code_and_what_the_code_showed():
    notebook, module = load()
    page = module["to_markdown"](notebook)
    assert page.startswith("# A notebook")
    assert page.count("```python\n") == sum(c["cell_type"] == "code" for c in notebook["cells"])
    assert '<div class="output"><div>' in page
    assert "validation: cost 0." in page
    notebook["cells"][1]["outputs"] = [{"output_type": "stream", "text": "a < b"}]
    assert '<pre class="output">a &lt; b</pre>' in module["to_markdown"](notebook)
