"""Makes, while MkDocs builds, the pages and files that follow from the code and the results.

`python docs/hooks.py` writes the tables of docs/reference/config.md anew; a test compares them.
"""

import json
import re
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
# This checkout, wherever another one is installed, and the modules next to this file.
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import notebook  # noqa: E402 - next to this file

from sweet_jax.config import describe_keys  # noqa: E402 - after the path
from sweet_jax.config.presets import PRESETS  # noqa: E402 - after the path

RESULTS = ROOT / "experiments" / "results"
NOTEBOOKS = {  # by the name of their page
    path.relative_to(ROOT / "docs").with_suffix(".md").as_posix(): path
    for path in sorted((ROOT / "docs").rglob("*.ipynb"))
}


KEYS = re.compile("<!-- config keys -->.*<!-- /config keys -->", re.DOTALL)
CONFIG_PAGE = ROOT / "docs" / "reference" / "config.md"


def config_page() -> str:
    """Returns the page of the config keys with its tables made anew."""
    marked = f"<!-- config keys -->\n{config_reference()}\n<!-- /config keys -->"
    return KEYS.sub(lambda _: marked, CONFIG_PAGE.read_text())


def config_reference() -> str:
    """Returns Markdown tables of all config keys, and one of the presets."""
    lines = []
    for group, keys in groupby(describe_keys(), lambda key: key.group):
        lines += [f"## {group}", "", "| key | default | allowed | meaning |", "| - | - | - | - |"]
        lines += [_row(f"`{k.name}`", _code(k.default), k.allowed, k.meaning) for k in keys]
        lines.append("")
    names = list(PRESETS)
    lines += ["## Presets", "", "What a preset sets where the key itself is left empty.", ""]
    lines += [_row("key", *(f'`preset="{n}"`' for n in names)), _row(*["-"] * (len(names) + 1))]
    lines += [
        _row(f"`{key}`", *(_code(PRESETS[n][key] or '""') for n in names)) for key in PRESETS[""]
    ]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links to the results and to notebooks as the site has them.

    In the repository the same links lead to the files themselves.
    """
    markdown = markdown.replace("../experiments/results/", "results/")
    if page.file.src_uri in NOTEBOOKS:  # whose own link is to the file
        return markdown
    return markdown.replace(".ipynb)", ".md)")


def on_files(files, config):
    """Adds the tables and figures of the results, and notebooks as pages, without a copy."""
    from mkdocs.structure.files import File  # the tests read this file without MkDocs

    paths = (path for kind in ("*.md", "*.png") for path in RESULTS.rglob(kind))
    for path in sorted(paths):
        name = "results/" + path.relative_to(RESULTS).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for name, path in NOTEBOOKS.items():  # the notebook itself is there too
        page = notebook.to_markdown(json.loads(path.read_text()))
        files.append(File.generated(config, name, content=page))
    return files


def _code(text: str) -> str:
    return text if text == "none given" else f"`{text}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("<", "&lt;").replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    CONFIG_PAGE.write_text(config_page())
