"""Four CPU devices, and what many tests share: a tiny checkpoint, rows, runs on both, a browser."""

import fcntl
import gc
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before jax is imported: children of the tests inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs compiled once are shared by the tests and by the processes they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="sweet_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
# Storing a program takes about as long as compiling a small one.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Tests compile far more than they compute: LLVM's optimisation of the kernels would take half of
# their time. What XLA itself does to a program (fusion, scheduling, memory) stays as it is, and so
# do the generators of its kernels: xla_cpu_use_fusion_emitters=false would save another fifth, but
# its programs round otherwise than those that users run.
# A program of this size is not worth dividing among LLVM's threads either: as one part it is the
# same code, for a tenth less.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)

# Tracing allocates many objects: at the default threshold of 700 allocations, Python searches for
# cycles, and JAX collects its own garbage, thousands of times a minute.
gc.set_threshold(50_000, 20, 50)

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import WORDS, Reference, fine_tune, write_checkpoint, write_rows

from sweet_jax.report import figures

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

GLUE_DIR = Path(os.environ.get("SWEET_GLUE_DIR", "../shared/data/glue"))


@pytest.fixture(scope="session", autouse=True)
def without_figures():
    """Runs draw no figures, which take longer than all the rest of a run that is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = figures.write_figures
        patch.setattr(figures, "write_figures", lambda *_: None)
        yield drawn


@pytest.fixture
def with_figures(without_figures, monkeypatch):
    """The runs of a test draw their figures, as those of users do."""
    monkeypatch.setattr(figures, "write_figures", without_figures)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def with_dropout(tmp_path_factory) -> dict:
    """Config values of the same checkpoint with dropout, to add to the options."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny_dropout"
    return {"checkpoint": str(write_checkpoint(folder, dropout=0.1))}


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.csv", 160)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Function (name, make) -> make(folder), which the first worker calls and the others read."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the workers share

    def read_or_make(name: str, make: Callable[[Path], Any]) -> Any:
        made = folder / name / "made.pickle"
        made.parent.mkdir(exist_ok=True)
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                made.write_bytes(pickle.dumps(make(made.parent)))
        return pickle.loads(made.read_bytes())

    return read_or_make


@pytest.fixture(scope="session")
def fine_tuned(made_once) -> tuple[Path, dict]:
    """(run directory, its config): exits 2, 3 and 4, with learning-to-exit."""

    def make(folder):
        deep = write_checkpoint(folder / "deep", layers=4)
        return fine_tune(deep, folder, exits=(2, 3, 4), learning_to_exit="joint")

    return made_once("fine_tuned", make)


@pytest.fixture(scope="session")
def sweet(fine_tuned):
    return Reference(*fine_tuned)


@pytest.fixture(scope="session")
def onnx_model(sweet, made_once) -> Path:
    """The model of `sweet` as ONNX graphs, which JAX and transformers are not needed for."""
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name, reason='pip install -e ".[onnx]"')
    from sweet_jax import export

    def make(folder):
        options = [f"--model={sweet.classifier.model.folder}", f"--output={folder / 'model'}"]
        assert export.main([*options, "--format=onnx"]) == 0
        return folder / "model"

    return made_once("onnx_model", make)


@pytest.fixture(scope="session")
def multi_model(checkpoint, made_once):
    recipe = {"method": "multi_model", "exits": (1, 3)}
    return Reference(*made_once("multi", lambda f: fine_tune(checkpoint, f, **recipe)))


@pytest.fixture(scope="session")
def mean_pooled(checkpoint, made_once):
    """By the mean of the tokens, from a probe, refitted."""
    recipe = {"pooling": "mean", "head_init": "probe", "head_refit": True, "epochs": 2}
    recipe |= {"learning_rates": (1e-3,)}
    return Reference(*made_once("mean", lambda f: fine_tune(checkpoint, f, **recipe)))


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, where there is one with its driver."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its driver on this machine")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    for argument in [*quiet, "--no-first-run", "--window-size=1200,1000"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


@pytest.fixture(scope="session")
def tiny_run(checkpoint, rows) -> dict:
    """Config values of a run that takes seconds."""
    return {
        "task": "tiny",
        "checkpoint": str(checkpoint),
        "data_files": str(rows),
        "text_columns": "text",
        "exits": (1, 2, 3),
        "learning_rates": (3e-3,),
        "train_size": 100,
        "batch_size": 8,
        "evaluation_batch_size": 16,
        "max_length": 32,
        "checkpoint_every": 100,
        "pooling": "first",
        "baselines": "none",
    }


@pytest.fixture
def restored_logging():
    """The command sets up logging for its own process."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


@pytest.fixture
def options(tiny_run) -> dict:
    """The same, for a test to change."""
    return dict(tiny_run)


@pytest.fixture
def one_device(monkeypatch):
    """Shows the program one device of the four."""
    first = jax.devices()[:1]
    monkeypatch.setattr("sweet_jax.training.sharding.jax.devices", lambda: first)


@pytest.fixture(scope="module")
def one_device_in_module():
    """Shows one device to the fixtures and tests of a module, which then compile more quickly."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweet_jax.training.sharding.jax.devices", lambda: first)
        yield


@pytest.fixture(scope="module")
def cell_options(tmp_path_factory) -> list[str]:
    """Options of cells of the experiments that take seconds: two layers, learnable rows."""
    data = tmp_path_factory.mktemp("glue")
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "shallow", layers=2)
    rng = np.random.default_rng(0)
    (data / "sst2").mkdir()
    for split, count in (("train", 80), ("validation", 40)):
        labels = rng.integers(0, 2, count)
        noise = [" ".join(rng.choice(WORDS[2:], rng.integers(1, 12))) for _ in labels]
        texts = [f"{WORDS[y]} {words}" for y, words in zip(labels, noise, strict=True)]
        table = pa.table({"sentence": texts, "label": labels, "idx": np.arange(count)})
        pq.write_table(table, data / "sst2" / f"{split}.parquet")
    return [
        *(f"--data_dir={data}", f"--checkpoint={checkpoint}", "--exits=1,2", "--tasks=sst2"),
        *("--seeds=0,1", "--max_length=32"),
    ]


@pytest.fixture(scope="session")
def glue_dir() -> Path:
    if not GLUE_DIR.is_dir():
        pytest.skip(f"no GLUE rows at {GLUE_DIR} (SWEET_GLUE_DIR)")
    return GLUE_DIR
