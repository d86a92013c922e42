"""Tests of the server's request formats, OpenAPI document, silent connections and Dockerfile.

The engine computes with NumPy, so that nothing is trained or compiled.
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
    status, response = server.call("POST", path, json.dumps(body))
    return status, json.loads(response)


def get_document(server) -> dict:
    status, response = server.call("GET", "/openapi.json")
    assert status == 200
    return json.loads(response)


def is_valid(document: dict, schema: dict, value) -> bool:
    schema = schema | {"components": document["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_v1_predict_answers_as_unversioned_route(server, classifier):
    body = {"texts": ["word1 word2", "word3"], "policy": "patience", "threshold": 2, "detail": True}
    assert ask(server, "/v1/predict", body) == ask(server, "/predict", body)
    expected = classifier.at("patience", threshold=2).predict(body["texts"])
    status, response = ask(server, "/v1/predict", body)
    assert status == 200
    assert [answer["label"] for answer in response["answers"]] == expected.labels.tolist()
    status, response = ask(server, "/v1/predict", {"inputs": "word1"})
    assert (status, "unknown key 'inputs'" in response["error"]) == (400, True)


@pytest.mark.parametrize("path", ["/predict", "/"])
def test_tei_request_gets_score_of_every_class(server, classifier, path):
    texts = ["word1 word2", "word3", "word9"]
    probabilities = classifier.predict(texts).probabilities  # [N, C]
    for inputs in (texts[0], texts[:1]):
        status, response = ask(server, path, {"inputs": inputs, "parameters": {"top_k": 2}})
        assert status == 200
        order = np.argsort(-probabilities[0])
        assert [answer["label"] for answer in response] == [CLASSES[c] for c in order]
        scores = [answer["score"] for answer in response]
        np.testing.assert_allclose(scores, probabilities[0, order], atol=1e-6)
    status, response = ask(server, path, {"inputs": [[text] for text in texts]})
    assert status == 200
    assert [row[0]["label"] for row in response] == [
        CLASSES[c] for c in probabilities.argmax(axis=1)
    ]
    assert [len(row) for row in response] == [3, 3, 3]


def test_tei_raw_scores_are_logits_at_requested_target(server, engine, model):
    body = {"inputs": "word1 word2", "raw_scores": True, "threshold": 2}  # to the last exit
    status, response = ask(server, "/predict", body)
    assert status == 200
    logits = engine.one_pass(model.tokenizer("word1 word2")["input_ids"])[-1]
    expected = sorted(zip(logits.tolist(), CLASSES, strict=True), reverse=True)
    assert [answer["label"] for answer in response] == [label for _, label in expected]
    np.testing.assert_allclose(
        [answer["score"] for answer in response], [s for s, _ in expected], atol=1e-5
    )


def test_tei_long_text_is_truncated_on_requested_side_or_refused(server):
    words = [f"word{i}" for i in range(35)]

    def scores(text: str, **options) -> list[dict]:
        status, response = ask(server, "/predict", {"inputs": text, "threshold": 2, **options})
        assert status == 200, response
        return response

    left, right = " ".join(words[-30:]), " ".join(words[:30])  # 30 words and two special tokens
    full = " ".join(words)
    assert scores(full) == scores(full, truncation_direction="Right") == scores(right)
    assert scores(full, truncation_direction="left") == scores(left) != scores(right)
    assert scores(right, truncate=False) == scores(right)
    status, response = ask(server, "/predict", {"inputs": full, "truncate": False})
    assert status == 422
    assert "37 tokens, but this model takes at most 32" in response["error"]
    assert scores(full) == scores(right)  # options apply to one request only


def test_pairs_are_accepted_in_both_request_formats(pair_server):
    pair = ["word1 word2", "word3"]
    status, response = ask(pair_server, "/v1/predict", {"texts": [pair, pair[::-1]]})
    assert status == 200
    labels = [answer["label"] for answer in response["answers"]]
    status, single = ask(pair_server, "/predict", {"inputs": pair})
    assert (status, single[0]["label"]) == (200, labels[0])
    status, batch = ask(pair_server, "/predict", {"inputs": [pair, pair[::-1]]})
    assert (status, [row[0]["label"] for row in batch]) == (200, labels)
    status, response = ask(pair_server, "/predict", {"inputs": "word1"})
    assert (status, response["error_type"]) == (422, "Validation")
    assert "takes pairs" in response["error"]


@pytest.mark.parametrize(
    ("body", "status", "error_type", "message"),
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
        ({"inputs": "word1", "cost": 0.01}, 422, "Validation", "cannot be met"),
        ({"inputs": [["word1"]] * 5}, 413, "Validation", "may have at most 4 texts"),
        ({"inputs": "a" * 301}, 413, "Validation", "may have at most 300 characters"),
    ],
)
def test_invalid_tei_request_gets_status_and_error_type(server, body, status, error_type, message):
    actual_status, response = ask(server, "/predict", body)
    assert (actual_status, response["error_type"]) == (status, error_type)
    assert message in response["error"]
    document = get_document(server)
    assert is_valid(document, response_schema(document, "/", status), response)


def test_tei_request_gets_429_for_full_queue_and_424_for_failed_engine(classifier):
    engine = GatedEngine(classifier.engine, fails=True)
    running = Running(engine.classify(classifier), waiting=1)
    thread = threading.Thread(target=ask, args=(running, "/predict", {"inputs": "word1"}))
    thread.start()
    assert engine.entered.wait(60)
    assert running.call("GET", "/health") == (200, b"")
    status, response = ask(running, "/predict", {"inputs": "word1"})
    assert (status, response["error_type"]) == (429, "Overloaded")
    engine.gate.set()
    thread.join()
    status, response = ask(running, "/predict", {"inputs": "word1"})
    assert (status, response["error_type"]) == (424, "Backend")
    status, response = running.call("GET", "/health")
    assert (status, json.loads(response)["error_type"]) == (503, "Unhealthy")
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
def test_unknown_path_or_method_is_refused_in_json(server, method, path, status, allowed):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path)
    response = connection.getresponse()
    assert (response.status, response.getheader("Allow")) == (status, allowed)
    assert response.getheader("Content-Type") == "application/json"
    assert "/openapi.json" in json.loads(response.read())["error"]
    connection.close()


def test_openapi_document_lists_all_routes(server, classifier):
    all_routes = make_app(classifier, 2, Limits()).routes
    routes = {(r.path, m.lower()) for r in all_routes for m in r.methods if m != "HEAD"}
    paths = get_document(server)["paths"]
    assert {(path, method) for path in paths for method in paths[path]} == routes


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
def test_openapi_schemas_match_requests_and_responses(server, path, body, status):
    document = get_document(server)
    actual_status, response = ask(server, path, body)
    assert actual_status == status
    (content,) = document["paths"][path]["post"]["requestBody"]["content"].values()
    assert is_valid(document, content["schema"], body) == (status == 200)
    assert is_valid(document, response_schema(document, path, status), response)


def closes_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def test_only_connections_without_request_are_closed_after_timeout(classifier):
    app = make_app(classifier, 2, Limits())
    settings = uvicorn.Config(app, port=0, log_level="error", timeout_keep_alive=60)
    close_silent_connections(settings, 2.0)
    running = Running.__new__(Running)
    running.start(settings)
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    sent_bytes = {
        "no bytes": b"",
        "part of a request": request[:20],
        "a request and part of another": request + b"GET /h",
    }
    connections = {}
    for name, data in sent_bytes.items():
        connections[name] = socket.create_connection(("127.0.0.1", running.port))
        connections[name].sendall(data)
    active = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    active.connect()
    active.auto_open = 0  # fail if the server closes this connection
    deadline = time.monotonic() + 4.5
    while time.monotonic() < deadline:  # several times the timeout, with requests all along
        active.request("GET", "/healthz")
        assert json.loads(active.getresponse().read())["status"] == "ok"
        time.sleep(0.05)
    slow = socket.create_connection(("127.0.0.1", running.port))
    slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n")
    assert not closes_within(slow, 4.5)  # the body has a time limit of its own
    for name in ("no bytes", "part of a request"):
        assert closes_within(connections[name], 5), name
    while connections["a request and part of another"].recv(1000):
        pass  # the first request's response, then the end of the stream
    for connection in (slow, active, *connections.values()):
        connection.close()
    running.stop()


def test_check_dockerfile_refuses_folder_without_model(tmp_path):
    with pytest.raises(UserError, match="is not a model exported by sweet-jax export"):
        check_dockerfile.main([f"--model={tmp_path}"])


def test_dockerfile_installs_extras_and_starts_server(server):
    steps = check_dockerfile.read_steps(check_dockerfile.DOCKERFILE)
    sources = [name for s in steps if s.instruction == "COPY" for name in s.text.split()[:-1]]
    missing = [name for name in sources if not (check_dockerfile.ROOT / name).exists()]
    assert missing == ["--from=build", "/opt/venv"]
    assert int(check_dockerfile.last(steps, "USER").split(":")[0]) > 0
    (install,) = [s.text for s in steps if "optional-dependencies" in s.text]
    program = install.partition(" -c ")[2].rpartition(" > ")[0].strip('"')
    requirements = subprocess.run(
        [sys.executable, "-c", program],
        cwd=check_dockerfile.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = {re.split("[>=]", line)[0] for line in requirements.split()}
    assert {"onnxruntime", "tokenizers", "numpy", "starlette", "uvicorn"} <= names
    assert not {"jax", "flax", "transformers", "datasets"} & names
    command = check_dockerfile.command_of(check_dockerfile.last(steps, "ENTRYPOINT"))
    assert command[:2] == ["sweet-jax", "serve"]
    assert serve._parse(command[2:]).port == 8000
    probe = check_dockerfile.command_of(check_dockerfile.last(steps, "HEALTHCHECK"))
    with socket.socket() as closed_port:
        closed_port.bind(("127.0.0.1", 0))  # without listening
        for port, healthy in ((server.port, True), (closed_port.getsockname()[1], False)):
            program = probe[-1].replace("8000", str(port))
            process = subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
            assert (process.returncode == 0) == healthy


@pytest.fixture
def api(server):
    """The OpenAPI document, from which schemathesis generates unusual requests."""
    schemathesis = pytest.importorskip("schemathesis", reason='pip install -e ".[test]"')
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


@pytest.mark.slow
def test_generated_requests_get_responses_of_openapi_document(api):
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    response_checks = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    statuses = collections.Counter()

    def check(case):
        response = case.call()
        # negative_data_rejection does not accept 413 as a refusal.
        rejection_checks = [] if response.status_code == 413 else [checks.negative_data_rejection]
        case.validate_response(response, checks=response_checks + rejection_checks)
        statuses[response.status_code] += 1

    for operation in (result.ok() for result in api.get_all_operations()):
        for mode in GenerationMode:
            if mode == GenerationMode.NEGATIVE and operation.method == "get":
                continue  # without parameters, no request can be invalid
            cases = operation.as_strategy(generation_mode=mode)
            limited = settings(
                max_examples=12,
                deadline=None,
                derandomize=True,
                suppress_health_check=HealthCheck,
            )
            limited(given(cases)(check))()
    assert statuses[200] > 10
    assert statuses[400] + statuses[422] > 10
