"""The programs of an exported ONNX folder, compared with AdaptiveClassifier."""

import functools
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from exported_programs import UNUSUAL, assert_same, load_python
from saved_models import Saved, middle
from tiny import WORDS

from sweet_jax import AdaptiveClassifier, export
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.inference.artifact import open_model

pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
from sweet_jax.inference.onnx_runners import POLICIES, write_runners


def draw_texts(count: int) -> list[str]:
    """Returns unusual texts, and random ones on which no threshold was fitted."""
    rng = np.random.default_rng(5)
    rest = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count - len(UNUSUAL))]
    return [*UNUSUAL, *rest]


@pytest.fixture
def folder(onnx_model, tmp_path) -> Path:
    """Returns a copy of the exported folder, for a test to change."""
    return shutil.copytree(onnx_model, tmp_path / "model")


def run_program(*command, stdin: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, input=stdin, capture_output=True, text=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_python_program_follows_each_policy(sweet, folder, policy):
    fitted = sweet.classifier.model.resolver.calibrator
    target = {"threshold": middle(exit_confidences(sweet.outputs, policy, [fitted])[0])}
    write_runners({"float32": open_model(folder)}, folder, policy, target)
    texts = [*UNUSUAL, *sweet.texts]
    expected = AdaptiveClassifier.from_pretrained(folder, policy=policy, **target).predict(texts)
    assert len(set(expected.exits)) > 1
    assert_same(load_python(folder).Classifier(folder).predict(texts, 7), expected)


@pytest.mark.parametrize("program", ["python", pytest.param("node", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", POLICIES)
def test_exit_without_temperature_is_skipped_by_calibrated_policies(
    sweet, folder, policy, program, request
):
    """Policies that do not use the temperature let texts leave there."""
    values = json.loads((folder / "exits.json").read_text())
    values["dials"]["temperatures"][0] = None  # it diverged on a calibration row
    (folder / "exits.json").write_text(json.dumps(values))
    model = open_model(folder)
    confidences = exit_confidences(sweet.outputs, policy, [model.resolver.calibrator])[0]
    uses_temperature = policy not in ("raw_confidence", "learning_to_exit")
    assert np.isneginf(confidences[0]).all() == uses_temperature
    target = {"threshold": middle(confidences[1:] if uses_temperature else confidences)}
    write_runners({"float32": model}, folder, policy, target)
    expected = AdaptiveClassifier(model, policy, target).predict(sweet.texts)
    leaves = confidences >= target["threshold"]
    leaves[-1] = True
    assert expected.exits.tolist() == np.asarray(model.layers)[leaves.argmax(axis=0)].tolist()
    assert (2 in expected.exits) != uses_temperature
    if program == "python":
        answers = load_python(folder).Classifier(folder).predict(sweet.texts, 7)
    else:
        (folder / "node_modules").symlink_to(request.getfixturevalue("node_modules"))
        stdin = "\n".join(map(json.dumps, sweet.texts))
        stdout = run_program("node", folder / "run.mjs", stdin=stdin).stdout
        answers = list(map(json.loads, stdout.splitlines()))
    assert_same(answers, expected)


def test_python_program_uses_last_exit_at_threshold_1_and_infinity(folder):
    for threshold in (1.0, math.inf):
        write_runners(
            {"float32": open_model(folder)}, folder, "confidence", {"threshold": threshold}
        )
        classifier = AdaptiveClassifier.from_pretrained(folder, threshold=threshold)
        answers = load_python(folder).Classifier(folder).predict(draw_texts(40))
        assert_same(answers, classifier.predict(draw_texts(40)))
        assert {answer["exit"] for answer in answers} == {classifier.layers[-1]}


def test_python_command_prints_prediction_and_refuses_bad_input(onnx_model):
    def run(*arguments, stdin):
        return run_program(sys.executable, onnx_model / "run.py", *arguments, stdin=stdin)

    answer = json.loads(run(stdin='"word0 word5"\n').stdout)
    assert answer.keys() == {"label", "probability", "exit", "cost", "probabilities"}
    for arguments, stdin, message in (
        ((), '["a", "b"]', "error: row 1 must be a text; got ['a', 'b']"),
        (("int8",), '"a"', "error: this export has no precision 'int8': choose from float32"),
        ((), '"a"\n\njunk\n', "error: line 3 is not JSON: 'junk'"),
    ):
        process = run(*arguments, stdin=stdin)
        assert process.returncode == 2
        assert process.stderr.startswith(message)
        assert process.stderr.count("\n") == 1


def test_python_command_reads_and_prints_utf_8(folder):
    values = json.loads((folder / "model.json").read_text())
    values["classes"] = ["\N{SNOWMAN}" + name for name in values["classes"]]
    (folder / "model.json").write_text(json.dumps(values))
    process = subprocess.run(
        [sys.executable, folder / "run.py"],
        input=b'"word0 caf\xc3\xa9"\n',
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        check=True,
    )
    assert json.loads(process.stdout.decode("utf-8"))["label"] in values["classes"]


def test_python_program_refuses_rows_of_wrong_type(folder):
    classifier = load_python(folder).Classifier(folder)
    assert classifier.predict([["word0"]]) == classifier.predict(["word0"])
    for row in (None, 1, [], [1], ["a", "b"]):
        with pytest.raises(ValueError, match=f"row 2 must be a text; got {re.escape(repr(row))}"):
            classifier.predict(["a", row])
    with pytest.raises(ValueError, match="row 1 has an unpaired surrogate"):
        classifier.predict(["\ud800"])
    classifier.about["text_columns"] = ["a", "b"]
    for row in ("a", None, 1, ["a"], ["a", None], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="row 1 must be a list of two texts; got "):
            classifier.predict([row])
    with pytest.raises(ValueError, match="row 1 has an unpaired surrogate"):
        classifier.predict([("a", "\udfff")])


@pytest.mark.parametrize("pattern", ["tokenizer.json", "onnx/*.bin", "onnx/*.onnx"])
def test_python_command_reports_damaged_file_in_one_line(folder, pattern):
    for path in folder.glob(pattern):
        os.truncate(path, 100)
    process = run_program(sys.executable, folder / "run.py", stdin='"a"')
    assert process.returncode == 2
    assert re.fullmatch(r"error: cannot read '.*' \(.+\): export it again\n", process.stderr)


def test_export_refuses_or_replaces_policy_that_programs_lack(sweet, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(sweet.classifier.model.folder, folder)
    values = json.loads((folder / "exits.json").read_text()) | {"policy": "patience"}
    (folder / "exits.json").write_text(json.dumps(values))
    options = [f"--model={folder}", f"--output={tmp_path / 'out'}", "--format=onnx"]
    assert export.main([*options, "--policy=patience"]) == 2
    assert "--policy must be one of confidence, raw_confidence, " in capsys.readouterr().err
    assert export.main(options) == 0
    assert "do not implement the policy 'patience' and use 'confidence'" in capsys.readouterr().err
    values = json.loads((tmp_path / "out" / "model.json").read_text())
    assert values["policy"] == "confidence"
    assert open_model(tmp_path / "out").policy == "patience"


@pytest.mark.parametrize("objective", ["multi_label", "regression"])
def test_export_omits_programs_for_objective_that_they_lack(sweet, tmp_path, capsys, objective):
    folder, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(sweet.classifier.model.folder, folder)
    values = json.loads((folder / "exits.json").read_text()) | {"objective": objective}
    (folder / "exits.json").write_text(json.dumps(values))
    options = [f"--model={folder}", f"--output={output}", "--format=onnx"]
    for option in ("--policy=confidence", "--cost=0.5"):
        assert export.main([*options, option]) == 2
        assert f"do not implement objective='{objective}': remove" in capsys.readouterr().err
        assert not output.exists()
    assert export.main(options) == 0
    assert f"do not implement objective='{objective}' and are not" in capsys.readouterr().err
    assert not {path.name for path in output.iterdir()} & {"run.py", "run.mjs", "model.json"}
    assert open_model(output).objective.name == objective


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """Returns the folder of Node's packages; CONTRIBUTING.md says which."""
    if not shutil.which("node"):
        pytest.skip("no Node.js on this machine")
    folder = Path(os.environ.get("SWEET_NODE_MODULES", "absent"))
    names = ("onnxruntime-node", "onnxruntime-web", "@huggingface/tokenizers")
    if missing := [name for name in names if not (folder / name).exists()]:
        pytest.skip(f"SWEET_NODE_MODULES names no folder with {', '.join(missing)}")
    return folder.absolute()


EXPORTS = [
    ("roberta", "first", True),
    ("deberta-v2", "mean", False),
    ("mpnet", "aligned_pair", True),
]


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request, node_modules, tmp_path_factory):
    """Returns (folder, 100 rows) of a model in float32 and int8, of pairs or of texts."""
    kind, pooling, pairs = request.param
    folder = tmp_path_factory.mktemp(kind)
    saved = Saved(folder, kind, pooling)
    values = json.loads((saved.folder / "exits.json").read_text())
    values["text_columns"] = ["premise", "label"] if pairs else ["text"]
    (saved.folder / "exits.json").write_text(json.dumps(values))
    int8 = {"version": 1, "dials": values["dials"]}
    (saved.folder / "int8.json").write_text(json.dumps(int8))
    options = [f"--model={saved.folder}", f"--output={folder / 'out'}", "--format=onnx"]
    assert export.main([*options, "--cost=0.6"]) == 0
    (folder / "out" / "node_modules").symlink_to(node_modules)
    texts = draw_texts(100)
    return folder / "out", list(zip(texts, texts[::-1], strict=True)) if pairs else texts


@functools.cache
def expected_predictions(folder: Path, precision: str, rows: tuple):
    return AdaptiveClassifier.from_pretrained(folder, precision=precision, cost=0.6).predict(rows)


@pytest.mark.slow
def test_node_program_predicts_as_python_and_refuses_bad_input(exported):
    folder, rows = exported
    if json.loads((folder / "exits.json").read_text())["pooling"] == "first":
        assert '"first_token": true' in (folder / "model.json").read_text()
    for precision in ("float32", "int8"):
        expected = expected_predictions(folder, precision, tuple(rows))
        assert len(set(expected.exits)) > 1
        stdin = "\n".join(map(json.dumps, rows))
        process = run_program("node", folder / "run.mjs", precision, stdin=stdin)
        assert process.stderr == ""
        assert_same(list(map(json.loads, process.stdout.splitlines())), expected)
        assert_same(load_python(folder).Classifier(folder, precision).predict(rows), expected)
    wrong_row = "a" if isinstance(rows[0], tuple) else ["a", "b"]
    for arguments, stdin, message in (
        ((), json.dumps(wrong_row), "error: row 1 must be "),
        (("int4",), json.dumps(rows[0]), "error: this export has no precision int4: choose from "),
        ((), f"{json.dumps(rows[0])}\n\njunk\n", 'error: line 3 is not JSON: "junk"'),
    ):
        refusal = run_program("node", folder / "run.mjs", *arguments, stdin=stdin)
        assert refusal.returncode == 2
        assert refusal.stderr.startswith(message)
        assert refusal.stderr.count("\n") == 1


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(exported):
    """Serves the exported folder and yields its URL."""
    handler = functools.partial(QuietHandler, directory=exported[0])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


# Submits rows one after the other, and returns what the page shows for each.
SUBMIT = """
const [rows, done] = arguments;
const text = (id) => document.getElementById(id).textContent;
const shown = [];
for (const row of rows) {
  document.querySelectorAll("textarea").forEach((area, k) => { area.value = [row].flat()[k]; });
  const change = new Promise((resolve) => {
    new MutationObserver((_, observer) => { observer.disconnect(); resolve(); })
      .observe(document.getElementById("probabilities"), { childList: true });
  });
  document.querySelector("form").requestSubmit();
  await change;
  const cells = Array.from(document.querySelectorAll("#probabilities td:last-child"));
  shown.push([text("label"), text("exit"), cells.map((cell) => parseFloat(cell.textContent))]);
}
done(shown);
"""


def wait_until(browser, condition) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 60).until(condition)


def open_page(browser, address: str) -> None:
    browser.get(address)
    status = lambda b: b.find_element("id", "status").text
    wait_until(browser, lambda b: not status(b).startswith("Loading"))
    assert status(browser).startswith("Ready (")


def check_keyboard_on_phone(browser, address: str) -> None:
    from selenium.webdriver import ActionChains, Keys

    phone = {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        open_page(browser, address)
        label = browser.find_element("id", "label")
        for keys in ((Keys.TAB, Keys.ENTER), (Keys.CONTROL, Keys.ENTER)):
            browser.execute_script("document.getElementById('label').textContent = ''")
            browser.find_elements("css selector", "textarea")[-1].send_keys("word1")
            if keys[0] == Keys.TAB:  # to the button
                ActionChains(browser).send_keys(*keys).perform()
            else:
                ActionChains(browser).key_down(keys[0]).send_keys(keys[1]).key_up(keys[0]).perform()
            wait_until(browser, lambda _: label.text.endswith("%)"))
        widths = browser.execute_script("return [document.body.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1] == phone["width"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_web_page_predicts_as_python(exported, address, browser):
    folder, rows = exported
    for precision, query in (("int8", ""), ("float32", "?precision=float32")):
        expected = expected_predictions(folder, precision, tuple(rows))
        open_page(browser, address + query)
        shown = browser.execute_async_script(f"(async () => {{{SUBMIT}}})();", rows)
        for row, (label, exit_text, percents) in enumerate(shown):
            assert label.startswith(f"{expected.labels[row]} (")
            assert exit_text.startswith(f"Answered at layer {expected.exits[row]} of 3, ")
            assert f"ms ({precision})" in exit_text
            np.testing.assert_allclose(percents, 100 * expected.probabilities[row], atol=0.06)
        assert len(shown) == len(rows)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    check_keyboard_on_phone(browser, address)
