"""Notebooks of the documentation: executed without Jupyter, and shown as pages.

  python docs/notebook.py docs/tutorials/notebook.ipynb

executes a notebook in a temporary directory and keeps what its cells show.
"""

import ast
import contextlib
import html
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, wherever another is installed


def execute(
    notebook: Mapping[str, Any], parameters: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Runs the code cells of a notebook in one namespace; returns it with what they show.

    That is what they print, and the value of a last line that is an expression. The values of
    `parameters` replace those of the cell with the tag "parameters". What a cell raises is raised.
    """
    names: dict[str, Any] = {"__name__": "notebook"}
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            outputs = _run_cell("".join(cell["source"]), names)
            cell = {**cell, "outputs": outputs}
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= parameters or {}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs one cell; returns its outputs as a notebook has them."""
    tree, last = ast.parse(source), None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger("sweet_jax").addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, "cell", "exec"), names)
            value = eval(compile(last, "cell", "eval"), names) if last else None
    finally:
        logging.getLogger("sweet_jax").removeHandler(handler)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        data = {"text/plain": repr(value)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_()
        result = {"output_type": "execute_result", "execution_count": None, "metadata": {}}
        outputs.append({**result, "data": data})
    return outputs


def to_markdown(notebook: Mapping[str, Any]) -> str:
    """Returns a notebook as a page: text, code, and what the code showed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "text/html" in data:
                parts.append(f'<div class="output">{"".join(data["text/html"])}</div>')
            else:
                shown = html.escape("".join(data["text/plain"]), quote=False)
                parts.append(f'<pre class="output">{shown}</pre>')
    return "\n\n".join(parts) + "\n"


def main(path: Path) -> None:
    """Executes a notebook and writes it with what its cells show."""
    notebook = json.loads(path.read_text())
    logging.getLogger("sweet_jax").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            done = execute(notebook)
        finally:
            os.chdir(path.parents[2])
    path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
