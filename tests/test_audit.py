"""The audit of served predictions: sequential tests, statistics, log, alarms and options."""

import dataclasses
import http.server
import json
import logging
import os
import sys
import threading
import time

import numpy as np
import pytest
from numpy_engine import load_engine
from scipy import stats

from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.errors import UserError
from sweet_jax.exits.certificates import LossCounts
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.policies import UnlabeledOutputs, exit_confidences
from sweet_jax.exits.sequential import ConfidenceSequence, MeanTest, ShiftTest
from sweet_jax.exits.shift import (
    calibration_histograms,
    population_stability_index,
    two_sample_p_value,
)
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import ModelArtifact, NetworkFiles
from sweet_jax.inference.audit_identity import describe_audited
from sweet_jax.inference.audit_log import AuditLog, AuditRow, read_audit_log
from sweet_jax.inference.audit_statistics import (
    AuditStatistics,
    AuditSummary,
    certified_agreement,
)
from sweet_jax.inference.scheduler import ExitRule
from sweet_jax.objectives.multi_label import MULTI_LABEL
from sweet_jax.objectives.objective import softmax


def bernoulli(share: float, count: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < share).astype(float)


def test_capital_of_mean_test_equals_product_of_its_bets():
    """Computes the products of the paper for the first start only."""
    values = bernoulli(0.7, 24, 0)
    test = MeanTest(0.9)
    capital = 1.0
    for t, value in enumerate(values):
        earlier = values[:t]
        mean = (0.9 + earlier.sum()) / (t + 1)
        means = (0.9 + np.cumsum(earlier)) / np.arange(2, t + 2)
        variance = (0.9 * 0.1 + ((earlier - means) ** 2).sum()) / (t + 1)
        below = max(0.9 - mean, 0)
        bet = min(below / (variance + below**2), 0.5 / 0.1)
        capital *= 1 - bet * (value - 0.9)
        test = test.observe(value)
        # Half of the capital is given to the first start; the rest is kept for later ones.
        assert np.exp(test.log_capital[0]) == pytest.approx(capital, rel=1e-6)
    assert test.largest >= (capital + 1) / 2 * (1 - 1e-9)


def test_sequential_tests_raise_few_false_alarms_when_read_often():
    """Draws from the worst mean that is allowed, where one run in twenty may raise an alarm."""
    rejected = missed = 0
    for seed in range(25):
        test, sequence = MeanTest(0.9), ConfidenceSequence()
        outside = False
        for value in bernoulli(0.9, 250, seed):
            test, sequence = test.observe(value), sequence.observe(value)
            if sequence.count % 10 == 0:
                low, high = sequence.interval
                outside |= not low <= 0.9 <= high
        rejected += test.rejected
        missed += outside
        assert high - low < 0.2
    assert max(rejected, missed) <= 2


def test_confidence_sequence_covers_means_beyond_its_candidates():
    for value, expected in ((1.0, (0.999, 1.0)), (0.0, (0.0, 0.001))):
        sequence = ConfidenceSequence()
        for _ in range(9000):
            sequence = sequence.observe(value)
        assert sequence.interval == expected


def test_confidence_sequence_has_no_bounds_that_exclude_the_mean():
    """The sequence is that of a constant mean, and the mean of all values changes."""
    sequence, unknown = ConfidenceSequence(), []
    for value in np.concatenate([bernoulli(0.99, 1500, 0), bernoulli(0.6, 1500, 1)]):
        sequence = sequence.observe(value)
        low, high = sequence.interval
        unknown.append(np.isnan(low))
        assert low <= sequence.mean <= high or np.isnan([low, high]).all()
    assert not any(unknown[:1500])
    assert unknown[-1]
    assert ConfidenceSequence().interval == (0, 1)


@pytest.mark.parametrize("values_before", [0, 2000])
def test_mean_test_detects_change_at_any_time(values_before):
    test = MeanTest(0.95)
    for value in bernoulli(0.98, values_before, 1):
        test = test.observe(value)
    assert not test.rejected
    for value in bernoulli(0.8, 200, 2):
        test = test.observe(value)
    assert test.rejected
    assert len(test.start) <= 65


def test_shift_test_rejects_only_shifted_values():
    rejected = 0
    for seed in range(20):
        rng, test = np.random.default_rng(seed), ShiftTest()
        # With ties and values above 1, since only the ranks matter.
        for value in np.round(3 * rng.beta(5, 2, 400), 1):
            test = test.observe(value, rng.random())
        rejected += test.rejected
    assert rejected <= 2
    for value in rng.beta(2, 2, 150):
        test = test.observe(value, rng.random())
    assert test.rejected


def test_two_sample_p_value_equals_scipy():
    shares, counts = np.asarray([0.1, 0.2, 0.3, 0.4]), np.asarray([13, 20, 40, 7])
    table = np.stack([120 * shares, counts])
    expected = stats.chi2_contingency(table, correction=False).pvalue
    assert two_sample_p_value(shares, 120, counts) == pytest.approx(expected, rel=1e-9)
    assert two_sample_p_value(shares, 120, (1000 * shares).astype(int)) > 0.999
    without_last = stats.chi2_contingency(table[:, :3], correction=False)
    p_value = two_sample_p_value(shares[:3] / 0.6, 72, counts[:3])
    assert p_value == pytest.approx(without_last.pvalue, rel=1e-9)
    assert population_stability_index(shares, (1000 * shares).astype(int)) < 0.001
    assert population_stability_index(shares, np.asarray([400, 300, 200, 100])) > 0.5


@pytest.mark.nightly
def test_calibration_histograms_agree_with_saved_pareto_front(sweet):
    front = sweet.classifier.model.resolver.fronts["confidence"]
    for e, histogram in enumerate(calibration_histograms(front)):
        assert histogram.shares.sum() == pytest.approx(1)
        assert (histogram.shares > 0).all()
        assert (np.diff(histogram.edges) > 0).all()
        for edge, above in zip(histogram.edges, 1 - np.cumsum(histogram.shares), strict=False):
            assert front.shares_at(edge)[: e + 1].sum() == pytest.approx(above)


def draw_outputs(count: int, scale: float, rng: np.random.Generator) -> ExitOutputs:
    """Draws rows with logits of three exits, which are more confident with a larger scale."""
    labels = rng.integers(0, 3, count)
    logits = rng.normal(size=(1, 3, count, 3)) + rng.normal(size=(count, 3))
    logits += np.asarray([0.5, 1.0, 1.5])[:, None, None] * np.eye(3)[labels]
    return ExitOutputs((scale * logits).astype(np.float32), labels, [1, 2, 4])


def summarize_audit(resolver, policy: str, target: dict, outputs: ExitOutputs) -> AuditSummary:
    """Returns the statistics of an audit of all rows, answered at a target."""
    threshold, calibrator = resolver.threshold(policy, **target)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(ModelArtifact))
    layers = tuple(outputs.layers.tolist())
    fields |= {"objective": outputs.objective, "resolver": resolver, "layers": layers}
    rule = ExitRule(policy, threshold, calibrator, layers)
    model = ModelArtifact(**fields | {"cost": outputs.cost})
    statistics = AuditStatistics(model, rule, None, 0.95)
    for logits in np.moveaxis(outputs.logits[0], 1, 0):  # [E, C]
        one = UnlabeledOutputs(logits[None, :, None], outputs.layers)
        leaves = exit_confidences(one, policy, [calibrator])[0, :, 0] >= threshold
        statistics.add(statistics.row(logits, None, int(np.append(leaves[:-1], True).argmax())))
    return statistics.summary()


@pytest.mark.parametrize(
    ("policy", "target", "known"),
    [
        ("confidence", {"cost": 0.7}, True),
        ("margin", {"accuracy": 0.6}, True),
        ("confidence", {"agreement": 0.75}, False),
        ("pcee", {"cost": 0.7}, False),
        ("pcee_isotonic", {"risk": 0.2}, False),
    ],
)
def test_audit_reports_shift_only_if_texts_have_shifted(policy, target, known):
    """Nothing is compared with confidences that another calibrator computed."""
    rng = np.random.default_rng(0)
    resolver = make_resolver(draw_outputs(400, 2.0, rng), (policy,))
    same, other = (
        summarize_audit(resolver, policy, target, draw_outputs(500, scale, rng))
        for scale in (2.0, 1.0)
    )
    assert all(not exit.stability > 0.1 for exit in same.exits)
    assert all(not exit.p_value < 0.01 for exit in same.exits)
    assert not abs(same.cost - same.expected_cost) > 0.05
    if known:
        assert same.expected_cost == pytest.approx(same.cost, abs=0.05)
        assert other.exits[1].stability > 0.25
        assert other.exits[1].p_value < 1e-6
    else:
        unknown = [(e.expected_share, e.stability, e.p_value) for e in other.exits]
        assert np.isnan([other.expected_cost, *np.ravel(unknown)]).all()
    assert np.isfinite([same.cost, other.cost]).all()


OLD_IDENTITY = {"layers": [1, 2], "classes": 2}  # of a model, in logs of earlier versions


def audit_row(number: int, text: str | None = None) -> AuditRow:
    logits = np.asarray([[number, 1.5], [0.25, np.nan]], np.float32)
    return AuditRow(
        1e9 + number, 0, np.ones(2, bool), np.asarray([0.5, -np.inf]), logits, None, text
    )


def test_audit_log_is_bounded_and_read_back(tmp_path):
    path = str(tmp_path / "audit.jsonl")
    log = AuditLog(path, OLD_IDENTITY, 4000)
    for number in range(100):
        log.add(audit_row(number, "a secret" if number % 2 else None), [1, 2])
    log.close()
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 4000
    logits, scores = read_audit_log(path, OLD_IDENTITY)
    assert scores is None
    assert logits.shape[0] == 2
    assert logits[0, :, 0].tolist() == list(range(100 - logits.shape[1], 100))  # the newest
    assert np.isnan(logits[1, :, 1]).all()
    with open(path, "a") as file:
        file.write('{"time": 1')  # as a killed server leaves it
    assert read_audit_log(path, OLD_IDENTITY)[0].shape == logits.shape
    with pytest.raises(
        UserError, match=r"^line 1 of '.*' is from another model: classes is 2 there and 3 here"
    ):
        read_audit_log(path, OLD_IDENTITY | {"classes": 3})
    with open(path, "a") as file:
        file.write("}\n")
    with pytest.raises(UserError, match=r"is damaged .*: remove it"):
        read_audit_log(path, OLD_IDENTITY)
    with pytest.raises(UserError, match="there is no audit log"):
        read_audit_log(str(tmp_path / "none"), OLD_IDENTITY)
    with pytest.raises(UserError, match="cannot be written"):
        AuditLog(str(tmp_path / "no" / "folder"), {}, 4000)


def test_audit_log_is_continued_after_truncated_last_line(tmp_path):
    """The server may be killed within a row, or within the header that its successor writes."""
    path = tmp_path / "audit.jsonl"

    def add(number):
        log = AuditLog(str(path), OLD_IDENTITY, 1 << 20)
        log.add(audit_row(number), [1, 2])
        log.close()

    add(0)
    for number, kept_bytes in enumerate((1, 5, 60, None), start=1):
        content = path.read_bytes()
        last_line = content.splitlines(keepends=True)[-1]
        path.write_bytes(content + last_line[:-1][:kept_bytes])
        add(number)
    logits, _ = read_audit_log(str(path), OLD_IDENTITY)
    assert logits[0, :, 0].tolist() == [0, 1, 2, 3, 3, 4]  # the last one lost only its line break
    path.write_bytes(path.read_bytes() + b'{"version": 1, "la')
    add(5)
    assert read_audit_log(str(path), OLD_IDENTITY)[0][0, -1, 0] == 5
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, '{"time": 1\n', lines[1]]))
    with pytest.raises(
        UserError, match=rf"^line {len(lines) + 1} of '.*' is damaged .*: remove it"
    ):
        read_audit_log(str(path), OLD_IDENTITY)


def make_artifact(folder, weights: bytes, seed=3) -> ModelArtifact:
    """Makes a model with any bytes as weights: only its files and class names are read."""
    folder.mkdir()
    (folder / "exits.json").write_text(json.dumps({"seed": seed, "task": "news"}))
    (folder / "model.safetensors").write_bytes(weights)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(ModelArtifact))
    networks = (NetworkFiles(folder, (1, 2)),)
    fields |= {"folder": folder, "classes": ("a", "b"), "layers": (1, 2), "networks": networks}
    return ModelArtifact(**fields)


def test_audit_log_of_other_model_or_precision_is_refused(tmp_path):
    """The other models have the same exits and number of classes; copies of the model are read."""
    model = make_artifact(tmp_path / "model", b"weights")
    identity = describe_audited(model, "float32")
    path = str(tmp_path / "audit.jsonl")
    log = AuditLog(path, {**identity, "policy": "margin"}, 1 << 20)
    log.add(audit_row(0), [1, 2])
    log.close()
    exported = make_artifact(tmp_path / "exported", b"")
    (exported.folder / "model.safetensors").unlink()
    for equivalent in (model, make_artifact(tmp_path / "copy", b"weights"), exported):
        assert read_audit_log(path, describe_audited(equivalent, "float32"))[0].shape == (2, 1, 2)
    renamed = dataclasses.replace(model, classes=("a", "c"))
    for other_model, problem in (
        (renamed, r"class_names\[1\] is 'b' there and 'c' here"),
        (make_artifact(tmp_path / "again", b"weights", seed=4), "seed is 3 there and 4 here"),
        (
            make_artifact(tmp_path / "longer", b"others"),
            "weights_sha256 is '.{16}' there and '.{16}' h",
        ),
    ):
        with pytest.raises(UserError, match=f"^line 1 of '.*' is from another model: {problem}"):
            read_audit_log(path, describe_audited(other_model, "float32"))
    for precision, fix in (
        ("bfloat16", "to refit from a log, write it while serving the model in float32"),
        ("int8", "fitted by sweet-jax quantize --run=DIR and cannot be refitted from a log"),
    ):
        AuditLog(path, {**identity, "precision": precision}, 1 << 20).close()
        with pytest.raises(UserError, match=f"precision is '{precision}' there and 'fl.*{fix}$"):
            read_audit_log(path, identity)
        (tmp_path / "audit.jsonl").write_text("")


def test_audit_log_in_use_by_another_server_is_refused(tmp_path):
    path = str(tmp_path / "audit.jsonl")
    log = AuditLog(path, OLD_IDENTITY, 400)
    for number in range(5):  # the file is rotated meanwhile
        log.add(audit_row(number), [1, 2])
    assert (tmp_path / "audit.jsonl.old").exists()
    content = (tmp_path / "audit.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"audit.jsonl' is in use by another server: choose"):
        AuditLog(path, OLD_IDENTITY, 400)
    assert (tmp_path / "audit.jsonl").read_bytes() == content
    AuditLog(str(tmp_path / "other.jsonl"), OLD_IDENTITY, 400).close()
    log.close()
    AuditLog(path, OLD_IDENTITY, 400).close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_audit_log_on_full_disk_is_refused():
    with pytest.raises(UserError, match=r"^the audit log '/dev/full' cannot be written \(No space"):
        AuditLog("/dev/full", OLD_IDENTITY, 4000)


@pytest.fixture(scope="module")
def classifier(sweet):
    """Uses an engine that compiles nothing and whose random weights make its exits disagree."""
    model = sweet.classifier.model
    return AdaptiveClassifier(model, "raw_confidence", {"threshold": 0.8}, load_engine(model))


@pytest.fixture
def serve_audited(classifier, tmp_path):
    """Returns a function that starts an audited server: (server, audit, path of its log)."""
    pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
    from test_serve import Running

    from sweet_jax.server.audit import Audit, AuditSettings

    servers = []

    def start(classifier=classifier, **settings):
        path = tmp_path / "audit.jsonl"
        audit = Audit(classifier, AuditSettings(1.0, log=str(path), **settings))
        servers.append(Running(classifier, audit=audit))
        return servers[-1], audit, path

    yield start
    for server in servers:
        server.stop()


def wait_until_audited(audit, count: int) -> None:
    """Returns once `count` texts are audited."""
    deadline = time.monotonic() + 60
    while audit.summary().audited < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def answer_requests(classifier, texts: list[str]) -> list:
    """Returns the requests of texts after a scheduler has answered them."""
    requests, scheduler = classifier.encode(texts), classifier.make_scheduler(4)
    for request in requests:
        scheduler.admit(request)
    scheduler.drain()
    return requests


def test_audit_keeps_answers_and_estimates_agreement_of_exits(serve_audited, classifier, sweet):
    server, audit, path = serve_audited(agreement=0.5)
    texts = sorted(sweet.texts, key=len)[:12]
    expected = classifier.predict(texts, 2)
    _, response = server.predict({"texts": texts})
    assert [a["exit"] for a in response["answers"]] == expected.exits.tolist()
    server.predict({"texts": texts[:3], "threshold": 0.1})  # another threshold is not audited
    wait_until_audited(audit, 12)
    outputs, _ = compute_all_exits(classifier.model, classifier.engine, texts)
    predicted = outputs.argmax(axis=-1)  # [E, N]
    agrees = predicted == predicted[-1]
    exits = np.searchsorted(classifier.layers, expected.exits)
    summary = audit.summary()
    assert summary.audited == 12
    assert [e.agreement for e in summary.exits] == pytest.approx(agrees.mean(axis=1).tolist())
    assert summary.agreement == pytest.approx(agrees[exits, np.arange(12)].mean())
    assert summary.low <= summary.agreement <= summary.high
    assert summary.cost == pytest.approx(expected.cost.mean())
    requests = answer_requests(classifier, texts)
    statistics = AuditStatistics(classifier.model, classifier.rule, None, 0.95)
    raw = softmax(outputs.astype(np.float64)).max(axis=-1)  # [E, N]
    np.testing.assert_allclose(
        statistics.answer_confidences(requests), raw[exits, np.arange(12)], atol=1e-6
    )
    logits, _ = read_audit_log(str(path), describe_audited(classifier.model, "float32"))
    np.testing.assert_allclose(logits, outputs, rtol=1e-5, atol=1e-5)
    assert "word" not in path.read_text()
    header = json.loads(path.read_text().splitlines()[0])
    assert (header["class_names"], header["precision"]) == (list(classifier.classes), "float32")
    page = server.call("GET", "/audit")[1].decode()
    assert "No alarm." in page
    assert page.count('<th scope="row">layer') == 3
    metrics = server.call("GET", "/metrics")[1].decode()
    assert "sweet_jax_audit_texts_total 12.0" in metrics
    assert "sweet_jax_audit_alarm 0.0" in metrics
    assert f'sweet_jax_audit_exit_agreement{{exit="2"}} {summary.exits[0].agreement}' in metrics


def test_texts_counted_as_audited_are_in_the_log(serve_audited, sweet, monkeypatch):
    counted, add = [], AuditLog.add

    def add_and_note(log, row, layers):
        counted.append(audit.summary().audited)
        add(log, row, layers)

    monkeypatch.setattr(AuditLog, "add", add_and_note)
    server, audit, path = serve_audited()
    server.predict({"texts": sweet.texts[:4]})
    wait_until_audited(audit, 4)
    assert counted == [0, 1, 2, 3]
    assert len(path.read_text().splitlines()) == 1 + 4


@pytest.mark.parametrize("metric", ["micro_f1", "neg_hamming_loss"])
def test_multi_label_agreement_follows_the_metric(serve_audited, sweet, metric):
    """As in certificates, all labels must agree, or their share counts if that is the metric."""
    model, texts = sweet.classifier.model, sweet.texts
    engine = load_engine(model)
    logits, _ = compute_all_exits(model, engine, texts)
    targets = (logits[-1] > 0) ^ (np.random.default_rng(0).random(logits[-1].shape) < 0.1)
    identity = RunIdentity(objective="multi_label", metric=metric)
    outputs = ExitOutputs(logits, targets, model.layers, identity=identity)
    resolver = make_resolver(outputs, ("min_confidence",))
    model = dataclasses.replace(model, objective=MULTI_LABEL, resolver=resolver)
    confidences = exit_confidences(outputs, "min_confidence", [resolver.calibrator])[0]  # [E, N]
    target = {"threshold": float(np.median(confidences[0]))}
    classifier = AdaptiveClassifier(model, "min_confidence", target, engine)
    server, audit, path = serve_audited(classifier)
    server.predict({"texts": texts})
    wait_until_audited(audit, len(texts))
    equal_labels = outputs.predictions[0] == outputs.predictions[0, -1]  # [E, N, C]
    agrees = equal_labels.mean(-1) if metric == "neg_hamming_loss" else equal_labels.all(-1)
    assert equal_labels.all(-1).mean() < equal_labels.mean(-1).mean() < 1
    summary = audit.summary()
    assert [e.agreement for e in summary.exits] == pytest.approx(agrees.mean(axis=1).tolist())
    assert summary.agreement >= certified_agreement(model, classifier.rule, 0.95)
    # The texts are the calibration rows, so their confidences have not shifted.
    assert max(exit.stability for exit in summary.exits[:-1]) < 0.05
    log_rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    log_rows.sort(key=lambda row: row["logits"])
    order = sorted(range(len(texts)), key=lambda n: logits[:, n].tolist())
    for name, expected in (("agrees", agrees), ("confidence", confidences)):
        np.testing.assert_allclose([row[name] for row in log_rows], expected.T[order], rtol=1e-5)
    requests = answer_requests(classifier, texts)
    answered = AuditStatistics(model, classifier.rule, None, 0.95).answer_confidences(requests)
    exits = [request.exit for request in requests]
    np.testing.assert_allclose(answered, confidences[exits, np.arange(len(texts))], atol=1e-6)
    assert 0 in exits
    assert "No alarm" in server.call("GET", "/audit")[1].decode()


def test_alarm_is_logged_shown_and_posted_once(serve_audited, classifier, sweet, caplog):
    posted = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    hook = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    outputs, _ = compute_all_exits(classifier.model, classifier.engine, sweet.texts)
    predicted = outputs.argmax(axis=-1)  # [E, N]
    texts = [sweet.texts[i] for i in np.flatnonzero(predicted[0] != predicted[-1])][:10]
    at_first_exit = classifier.at(threshold=0.0)
    url = f"http://127.0.0.1:{hook.server_port}/alarm"
    server, audit, path = serve_audited(at_first_exit, agreement=0.9, webhook=url, texts=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            server.predict({"texts": texts})
        wait_until_audited(audit, 3 * len(texts))
        deadline = time.monotonic() + 60
        while not posted:  # a separate thread posts it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    hook.shutdown()
    hook.server_close()
    assert sum("AUDIT ALARM" in record.getMessage() for record in caplog.records) == 1
    assert [(p["alarm"], p["target"]) for p in posted] == [("agreement", 0.9)]
    assert "with the full model is 0.0000; the target is at least 0.9000" in posted[0]["text"]
    assert "Alarm since" in server.call("GET", "/audit")[1].decode()
    assert "sweet_jax_audit_alarm 1.0" in server.call("GET", "/metrics")[1].decode()
    assert json.dumps(texts[0]) in path.read_text()


def test_failed_audit_ends_without_stopping_the_server(serve_audited, sweet, caplog, monkeypatch):
    server, audit, _ = serve_audited()
    monkeypatch.setattr(audit, "_record", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        assert server.predict({"texts": sweet.texts[:2]})[0] == 200
        deadline = time.monotonic() + 60
        while audit.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    for _ in range(2):
        assert server.predict({"texts": sweet.texts[:12]})[0] == 200
    while audit.counts().answered < 26:  # texts are offered after the response
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not audit._chosen  # texts that will not be audited are not kept
    assert not audit._under_way
    assert audit.counts().waiting == 0
    assert "The audit has ended with an error" in server.call("GET", "/audit")[1].decode()
    server.stop()
    with pytest.raises(ValueError, match="closed file"):  # since the server has stopped
        audit._log.add(audit_row(0), [1, 2])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_audit_continues_without_log_when_disk_is_full(serve_audited, sweet, caplog):
    server, audit, _ = serve_audited()
    audit._log._file.close()
    audit._log._file = open("/dev/full", "w")  # noqa: SIM115 - closed by the audit
    with caplog.at_level(logging.WARNING):
        server.predict({"texts": sweet.texts[:3]})
        wait_until_audited(audit, 3)
    assert audit.running
    (warning,) = (record for record in caplog.records if "without its log" in record.getMessage())
    assert warning.exc_info is None
    server.stop()  # the unwritten rows raise no error


def test_audit_draws_depend_only_on_seed_and_number():
    from sweet_jax.server.audit import uniform_draws

    drawn = [uniform_draws(3, number) for number in range(2000)]
    assert stats.kstest(np.ravel(drawn), "uniform").pvalue > 0.01
    assert drawn[1500:] == [uniform_draws(3, number) for number in range(1500, 2000)]
    assert not set(drawn) & {uniform_draws(4, number) for number in range(2000)}


def test_certified_agreement_is_that_of_next_lower_candidate_threshold(sweet):
    counts = LossCounts("agreement", np.asarray([0.9, 0.8, 0.6]), np.asarray([0, 3, 30]), 100)
    bounds = [1 - stats.beta.ppf(0.95, k + 1, 100 - k) for k in (0, 3, 30)]
    candidates = {0.95: 0, 0.9: 0, 0.85: 1, 0.7: 2, 0.6: 2, 0.1: 2}
    for threshold, candidate in candidates.items():
        assert counts.kept_at(threshold) == pytest.approx(bounds[candidate])
    assert counts.kept_at(float("inf")) == 1
    # The bound for one of five models, or for rows that agree in part, is that of certificates.
    assert counts.kept_at(0.8, compared=5) == pytest.approx(1 - stats.beta.ppf(0.99, 4, 97))
    parts = dataclasses.replace(counts, harmed=np.asarray([0.0, 2.4, 30.0]))
    assert parts.kept_at(0.8) == pytest.approx(1 - stats.beta.ppf(1 - 0.05 / np.e, 4, 97))
    rule = sweet.classifier.at(threshold=float("inf")).rule
    assert certified_agreement(sweet.classifier.model, rule, 0.95) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--audit=2"], "--audit must be a share from 0 to 1; got 2"),
        (["--level=0.9"], "--level applies to certified targets: also set --risk or --agreement"),
        (["--audit=1", "--level=2"], "--level must be from 0.5 to 0.9999; got 2"),
        (["--audit_log=x"], "--audit_log needs --audit=SHARE"),
        (["--audit=1", "--audit_agreement=1.5"], "--audit_agreement must be between 0 and 1"),
        (["--audit=1", "--audit_webhook=http://example.com/x"], "must be a URL on this machine"),
        (["--audit=1", "--audit_webhook=ftp://127.0.0.1/x"], "must be a URL on this machine"),
        (["--audit=1", "--audit_webhook=http://127.0.0.1:99999/"], "must have a port from 1 to 65"),
        (["--audit=1", "--audit_webhook=http://127.0.0.1:0/"], "must have a port from 1 to 65535"),
        (["--audit=1", "--audit_webhook=http://127.0.0.1:x/"], "must have a port from 1 to 65535"),
    ],
)
def test_invalid_audit_options_are_refused(capsys, arguments, message):
    pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
    from sweet_jax import serve

    assert serve.main(["--model=x", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_audit_agreement_option_is_required_without_scipy(classifier, monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
    from sweet_jax import serve
    from sweet_jax.server.audit_arguments import make_audit

    monkeypatch.setitem(sys.modules, "scipy", None)
    options = ["--model=x", "--audit=0.5"]
    with pytest.raises(UserError, match=r"^without SciPy, --audit needs --audit_agreement too:"):
        make_audit(classifier, serve._parse(options))
    make_audit(classifier, serve._parse([*options, "--audit_agreement=0.9"]))
    # The level is that of the calibration rows' certificate, which needs no target.
    assert serve._parse([*options, "--level=0.9"]).level == 0.9
    assert "when the agreement is below 0.9000 (from --audit_agreement)" in capsys.readouterr().out


def test_audit_page_formats_zero_tiny_and_unknown_shares():
    from sweet_jax.server.audit_page import _number

    shown = [_number(value) for value in (0.0, 1e-5, 0.5, float("nan"))]
    assert shown == ["0.0000", "below 0.0001", "0.5000", "unknown"]
