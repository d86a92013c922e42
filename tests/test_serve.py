"""The server: right answers under load, a status for whatever is wrong, nothing lost at the end."""

import gc
import http.client
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sweet_jax import AdaptiveClassifier
from sweet_jax.config import from_mapping
from sweet_jax.data.load import load_dataset

uvicorn = pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
from sweet_jax import serve  # noqa: E402 - after the packages it needs
from sweet_jax.server.app import Limits, make_app  # noqa: E402 - likewise
from sweet_jax.server.worker import Worker  # noqa: E402 - likewise


class Running:
    """A server in a thread, at a free port."""

    def __init__(self, classifier, audit=None, **limits):
        app = make_app(classifier, 2, Limits(**limits), audit)
        self.start(uvicorn.Config(app, port=0, log_level="error"))

    def start(self, settings) -> None:
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
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
        """Returns once so many texts wait or are computed."""
        deadline = time.monotonic() + 60
        while json.loads(self.call("GET", "/healthz")[1])["waiting"] != waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def predict(self, asked) -> tuple[int, dict]:
        body = asked if isinstance(asked, bytes) else json.dumps(asked)
        status, found = self.call("POST", "/predict", body)
        return status, json.loads(found)


class GatedEngine:
    """The engine of a classifier, except that its runs wait until the gate is set.

    Then they fail, or the first exit's logits are not numbers, where that is asked for.
    """

    def __init__(self, engine, *, fails=False, diverged=False):
        self.engine, self.fails, self.diverged = engine, fails, diverged
        self.entered, self.gate = threading.Event(), threading.Event()
        self.texts = 0  # that were embedded

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def classify(self, classifier) -> AdaptiveClassifier:
        """The classifier with this engine."""
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
    every = [text for (text,) in load_dataset(values).validation.texts]
    return sorted(every, key=lambda text: len(text.split()))[:16]  # fewer lengths to compile for


@pytest.fixture(scope="module")
def classifier(fine_tuned):
    return AdaptiveClassifier.from_pretrained(fine_tuned[0] / "model", threshold=0.8)


@pytest.fixture(scope="module")
def server(classifier):
    running = Running(classifier, texts=8, body=20000, characters=5000)
    yield running
    running.stop()


def assert_answers(found: dict, wanted) -> None:
    answers = found["answers"]
    assert [a["label"] for a in answers] == wanted.labels.tolist()
    assert [a["exit"] for a in answers] == wanted.exits.tolist()
    np.testing.assert_allclose(
        [a["probability"] for a in answers], wanted.probabilities.max(axis=1), atol=1e-5
    )
    np.testing.assert_allclose([a["cost"] for a in answers], wanted.cost)


def test_many_clients_get_their_own_answers(server, classifier, texts):
    """Each with its own texts and target, all in the same batches."""
    targets = [{}, {"threshold": 0.55}, {"policy": "patience", "threshold": 2}, {"threshold": 2}]
    wanted = {}
    for number, target in enumerate(targets):
        own = classifier.at(target.get("policy"), threshold=target.get("threshold", 0.8))
        for start in range(0, len(texts) - 3, 3):
            wanted[number, start] = own.predict(texts[start : start + 3], 2)

    def ask(key):
        number, start = key
        return key, server.predict({"texts": texts[start : start + 3], **targets[number]})

    with ThreadPoolExecutor(16) as pool:
        for key, (status, found) in pool.map(ask, list(wanted) * 2):
            assert status == 200, found
            assert_answers(found, wanted[key])


def test_detail_shows_every_exit_on_the_way(server, classifier, texts):
    _, found = server.predict({"texts": texts[:1], "threshold": 2, "detail": True})
    (answer,) = found["answers"]
    assert [e["layer"] for e in answer["exits"]] == [2, 3, 4]
    assert answer["exits"][-1]["probability"] == answer["probability"]
    first = classifier.at(threshold=0.0).predict(texts[:1], 2)
    assert answer["exits"][0]["probability"] == pytest.approx(first.probabilities.max(), abs=1e-5)


def test_detail_of_an_exit_that_diverged_has_no_prediction(classifier, texts):
    engine = GatedEngine(classifier.engine, diverged=True)
    engine.gate.set()
    running = Running(engine.classify(classifier))
    target = {"policy": "confidence", "threshold": 0.0}
    status, found = running.predict({"texts": texts[:1], "detail": True, **target})
    running.stop()
    assert status == 200
    exits = found["answers"][0]["exits"]
    assert exits[0] == {"layer": 2, "label": None, "probability": None}
    assert len(exits) == 2  # the first sound one is taken, whatever the threshold
    assert exits[1]["probability"] == found["answers"][0]["probability"] > 0


def test_operating_points_are_kept_by_many_threads_and_not_too_many(classifier):
    worker = Worker(classifier, 2, 100)
    asked = [i / 1000 for i in range(600)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda t: worker.at(None, {"threshold": t}), asked))
    assert [c.threshold for c in found] == asked
    assert worker.at(None, {"threshold": asked[-1]}) is found[-1]
    references = [weakref.ref(c) for c in found]
    del found
    gc.collect()
    assert sum(r() is not None for r in references) == 256


def test_warm_up_compiles_what_the_server_runs_whatever_its_target(classifier):
    full = AdaptiveClassifier(classifier.model, target={"threshold": float("inf")})
    full.warm_up(2, [20], full=False)
    before, worker = full.engine.compilations, Worker(full, 2, 100)
    assert (len(worker.scheduler.stages), len(full.make_scheduler(2).stages)) == (3, 1)
    for key in itertools.product(worker.scheduler.stages, (1, 2), (24,)):
        full.engine.compile(*key, worker.scheduler.slots)
    assert full.engine.compilations == before == 6


def test_an_address_that_another_process_took_while_the_model_was_read(
    classifier, monkeypatch, capsys
):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]

        def load(*_, **__):
            other.listen()
            return classifier

        monkeypatch.setattr(AdaptiveClassifier, "from_pretrained", load)
        assert serve.main(["--model=x", f"--port={port}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot serve at 127.0.0.1:{port}: Address already in use")


@pytest.mark.parametrize(
    ("asked", "status", "message"),
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
        ({"texts": ["a"], "cost": 0.01}, 400, "infeasible"),
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
def test_what_is_refused(server, asked, status, message):
    found = server.predict(asked)
    assert found[0] == status
    assert message in found[1]["error"]
    assert server.predict({"texts": ["word1"]})[0] == 200  # and the server goes on


def test_a_body_too_large_is_answered_when_the_client_has_sent_it(server):
    """An answer before that would be lost: the connection would close under a client that sends."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(16 * 20000))
    connection.endheaders()
    for _ in range(16):
        connection.send(b"x" * 20000)
        time.sleep(0.05)
    found = connection.getresponse()
    assert found.status == 413
    assert b"may have at most 20000 bytes" in found.read()
    connection.close()


def test_a_body_without_end_is_cut_off(server):
    """What says no length: refused at the limit, not when the client is done."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(6):
        connection.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
    assert connection.getresponse().status == 413
    connection.close()
    assert server.predict({"texts": ["word1"]})[0] == 200


def test_health_and_metrics(server):
    server.predict({"texts": ["word1", "word2"]})
    assert json.loads(server.call("GET", "/healthz")[1])["status"] == "ok"
    found = server.call("GET", "/metrics")[1].decode()
    assert 'sweet_jax_requests_total{status="200"}' in found
    counted = [float(x.split()[-1]) for x in found.splitlines() if "texts_total{exit" in x]
    assert sum(counted) >= 2
    assert "sweet_jax_waiting_texts 0.0" in found


def test_a_bug_is_counted_as_status_500(server, monkeypatch):
    async def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sweet_jax.server.app._classify", fail)
    assert server.call("POST", "/v1/predict", b'{"texts": ["a"]}')[0] == 500
    found = server.call("GET", "/metrics")[1].decode()
    assert 'sweet_jax_requests_total{status="500"} 1.0' in found


def test_a_full_queue_says_so_and_the_end_answers_what_was_taken_in(classifier, texts):
    engine = GatedEngine(classifier.engine)
    running = Running(engine.classify(classifier), waiting=3)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.predict, {"texts": texts[:2]})
        running.wait_for(waiting=2)
        status, found = running.predict({"texts": texts[:2]})
        assert (status, found["error"]) == (503, "too many texts are waiting: try again later")
        status, found = running.predict({"texts": texts[:4]})
        assert (status, found["error"]) == (413, "a request may have at most 3 texts; got 4")
        running.server.should_exit = True  # what SIGTERM does
        time.sleep(0.3)
        assert not first.done()
        engine.gate.set()
        status, found = first.result()
    running.thread.join()
    assert status == 200
    assert_answers(found, classifier.predict(texts[:2], 2))


def test_a_request_nobody_waits_for_any_more_is_dropped(classifier, texts):
    engine = GatedEngine(classifier.engine)
    running = Running(engine.classify(classifier), timeout=0.4)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.predict, {"texts": texts[:2]})
        assert engine.entered.wait(60)
        status, found = running.predict({"texts": texts[2:5]})  # waits for the engine
        assert (status, found["error"]) == (504, "not answered within 0.4 seconds")
        assert first.result()[0] == 504
    running.wait_for(waiting=5)
    engine.gate.set()
    running.wait_for(waiting=0)
    running.stop()
    assert engine.texts == 2


def test_every_request_learns_of_a_device_that_fails(classifier, texts):
    engine = GatedEngine(classifier.engine, fails=True)
    running = Running(engine.classify(classifier))
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(running.predict, {"texts": texts[i : i + 2]}) for i in range(3)]
        running.wait_for(waiting=6)
        engine.gate.set()
        assert {a.result()[0] for a in asked} == {503}
    assert running.predict({"texts": texts[:1]})[0] == 503
    assert running.call("GET", "/healthz")[0] == 503
    running.stop()


def test_a_long_text_is_not_starved_by_short_ones(classifier, texts):
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
    # At each of three stages it may see 20 others admitted, which come by twos.
    assert 10 <= number <= 3 * (20 // 2 + 2)


def test_the_page_in_a_browser(server, browser, classifier, texts):
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
    wanted = classifier.at(threshold=2.5).predict(texts[:1], 2)
    shown = browser.find_element("id", "result").text
    assert shown.startswith(f"{wanted.labels[0]} ({100 * wanted.probabilities.max():.1f}%)")
    assert "exited at layer 4, cost 1.000" in shown
    assert [row.get_attribute("class") for row in rows] == ["", "", "taken"]
    assert [entry for entry in browser.get_log("browser") if "favicon" not in str(entry)] == []
    browser.execute_script("fetch = async () => new Response('<h1>Proxy</h1>', {status: 502})")
    browser.find_element("id", "go").click()
    result = browser.find_element("css selector", "#result.error")
    assert result.text == "the server answered with status 502"


def test_the_command_answers_what_it_took_in_before_it_ends(fine_tuned, texts):
    """SIGTERM with requests under way: each is answered, and the status is 0."""
    command = [sys.executable, "-m", "sweet_jax.serve", f"--model={fine_tuned[0] / 'model'}"]
    process = subprocess.Popen(
        [*command, "--port=0", "--batch_size=2", "--threshold=0.8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("serving "), process.communicate()
    client = Running.__new__(Running)
    client.port = int(line.rsplit(":", 1)[1])
    with ThreadPoolExecutor(4) as pool:
        # The first request compiles, so that these are under way when the signal comes.
        asked = [pool.submit(client.predict, {"texts": texts[i : i + 4]}) for i in range(4)]
        client.wait_for(waiting=16)
        process.send_signal(signal.SIGTERM)
        assert [a.result()[0] for a in asked] == [200] * 4
    (told,) = process.communicate(timeout=60)[1].splitlines()
    assert told.startswith("engine: ")
    assert process.returncode == 0


def test_the_plain_server_of_the_load_test_answers_as_the_full_model(fine_tuned, classifier, texts):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    from experiments.benchmarks import plain_server

    running = Running.__new__(Running)
    app = plain_server.make_app(str(fine_tuned[0] / "model"), "float32")
    running.start(uvicorn.Config(app, port=0, log_level="error"))
    status, found = running.predict({"texts": texts[:5]})
    assert running.predict(b"rubbish")[0] == 400
    running.stop()
    wanted = classifier.at(threshold=2.0).predict(texts[:5], 2)
    assert status == 200
    assert [answer["label"] for answer in found["answers"]] == wanted.labels.tolist()
    probabilities = [answer["probability"] for answer in found["answers"]]
    np.testing.assert_allclose(probabilities, wanted.probabilities.max(axis=1), atol=1e-4)


def test_bad_options(capsys, tmp_path):
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
