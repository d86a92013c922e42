"""Tests of the server: answers under load, status codes of errors, and shutdown."""

import dataclasses
import gc
import http.client
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from sweet_jax import AdaptiveClassifier
from sweet_jax.config import from_mapping
from sweet_jax.data.load import load_dataset
from sweet_jax.objectives.regression import REGRESSION

uvicorn = pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
from sweet_jax import serve  # noqa: E402 - after the packages it needs
from sweet_jax.server.app import Limits, _describe_targets, make_app  # noqa: E402 - likewise
from sweet_jax.server.worker import Worker  # noqa: E402 - likewise


class Running:
    """Runs a server in a thread, at a free port."""

    def __init__(self, classifier, audit=None, **limits):
        app = make_app(classifier, 2, Limits(**limits), audit)
        self.start(uvicorn.Config(app, port=0, log_level="error"))

    def start(self, settings) -> None:
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def call(self, method: str, path: str, body=None, headers=None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def wait_for(self, waiting: int) -> None:
        """Returns once this number of texts is queued or computed."""
        deadline = time.monotonic() + 60
        while json.loads(self.call("GET", "/healthz")[1])["waiting"] != waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def predict(self, request) -> tuple[int, dict]:
        body = request if isinstance(request, bytes) else json.dumps(request)
        status, response = self.call("POST", "/predict", body)
        return status, json.loads(response)


class GatedEngine:
    """Delays the runs of a classifier's engine until the gate is set.

    fails: the runs then raise. diverged: the first exit's logits are then NaN.
    """

    def __init__(self, engine, *, fails=False, diverged=False):
        self.engine, self.fails, self.diverged = engine, fails, diverged
        self.entered, self.gate = threading.Event(), threading.Event()
        self.texts = 0  # number of embedded texts

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def classify(self, classifier) -> AdaptiveClassifier:
        """Returns the classifier with this engine."""
        target = {"threshold": classifier.threshold}
        return AdaptiveClassifier(classifier.model, classifier.policy, target, self)

    def run(self, stage, batch, states):
        self.entered.set()
        assert self.gate.wait(60)
        if self.fails:
            raise RuntimeError("out of memory")
        self.texts += int((batch.rows[1] > 0).sum()) if stage.exit == 0 else 0
        output = self.engine.run(stage, batch, states)
        if self.diverged and stage.exit == 0:
            return output._replace(logits=np.full_like(output.logits, np.nan), complements=None)
        return output


@pytest.fixture(scope="module")
def texts(fine_tuned) -> list[str]:
    values = from_mapping(fine_tuned[1])
    texts = [text for (text,) in load_dataset(values).validation.texts]
    # Short ones, which need fewer programs.
    return sorted(texts, key=lambda text: len(text.split()))[:16]


@pytest.fixture(scope="module")
def classifier(fine_tuned):
    return AdaptiveClassifier.from_pretrained(fine_tuned[0] / "model", threshold=0.8)


@pytest.fixture(scope="module")
def server(classifier):
    running = Running(classifier, texts=8, body=20000, characters=5000)
    yield running
    running.stop()


def assert_answers(response: dict, expected) -> None:
    answers = response["answers"]
    assert [a["label"] for a in answers] == expected.labels.tolist()
    assert [a["exit"] for a in answers] == expected.exits.tolist()
    np.testing.assert_allclose(
        [a["probability"] for a in answers], expected.probabilities.max(axis=1), atol=1e-5
    )
    np.testing.assert_allclose([a["cost"] for a in answers], expected.cost)


def test_concurrent_clients_get_answers_to_their_own_texts_and_targets(server, classifier, texts):
    """The requests of all clients share batches."""
    targets = [{}, {"threshold": 0.55}, {"policy": "patience", "threshold": 2}, {"threshold": 2}]
    expected = {}
    for number, target in enumerate(targets):
        at_target = classifier.at(target.get("policy"), threshold=target.get("threshold", 0.8))
        for start in range(0, len(texts) - 3, 3):
            expected[number, start] = at_target.predict(texts[start : start + 3], 2)

    def ask(key):
        number, start = key
        return key, server.predict({"texts": texts[start : start + 3], **targets[number]})

    with ThreadPoolExecutor(16) as pool:
        for key, (status, response) in pool.map(ask, list(expected) * 2):
            assert status == 200, response
            assert_answers(response, expected[key])


def test_detail_lists_every_exit_up_to_the_taken_one(server, classifier, texts):
    _, response = server.predict({"texts": texts[:1], "threshold": 2, "detail": True})
    (answer,) = response["answers"]
    assert [e["layer"] for e in answer["exits"]] == [2, 3, 4]
    assert answer["exits"][-1]["probability"] == answer["probability"]
    at_first_exit = classifier.at(threshold=0.0).predict(texts[:1], 2)
    assert answer["exits"][0]["probability"] == pytest.approx(
        at_first_exit.probabilities.max(), abs=1e-5
    )


def test_detail_has_null_prediction_for_diverged_exit(classifier, texts):
    engine = GatedEngine(classifier.engine, diverged=True)
    engine.gate.set()
    running = Running(engine.classify(classifier))
    target = {"policy": "confidence", "threshold": 0.0}
    status, response = running.predict({"texts": texts[:1], "detail": True, **target})
    running.stop()
    assert status == 200
    exits = response["answers"][0]["exits"]
    assert exits[0] == {"layer": 2, "label": None, "probability": None}
    assert len(exits) == 2  # the first finite one is taken, whatever the threshold
    assert exits[1]["probability"] == response["answers"][0]["probability"] > 0


@pytest.mark.parametrize(("system", "reused"), [("posix", True), ("nt", False)])
def test_port_in_use_is_never_shared_on_windows(monkeypatch, system, reused):
    monkeypatch.setattr(serve, "os", SimpleNamespace(name=system))
    with serve._bound("127.0.0.1", 0) as listener:
        option = listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert bool(option) is reused


def test_operating_point_cache_is_thread_safe_and_bounded(classifier):
    worker = Worker(classifier, 2, 100)
    thresholds = [i / 1000 for i in range(600)]
    with ThreadPoolExecutor(16) as pool:
        classifiers = list(pool.map(lambda t: worker.at(None, {"threshold": t}), thresholds))
    assert [c.threshold for c in classifiers] == thresholds
    assert worker.at(None, {"threshold": thresholds[-1]}) is classifiers[-1]
    references = [weakref.ref(c) for c in classifiers]
    del classifiers
    gc.collect()
    assert sum(r() is not None for r in references) == 256


def test_warm_up_compiles_every_stage_of_the_server_for_any_target(classifier):
    full_model = AdaptiveClassifier(classifier.model, target={"threshold": float("inf")})
    full_model.warm_up(2, [20], full=False)
    before, worker = full_model.engine.compilations, Worker(full_model, 2, 100)
    assert (len(worker.scheduler.stages), len(full_model.make_scheduler(2).stages)) == (3, 1)
    for key in itertools.product(worker.scheduler.stages, (1, 2), (24,)):
        full_model.engine.compile(*key, worker.scheduler.slots)
    assert full_model.engine.compilations == before == 6


def test_address_taken_while_model_loads_is_reported(classifier, monkeypatch, capsys):
    with socket.socket() as other_process:
        other_process.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other_process.bind(("127.0.0.1", 0))
        port = other_process.getsockname()[1]

        def load(*_, **__):
            other_process.listen()
            return classifier

        monkeypatch.setattr(AdaptiveClassifier, "from_pretrained", load)
        assert serve.main(["--model=x", f"--port={port}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot serve at 127.0.0.1:{port}: Address already in use")


@pytest.mark.parametrize(
    ("request_body", "status", "message"),
    [
        (b"rubbish", 400, "not valid JSON"),
        (b"\xff\xfe", 400, "not valid JSON"),
        ([], 400, "must be a JSON object"),
        ({}, 400, "texts must be a list"),
        ({"texts": "one"}, 400, "texts must be a list"),
        ({"texts": ["a", 5]}, 400, "row 2 must be a text; got 5"),
        ({"texts": [["a", "b"]]}, 400, "must be a text"),
        ({"texts": ["a"], "cots": 1}, 400, "unknown key 'cots'"),
        ({"texts": ["a"], "detail": "yes"}, 400, "detail must be true or false; got 'yes'"),
        ({"texts": ["a"], "cost": "x"}, 400, "cost must be a number"),
        ({"texts": ["a"], "threshold": 1e300}, 400, "absolute value below 1,000,000; got 1e+300"),
        (b'{"texts": ["a"], "cost": NaN}', 400, "cost must be a number"),
        ({"texts": ["a"], "cost": 0.01}, 400, "cost=0.01 cannot be met: the best on the"),
        ({"texts": ["a"], "level": 0.9}, 400, "also set risk or agreement"),
        (b'{"texts": ["\\ud800"]}', 400, "has an unpaired surrogate"),
        ({"texts": ["a"], "accuracy": 1.2}, 400, "accuracy must be from 0 to 1"),
        ({"texts": ["a"], "cost": 1, "accuracy": 1}, 400, "set one target"),
        ({"texts": ["a"], "policy": "sure"}, 400, "unknown policy 'sure'"),
        ({"texts": ["a"] * 9}, 413, "may have at most 8 texts; got 9"),
        ({"texts": ["a" * 5001]}, 413, "may have at most 5000 characters"),
        ({"texts": ["a" * 30000]}, 413, "may have at most 20000 bytes"),
    ],
)
def test_invalid_request_is_refused_and_server_continues(server, request_body, status, message):
    actual_status, response = server.predict(request_body)
    assert actual_status == status
    assert message in response["error"]
    assert server.predict({"texts": ["word1"]})[0] == 200  # the server continues


def test_oversized_body_is_answered_after_it_is_received(server):
    """An earlier answer would be lost, because the connection closes while the client sends."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(16 * 20000))
    connection.endheaders()
    for _ in range(16):
        connection.send(b"x" * 20000)
        time.sleep(0.05)
    response = connection.getresponse()
    assert response.status == 413
    assert b"may have at most 20000 bytes" in response.read()
    connection.close()


def test_chunked_body_is_refused_at_size_limit(server):
    """Without Content-Length, the server refuses at the limit, not at the end of the body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(6):
        connection.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
    assert connection.getresponse().status == 413
    connection.close()
    assert server.predict({"texts": ["word1"]})[0] == 200


def test_health_and_metrics_routes_report_status_and_counts(server):
    server.predict({"texts": ["word1", "word2"]})
    assert json.loads(server.call("GET", "/healthz")[1])["status"] == "ok"
    metrics = server.call("GET", "/metrics")[1].decode()
    assert 'sweet_jax_requests_total{status="200"}' in metrics
    texts_by_exit = [
        float(line.split()[-1]) for line in metrics.splitlines() if "texts_total{exit" in line
    ]
    assert sum(texts_by_exit) >= 2
    assert "sweet_jax_waiting_texts 0.0" in metrics


def test_unexpected_error_is_counted_as_status_500(server, monkeypatch):
    async def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sweet_jax.server.app._classify", fail)
    assert server.call("POST", "/v1/predict", b'{"texts": ["a"]}')[0] == 500
    metrics = server.call("GET", "/metrics")[1].decode()
    assert 'sweet_jax_requests_total{status="500"} 1.0' in metrics


def test_full_queue_returns_503_and_shutdown_answers_accepted_requests(classifier, texts):
    engine = GatedEngine(classifier.engine)
    running = Running(engine.classify(classifier), waiting=3)
    with ThreadPoolExecutor(2) as pool:
        accepted = pool.submit(running.predict, {"texts": texts[:2]})
        running.wait_for(waiting=2)
        status, response = running.predict({"texts": texts[:2]})
        assert (status, response["error"]) == (503, "too many texts are waiting: try again later")
        status, response = running.predict({"texts": texts[:4]})
        assert (status, response["error"]) == (413, "a request may have at most 3 texts; got 4")
        running.server.should_exit = True  # what SIGTERM does
        time.sleep(0.3)
        assert not accepted.done()
        engine.gate.set()
        status, response = accepted.result()
    running.thread.join()
    assert status == 200
    assert_answers(response, classifier.predict(texts[:2], 2))


def test_queued_request_is_dropped_after_timeout(classifier, texts):
    engine = GatedEngine(classifier.engine)
    running = Running(engine.classify(classifier), timeout=2.0)
    with ThreadPoolExecutor(1) as pool:
        computed = pool.submit(running.predict, {"texts": texts[:2]})
        assert engine.entered.wait(60)
        status, response = running.predict({"texts": texts[2:5]})  # queued behind the first
        assert (status, response["error"]) == (504, "not answered within 2 seconds")
        assert computed.result()[0] == 504
    running.wait_for(waiting=5)
    engine.gate.set()
    running.wait_for(waiting=0)
    running.stop()
    assert engine.texts == 2


def test_every_request_gets_503_after_engine_failure(classifier, texts):
    engine = GatedEngine(classifier.engine, fails=True)
    running = Running(engine.classify(classifier))
    with ThreadPoolExecutor(3) as pool:
        responses = [pool.submit(running.predict, {"texts": texts[i : i + 2]}) for i in range(3)]
        running.wait_for(waiting=6)
        engine.gate.set()
        assert {response.result()[0] for response in responses} == {503}
    assert running.predict({"texts": texts[:1]})[0] == 503
    assert running.call("GET", "/healthz")[0] == 503
    running.stop()


def test_long_text_is_not_starved_by_short_texts(classifier, texts):
    scheduler = classifier.make_scheduler(2, wait=20)
    short = texts[0]
    (request,) = classifier.encode(["word1 " * 25])
    scheduler.admit(request)
    for number in range(100):
        for more in classifier.encode([short, short], 10 * number + 1):
            scheduler.admit(more)
        scheduler.step()
        if request.exit >= 0:
            break
    assert request.length == 32
    # At each of three stages it waits for at most 20 other texts, which are admitted in pairs.
    assert 10 <= number <= 3 * (20 // 2 + 2)


def test_web_page_shows_prediction_and_exits(server, browser, classifier, texts):
    browser.get(f"http://127.0.0.1:{server.port}/")
    browser.find_element("css selector", "textarea").send_keys(texts[0])
    value = browser.find_element("id", "value")
    assert not value.is_enabled()
    browser.find_element("css selector", "#target [value=threshold]").click()
    value.clear()
    assert browser.execute_script("return document.getElementById('form').checkValidity()") is False
    value.send_keys("2.5")
    browser.find_element("id", "go").click()
    deadline = time.monotonic() + 30
    while len(rows := browser.find_elements("css selector", "#exits tr")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    expected = classifier.at(threshold=2.5).predict(texts[:1], 2)
    shown = browser.find_element("id", "result").text
    assert shown.startswith(f"{expected.labels[0]} ({100 * expected.probabilities.max():.1f}%)")
    assert "exited at layer 4, cost 1.000" in shown
    assert [row.get_attribute("class") for row in rows] == ["", "", "taken"]
    options = browser.find_elements("css selector", "#target option")
    assert {option.get_attribute("value"): option.text for option in options} == {
        "": "the server's default",
        "threshold": "confidence threshold",
        "cost": "mean cost at most",
        "accuracy": "accuracy at least",
    }
    assert browser.get_log("browser") == []
    browser.execute_script("fetch = async () => new Response('<h1>Proxy</h1>', {status: 502})")
    browser.find_element("id", "go").click()
    while not (results := browser.find_elements("css selector", "#result.error")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert results[0].text == "the server answered with status 502"


def test_web_page_offers_the_targets_that_the_model_has(classifier, monkeypatch):
    offered = _describe_targets(classifier)
    assert offered["accuracy"] == "accuracy at least"
    assert "error" not in offered
    assert "milliseconds" not in offered
    monkeypatch.setattr("sweet_jax.server.app.read_latency", lambda *_: object())
    assert _describe_targets(classifier)["milliseconds"] == "mean milliseconds at most"
    values = {"objective": REGRESSION, "metric": "neg_mean_absolute_error"}
    model = dataclasses.replace(classifier.model, **values)
    fields = {"model": model, "engine": classifier.engine, "policy": "stability"}
    offered = _describe_targets(SimpleNamespace(**fields))
    assert offered["error"] == "mean absolute error at most"
    assert "accuracy" not in offered


def wait_until_accepted(client, count: int) -> None:
    """Returns once `count` texts wait or are answered: on a slow machine, some may be answered."""
    deadline = time.monotonic() + 60
    pattern = r"^sweet_jax_(?:texts_total\{.*\}|waiting_texts) (\S+)$"
    accepted = 0.0
    while accepted < count:
        metrics = client.call("GET", "/metrics")[1].decode()
        accepted = sum(map(float, re.findall(pattern, metrics, re.MULTILINE)))
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_serve_command_answers_accepted_requests_after_sigterm(fine_tuned, texts):
    command = [sys.executable, "-m", "sweet_jax.serve", f"--model={fine_tuned[0] / 'model'}"]
    process = subprocess.Popen(
        [*command, "--port=0", "--batch_size=2", "--threshold=0.8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), process.communicate()
        client = Running.__new__(Running)
        client.port = int(line.rsplit(":", 1)[1])
        with ThreadPoolExecutor(4) as pool:
            # The first request compiles, so that none is finished when the signal arrives, unless
            # this process was stalled for as long.
            responses = [pool.submit(client.predict, {"texts": texts[i : i + 4]}) for i in range(4)]
            wait_until_accepted(client, 16)
            process.send_signal(signal.SIGTERM)
            assert [response.result()[0] for response in responses] == [200] * 4
        (log_line,) = process.communicate(timeout=60)[1].splitlines()
        assert log_line.startswith("engine: ")
        assert process.returncode == 0
    finally:
        process.kill()


def test_plain_benchmark_server_answers_as_full_model(fine_tuned, classifier, texts):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    from experiments.benchmarks import plain_server

    running = Running.__new__(Running)
    app = plain_server.make_app(str(fine_tuned[0] / "model"), "float32")
    running.start(uvicorn.Config(app, port=0, log_level="error"))
    status, response = running.predict({"texts": texts[:5]})
    assert running.predict(b"rubbish")[0] == 400
    running.stop()
    expected = classifier.at(threshold=2.0).predict(texts[:5], 2)
    assert status == 200
    assert [answer["label"] for answer in response["answers"]] == expected.labels.tolist()
    probabilities = [answer["probability"] for answer in response["answers"]]
    np.testing.assert_allclose(probabilities, expected.probabilities.max(axis=1), atol=1e-4)


def test_invalid_serve_options_are_refused_in_one_line(capsys, tmp_path):
    assert serve.main([f"--model={tmp_path}", "--port=0"]) == 2
    assert serve.main(["--model=x", "--timeout=0"]) == 2
    assert serve.main(["--model=x", "--port=99999"]) == 2
    assert serve.main(["--model=x", "--host=not.a.host.invalid"]) == 2
    assert serve.main(["--model=x", "--host=a..b"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "config.json" in error[0]
    assert error[1] == "error: --timeout must be more than 0; got 0.0"
    assert error[2] == "error: --port must be from 0 (any free port) to 65535; got 99999"
    assert error[3].startswith("error: cannot serve at not.a.host.invalid:8000")
    assert error[4] == "error: cannot serve at a..b:8000: this is not a host name"
    assert len(error) == 5
