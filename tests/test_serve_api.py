"""The server's formats, what its OpenAPI document says of them, and connections without requests.

The model is a NumPy one: nothing is trained or compiled here.
"""

import collections
import dataclasses
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time

import jsonschema
import numpy as np
import pytest
from numpy_engine import NumpyEngine

from experiments.launch import check_dockerfile
from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.errors import UserError
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.objectives import SINGLE_LABEL

uvicorn = pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
from test_serve import GatedEngine, Running  # noqa: E402 - after the packages it needs

from sweet_jax import serve  # noqa: E402 - likewise
from sweet_jax.server.app import make_app  # noqa: E402 - likewise
from sweet_jax.server.connections import close_silent_connections  # noqa: E402 - likewise
from sweet_jax.server.requests import Limits  # noqa: E402 - likewise

LAYERS, CLASSES = (1, 3, 4), ("a", "b", "c")
LIMITS = {"texts": 4, "characters": 300, "body": 5000}


@pytest.fixture(scope="module")
def model(checkpoint) -> ModelArtifact:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(3, 40, 3)), rng.integers(0, 3, 40)
    calibration = ExitOutputs(logits, labels, np.asarray(LAYERS))
    return ModelArtifact(
        folder=checkpoint,
        tokenizer=load_tokenizer(open_checkpoint(str(checkpoint))),
        task="fake",
        metric="accuracy",
        policy="raw_confidence",
        pooling="mean",
        text_columns=("text",),
        classes=CLASSES,
        layers=LAYERS,
        cost=calibration.cost,
        max_length=32,
        median_tokens=10,
        resolver=make_resolver(calibration, ("raw_confidence", "patience")),
        networks=(),
        objective=SINGLE_LABEL,
    )


@pytest.fixture(scope="module")
def engine(model) -> NumpyEngine:
    return NumpyEngine(LAYERS, len(CLASSES), len(model.tokenizer))


@pytest.fixture(scope="module")
def classifier(model, engine) -> AdaptiveClassifier:
    return AdaptiveClassifier(model, target={"threshold": 0.6}, engine=engine)


@pytest.fixture(scope="module")
def server(classifier):
    running = Running(classifier, **LIMITS)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def pair_server(model, engine):
    model = dataclasses.replace(model, text_columns=("question", "answer"))
    running = Running(AdaptiveClassifier(model, target={"threshold": 0.6}, engine=engine), **LIMITS)
    yield running
    running.stop()


def ask(server, path: str, body) -> tuple[int, object]:
    status, found = server.call("POST", path, json.dumps(body))
    return status, json.loads(found)


def document_of(server) -> dict:
    status, found = server.call("GET", "/openapi.json")
    assert status == 200
    return json.loads(found)


def is_valid(document: dict, schema: dict, value) -> bool:
    schema = schema | {"components": document["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_the_versioned_route_answers_as_the_first_one(server, classifier):
    body = {"texts": ["word1 word2", "word3"], "policy": "patience", "threshold": 2, "detail": True}
    assert ask(server, "/v1/predict", body) == ask(server, "/predict", body)
    wanted = classifier.at("patience", threshold=2).predict(body["texts"])
    status, found = ask(server, "/v1/predict", body)
    assert status == 200
    assert [answer["label"] for answer in found["answers"]] == wanted.labels.tolist()
    status, found = ask(server, "/v1/predict", {"inputs": "word1"})
    assert (status, "unknown key 'inputs'" in found["error"]) == (400, True)


@pytest.mark.parametrize("path", ["/predict", "/"])
def test_the_client_of_another_server_gets_every_class_with_its_score(server, classifier, path):
    texts = ["word1 word2", "word3", "word9"]
    probabilities = classifier.predict(texts).probabilities  # [N, C]
    for inputs in (texts[0], texts[:1]):
        status, found = ask(server, path, {"inputs": inputs, "parameters": {"top_k": 2}})
        assert status == 200
        order = np.argsort(-probabilities[0])
        assert [one["label"] for one in found] == [CLASSES[c] for c in order]
        scores = [one["score"] for one in found]
        np.testing.assert_allclose(scores, probabilities[0, order], atol=1e-6)
    status, found = ask(server, path, {"inputs": [[text] for text in texts]})
    assert status == 200
    assert [row[0]["label"] for row in found] == [CLASSES[c] for c in probabilities.argmax(axis=1)]
    assert [len(row) for row in found] == [3, 3, 3]


def test_raw_scores_are_logits_at_a_target_of_their_own(server, engine, model):
    body = {"inputs": "word1 word2", "raw_scores": True, "threshold": 2}  # to the last exit
    status, found = ask(server, "/predict", body)
    assert status == 200
    logits = engine.one_pass(model.tokenizer("word1 word2")["input_ids"])[-1]
    wanted = sorted(zip(logits.tolist(), CLASSES, strict=True), reverse=True)
    assert [one["label"] for one in found] == [label for _, label in wanted]
    np.testing.assert_allclose([one["score"] for one in found], [s for s, _ in wanted], atol=1e-5)


def test_a_long_text_is_cut_on_the_side_that_is_asked_for_or_refused(server):
    words = [f"word{i}" for i in range(35)]

    def scores(text: str, **options) -> list[dict]:
        status, found = ask(server, "/predict", {"inputs": text, "threshold": 2, **options})
        assert status == 200, found
        return found

    left, right = " ".join(words[-30:]), " ".join(words[:30])  # and two special tokens
    whole = " ".join(words)
    assert scores(whole) == scores(whole, truncation_direction="Right") == scores(right)
    assert scores(whole, truncation_direction="left") == scores(left) != scores(right)
    assert scores(right, truncate=False) == scores(right)
    status, found = ask(server, "/predict", {"inputs": whole, "truncate": False})
    assert status == 422
    assert "37 tokens, but this model takes at most 32" in found["error"]
    assert scores(whole) == scores(right)  # nothing of this stays


def test_pairs_in_both_formats(pair_server):
    pair = ["word1 word2", "word3"]
    status, found = ask(pair_server, "/v1/predict", {"texts": [pair, pair[::-1]]})
    assert status == 200
    labels = [answer["label"] for answer in found["answers"]]
    status, single = ask(pair_server, "/predict", {"inputs": pair})
    assert (status, single[0]["label"]) == (200, labels[0])
    status, batch = ask(pair_server, "/predict", {"inputs": [pair, pair[::-1]]})
    assert (status, [row[0]["label"] for row in batch]) == (200, labels)
    status, found = ask(pair_server, "/predict", {"inputs": "word1"})
    assert (status, found["error_type"]) == (422, "Validation")
    assert "takes pairs" in found["error"]


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"inputs": []}, 400, "Empty", "cannot be empty"),
        ({"inputs": ""}, 400, "Empty", "cannot be empty"),
        ({"inputs": [["word1"], [""]]}, 400, "Empty", "cannot be empty"),
        ({"inputs": 5}, 422, "Validation", "must be a text"),
        ({"inputs": {"word1": 1}}, 422, "Validation", "must be a text"),
        ({"inputs": [["word1"], "word2"]}, 422, "Validation", "must be a text"),
        ({"inputs": ["word1", "word2"]}, 422, "Validation", "a batch is [[text], ...]"),
        ({"inputs": ["word1", "word2", "word3"]}, 422, "Validation", "must be a text"),
        ({"inputs": "word1", "raw_scores": 1}, 422, "Validation", "raw_scores must be true"),
        ({"inputs": "word1", "truncation_direction": "up"}, 422, "Validation", "left or right"),
        ({"inputs": "word1", "cost": 0.01}, 422, "Validation", "infeasible"),
        ({"inputs": [["word1"]] * 5}, 413, "Validation", "may have at most 4 texts"),
        ({"inputs": "a" * 301}, 413, "Validation", "may have at most 300 characters"),
    ],
)
def test_what_is_refused_as_the_other_server_would(server, body, status, kind, message):
    found = ask(server, "/predict", body)
    assert (found[0], found[1]["error_type"]) == (status, kind)
    assert message in found[1]["error"]
    schema = response_schema(document_of(server), "/", status)
    assert is_valid(document_of(server), schema, found[1])


def test_a_full_queue_and_a_failed_device_as_the_other_server_says_it(classifier):
    engine = GatedEngine(classifier.engine, fails=True)
    running = Running(engine.classify(classifier), waiting=1)
    thread = threading.Thread(target=ask, args=(running, "/predict", {"inputs": "word1"}))
    thread.start()
    assert engine.entered.wait(60)
    assert running.call("GET", "/health") == (200, b"")
    status, found = ask(running, "/predict", {"inputs": "word1"})
    assert (status, found["error_type"]) == (429, "Overloaded")
    engine.gate.set()
    thread.join()
    status, found = ask(running, "/predict", {"inputs": "word1"})
    assert (status, found["error_type"]) == (424, "Backend")
    status, found = running.call("GET", "/health")
    assert (status, json.loads(found)["error_type"]) == (503, "Unhealthy")
    running.stop()


def response_schema(document: dict, path: str, status: int) -> dict:
    responses = document["paths"][path]["post"]["responses"]
    return responses[str(status)]["content"]["application/json"]["schema"]


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v2/predict", 404, None),
        ("POST", "/predict/", 404, None),
        ("GET", "/v1/predict", 405, "POST"),
    ],
)
def test_a_path_or_a_method_that_there_is_not_is_refused_in_json(
    server, method, path, status, allowed
):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path)
    found = connection.getresponse()
    assert (found.status, found.getheader("Allow")) == (status, allowed)
    assert found.getheader("Content-Type") == "application/json"
    assert "/openapi.json" in json.loads(found.read())["error"]
    connection.close()


def test_the_document_lists_the_routes_that_there_are(server, classifier):
    routes = make_app(classifier, 2, Limits()).routes
    there_are = {(r.path, m.lower()) for r in routes for m in r.methods if m != "HEAD"}
    paths = document_of(server)["paths"]
    assert {(path, method) for path in paths for method in paths[path]} == there_are


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/predict", {"texts": ["word1"]}, 200),
        ("/v1/predict", {"texts": ["word1"], "detail": True, "policy": None, "cost": 1.0}, 200),
        ("/v1/predict", {"texts": ["word1"], "risk": 0.9, "level": 0.8}, 200),
        ("/v1/predict", {"texts": []}, 400),
        ("/v1/predict", {"texts": ["word1"], "cots": 1}, 400),
        ("/v1/predict", {"texts": [5]}, 400),
        ("/v1/predict", {"texts": ["word1"], "accuracy": 1.5}, 400),
        ("/v1/predict", {"texts": ["word1"], "policy": "sure"}, 400),
        ("/v1/predict", {"texts": ["word1"], "policy": "os:system"}, 400),
        ("/v1/predict", {"texts": ["word1"] * 5}, 413),
        ("/v1/predict", {"texts": ["a" * 301]}, 413),
        ("/predict", {"texts": ["word1"]}, 200),
        ("/predict", {"inputs": "word1"}, 200),
        ("/", {"inputs": [["word1"], ["word2"]], "truncation_direction": "left"}, 200),
        ("/", {"inputs": "word1", "truncate": "yes"}, 422),
        ("/", {"inputs": ""}, 400),
        ("/", {}, 422),
    ],
)
def test_the_document_describes_requests_and_answers(server, path, body, status):
    document = document_of(server)
    found = ask(server, path, body)
    assert found[0] == status
    (content,) = document["paths"][path]["post"]["requestBody"]["content"].values()
    assert is_valid(document, content["schema"], body) == (status == 200)
    assert is_valid(document, response_schema(document, path, status), found[1])


def closes_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def test_connections_without_a_request_are_closed_and_others_are_not(classifier):
    app = make_app(classifier, 2, Limits())
    settings = uvicorn.Config(app, port=0, log_level="error", timeout_keep_alive=60)
    close_silent_connections(settings, 0.4)
    running = Running.__new__(Running)
    running.start(settings)
    ask_once = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    sent = {"nothing": b"", "half a head": ask_once[:20], "half of another": ask_once + b"GET /h"}
    connections = {}
    for name, data in sent.items():
        connections[name] = socket.create_connection(("127.0.0.1", running.port))
        connections[name].sendall(data)
    asks = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    asks.connect()
    asks.auto_open = 0  # it is the same connection all the time
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:  # several times the timeout, with a request in each
        asks.request("GET", "/healthz")
        assert json.loads(asks.getresponse().read())["status"] == "ok"
        time.sleep(0.05)
    slow = socket.create_connection(("127.0.0.1", running.port))
    slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n")
    assert not closes_within(slow, 1.2)  # the body has a time limit of its own
    for name in ("nothing", "half a head"):
        assert closes_within(connections[name], 0.1), name
    while connections["half of another"].recv(1000):
        pass  # its answer, and then the end
    for connection in (slow, asks, *connections.values()):
        connection.close()
    running.stop()


def test_the_check_of_the_dockerfile_refuses_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match="is not a model exported by sweet-jax export"):
        check_dockerfile.main([f"--model={tmp_path}"])


def test_the_dockerfile_installs_the_extras_and_starts_the_server_of_this_checkout(server):
    steps = check_dockerfile.read_steps(check_dockerfile.DOCKERFILE)
    sources = [name for s in steps if s.instruction == "COPY" for name in s.text.split()[:-1]]
    there = [name for name in sources if (check_dockerfile.ROOT / name).exists()]
    assert [name for name in sources if name not in there] == ["--from=build", "/opt/venv"]
    assert int(check_dockerfile.last(steps, "USER").split(":")[0]) > 0
    (wanted,) = [s.text for s in steps if "optional-dependencies" in s.text]
    program = wanted.partition(" -c ")[2].rpartition(" > ")[0].strip('"')
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=check_dockerfile.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = {re.split("[>=]", line)[0] for line in printed.split()}
    assert {"onnxruntime", "tokenizers", "numpy", "starlette", "uvicorn"} <= names
    assert not {"jax", "flax", "transformers", "datasets"} & names
    command = check_dockerfile.command_of(check_dockerfile.last(steps, "ENTRYPOINT"))
    assert command[:2] == ["sweet-jax", "serve"]
    assert serve._parse(command[2:]).port == 8000
    probe = check_dockerfile.command_of(check_dockerfile.last(steps, "HEALTHCHECK"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        for port, healthy in ((server.port, True), (silent.getsockname()[1], False)):
            program = probe[-1].replace("8000", str(port))
            done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
            assert (done.returncode == 0) == healthy


@pytest.fixture
def api(server):
    """The document as schemathesis reads it, which makes requests as odd as it allows."""
    schemathesis = pytest.importorskip("schemathesis", reason='pip install -e ".[test]"')
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


@pytest.mark.slow
def test_requests_made_from_the_document_get_answers_that_it_describes(api):
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    described = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    statuses = collections.Counter()

    def check(case):
        response = case.call()
        # That check does not know that 413 is a refusal.
        refused = [] if response.status_code == 413 else [checks.negative_data_rejection]
        case.validate_response(response, checks=described + refused)
        statuses[response.status_code] += 1

    for operation in (found.ok() for found in api.get_all_operations()):
        for mode in GenerationMode:
            if mode == GenerationMode.NEGATIVE and operation.method == "get":
                continue  # which has nothing that could be wrong
            cases = operation.as_strategy(generation_mode=mode)
            limits = settings(
                max_examples=12,
                deadline=None,
                derandomize=True,
                suppress_health_check=HealthCheck,
            )
            limits(given(cases)(check))()
    assert statuses[200] > 10
    assert statuses[400] + statuses[422] > 10
