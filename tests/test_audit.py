"""The audit of a server: its statistics, its log, and that it watches without being noticed."""

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
from sweet_jax.exits.policies import exit_confidences
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
from sweet_jax.inference.audit_statistics import AuditStatistics, certified_agreement
from sweet_jax.objectives.multi_label import MULTI_LABEL
from sweet_jax.objectives.objective import softmax


def draws(share: float, count: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < share).astype(float)


def test_the_capital_of_a_test_is_that_of_its_bets():
    """By the products of the paper, over one start and no more."""
    values = draws(0.7, 24, 0)
    test = MeanTest(0.9)
    capital = 1.0
    for t, value in enumerate(values):
        before = values[:t]
        mean = (0.9 + before.sum()) / (t + 1)
        means = (0.9 + np.cumsum(before)) / np.arange(2, t + 2)
        variance = (0.9 * 0.1 + ((before - means) ** 2).sum()) / (t + 1)
        below = max(0.9 - mean, 0)
        bet = min(below / (variance + below**2), 0.5 / 0.1)
        capital *= 1 - bet * (value - 0.9)
        test = test.observe(value)
        # Half of the capital was given to the first start, the rest waits for others.
        assert np.exp(test.log_capital[0]) == pytest.approx(capital, rel=1e-6)
    assert test.largest >= (capital + 1) / 2 * (1 - 1e-9)


def test_looking_after_every_value_raises_few_false_alarms():
    """At the worst mean that is allowed; the test may fail in one of twenty, and does in fewer."""
    rejected = missed = 0
    for seed in range(25):
        test, sequence = MeanTest(0.9), ConfidenceSequence()
        outside = False
        for value in draws(0.9, 250, seed):
            test, sequence = test.observe(value), sequence.observe(value)
            if sequence.count % 10 == 0:
                low, high = sequence.interval
                outside |= not low <= 0.9 <= high
        rejected += test.rejected
        missed += outside
        assert high - low < 0.2
    assert max(rejected, missed) <= 2


def test_the_bounds_hold_the_mean_where_it_lies_beyond_the_candidates():
    for value, wanted in ((1.0, (0.999, 1.0)), (0.0, (0.0, 0.001))):
        sequence = ConfidenceSequence()
        for _ in range(9000):
            sequence = sequence.observe(value)
        assert sequence.interval == wanted


@pytest.mark.parametrize("before", [0, 2000])
def test_a_change_is_found_whenever_it_comes(before):
    test = MeanTest(0.95)
    for value in draws(0.98, before, 1):
        test = test.observe(value)
    assert not test.rejected
    for value in draws(0.8, 200, 2):
        test = test.observe(value)
    assert test.rejected
    assert len(test.start) <= 65


def test_a_shift_is_found_and_none_where_there_is_none():
    rejected = 0
    for seed in range(20):
        rng, test = np.random.default_rng(seed), ShiftTest()
        # With ties, and values beyond 1, of which the ranks alone matter.
        for value in np.round(3 * rng.beta(5, 2, 400), 1):
            test = test.observe(value, rng.random())
        rejected += test.rejected
    assert rejected <= 2
    for value in rng.beta(2, 2, 150):
        test = test.observe(value, rng.random())
    assert test.rejected


def test_the_two_sample_test_is_scipys():
    shares, counts = np.asarray([0.1, 0.2, 0.3, 0.4]), np.asarray([13, 20, 40, 7])
    table = np.stack([120 * shares, counts])
    wanted = stats.chi2_contingency(table, correction=False).pvalue
    assert two_sample_p_value(shares, 120, counts) == pytest.approx(wanted, rel=1e-9)
    assert two_sample_p_value(shares, 120, (1000 * shares).astype(int)) > 0.999
    even = stats.chi2_contingency(table[:, :3], correction=False)
    known = two_sample_p_value(shares[:3] / 0.6, 72, counts[:3])
    assert known == pytest.approx(even.pvalue, rel=1e-9)
    assert population_stability_index(shares, (1000 * shares).astype(int)) < 0.001
    assert population_stability_index(shares, np.asarray([400, 300, 200, 100])) > 0.5


@pytest.mark.slow
def test_the_histograms_of_calibration_rows_follow_from_a_saved_model(sweet):
    front = sweet.classifier.model.resolver.fronts["confidence"]
    for e, histogram in enumerate(calibration_histograms(front)):
        assert histogram.shares.sum() == pytest.approx(1)
        assert (histogram.shares > 0).all()
        assert (np.diff(histogram.edges) > 0).all()
        for edge, above in zip(histogram.edges, 1 - np.cumsum(histogram.shares), strict=False):
            assert front.shares_at(edge)[: e + 1].sum() == pytest.approx(above)


ABOUT = {"layers": [1, 2], "classes": 2}  # what a log of an earlier version says of the model


def row(number: int, text: str | None = None) -> AuditRow:
    logits = np.asarray([[number, 1.5], [0.25, np.nan]], np.float32)
    return AuditRow(
        1e9 + number, 0, np.ones(2, bool), np.asarray([0.5, -np.inf]), logits, None, text
    )


def test_a_log_is_bounded_and_read_back(tmp_path):
    path = str(tmp_path / "audit.jsonl")
    log = AuditLog(path, ABOUT, 4000)
    for number in range(100):
        log.add(row(number, "a secret" if number % 2 else None), [1, 2])
    log.close()
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 4000
    logits, scores = read_audit_log(path, ABOUT)
    assert scores is None
    assert logits.shape[0] == 2
    assert logits[0, :, 0].tolist() == list(range(100 - logits.shape[1], 100))  # the newest
    assert np.isnan(logits[1, :, 1]).all()
    with open(path, "a") as file:
        file.write('{"time": 1')  # of a server that was killed
    assert read_audit_log(path, ABOUT)[0].shape == logits.shape
    with pytest.raises(
        UserError, match=r"^line 1 of '.*' is from another model: classes is 2 there and 3 here"
    ):
        read_audit_log(path, ABOUT | {"classes": 3})
    with open(path, "a") as file:
        file.write("}\n")
    with pytest.raises(UserError, match=r"is damaged .*: remove it"):
        read_audit_log(path, ABOUT)
    with pytest.raises(UserError, match="there is no audit log"):
        read_audit_log(str(tmp_path / "none"), ABOUT)
    with pytest.raises(UserError, match="cannot be written"):
        AuditLog(str(tmp_path / "no" / "folder"), {}, 4000)


def test_a_log_whose_last_line_was_cut_off_is_continued(tmp_path):
    """Wherever the server was killed: within the row, or within the first line of the next one."""
    path = tmp_path / "audit.jsonl"

    def add(number):
        log = AuditLog(str(path), ABOUT, 1 << 20)
        log.add(row(number), [1, 2])
        log.close()

    add(0)
    for number, cut in enumerate((1, 5, 60, None), start=1):
        whole = path.read_bytes()
        line = whole.splitlines(keepends=True)[-1]
        path.write_bytes(whole + line[:-1][:cut])
        add(number)
    logits, _ = read_audit_log(str(path), ABOUT)
    assert logits[0, :, 0].tolist() == [0, 1, 2, 3, 3, 4]  # of the last one the end alone was cut
    path.write_bytes(path.read_bytes() + b'{"version": 1, "la')
    add(5)
    assert read_audit_log(str(path), ABOUT)[0][0, -1, 0] == 5
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, '{"time": 1\n', lines[1]]))
    with pytest.raises(
        UserError, match=rf"^line {len(lines) + 1} of '.*' is damaged .*: remove it"
    ):
        read_audit_log(str(path), ABOUT)


def weighing(folder, weights: bytes, seed=3) -> ModelArtifact:
    """A model in whose place there are some bytes: nothing but its files and names is read."""
    folder.mkdir()
    (folder / "exits.json").write_text(json.dumps({"seed": seed, "task": "news"}))
    (folder / "model.safetensors").write_bytes(weights)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(ModelArtifact))
    networks = (NetworkFiles(folder, (1, 2)),)
    fields |= {"folder": folder, "classes": ("a", "b"), "layers": (1, 2), "networks": networks}
    return ModelArtifact(**fields)


def test_a_log_of_another_model_or_precision_is_refused(tmp_path):
    """Also of one with the same exits and as many classes; a recalibrated copy is the same one."""
    model = weighing(tmp_path / "model", b"weights")
    own = describe_audited(model, "float32")
    path = str(tmp_path / "audit.jsonl")
    log = AuditLog(path, {**own, "policy": "margin"}, 1 << 20)
    log.add(row(0), [1, 2])
    log.close()
    exported = weighing(tmp_path / "exported", b"")
    (exported.folder / "model.safetensors").unlink()
    for same in (model, weighing(tmp_path / "copy", b"weights"), exported):
        assert read_audit_log(path, describe_audited(same, "float32"))[0].shape == (2, 1, 2)
    renamed = dataclasses.replace(model, classes=("a", "c"))
    for other, words in (
        (renamed, r"class_names\[1\] is 'b' there and 'c' here"),
        (weighing(tmp_path / "again", b"weights", seed=4), "seed is 3 there and 4 here"),
        (weighing(tmp_path / "longer", b"others"), "weights_sha256 is '.{16}' there and '.{16}' h"),
    ):
        with pytest.raises(UserError, match=f"^line 1 of '.*' is from another model: {words}"):
            read_audit_log(path, describe_audited(other, "float32"))
    for precision, fix in (
        ("bfloat16", "to refit from a log, write it while serving the model in float32"),
        ("int8", "fitted by sweet-jax quantize --run=DIR and cannot be refitted from a log"),
    ):
        AuditLog(path, {**own, "precision": precision}, 1 << 20).close()
        with pytest.raises(UserError, match=f"precision is '{precision}' there and 'fl.*{fix}$"):
            read_audit_log(path, own)
        (tmp_path / "audit.jsonl").write_text("")


def test_a_log_is_written_by_one_server_at_a_time(tmp_path):
    path = str(tmp_path / "audit.jsonl")
    first = AuditLog(path, ABOUT, 400)
    for number in range(5):  # it is renamed meanwhile
        first.add(row(number), [1, 2])
    assert (tmp_path / "audit.jsonl.old").exists()
    before = (tmp_path / "audit.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"audit.jsonl' is in use by another server: choose"):
        AuditLog(path, ABOUT, 400)
    assert (tmp_path / "audit.jsonl").read_bytes() == before
    AuditLog(str(tmp_path / "other.jsonl"), ABOUT, 400).close()
    first.close()
    AuditLog(path, ABOUT, 400).close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_log_on_a_full_disk_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^the audit log '/dev/full' cannot be written \(No space"):
        AuditLog("/dev/full", ABOUT, 4000)


@pytest.fixture(scope="module")
def classifier(sweet):
    """By an engine that compiles nothing, whose weights are random: its exits disagree."""
    model = sweet.classifier.model
    return AdaptiveClassifier(model, "raw_confidence", {"threshold": 0.8}, load_engine(model))


@pytest.fixture
def serve_audited(classifier, tmp_path):
    """Starts a server with an audit; returns it, with the audit and the path of its log."""
    pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
    from test_serve import Running

    from sweet_jax.server.audit import Audit, AuditSettings

    running = []

    def start(classifier=classifier, **settings):
        path = tmp_path / "audit.jsonl"
        audit = Audit(classifier, AuditSettings(1.0, log=str(path), **settings))
        running.append(Running(classifier, audit=audit))
        return running[-1], audit, path

    yield start
    for each in running:
        each.stop()


def settle(audit, count: int) -> None:
    """Returns once so many texts were audited."""
    deadline = time.monotonic() + 60
    while audit.summary().audited < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_are_as_without_and_all_exits_are_known(serve_audited, classifier, sweet):
    running, audit, path = serve_audited(agreement=0.5)
    texts = sorted(sweet.texts, key=len)[:12]
    wanted = classifier.predict(texts, 2)
    _, found = running.predict({"texts": texts})
    assert [a["exit"] for a in found["answers"]] == wanted.exits.tolist()
    running.predict({"texts": texts[:3], "threshold": 0.1})  # not the server's own: not audited
    settle(audit, 12)
    outputs, _ = compute_all_exits(classifier.model, classifier.engine, texts)
    given = outputs.argmax(axis=-1)  # [E, N]
    agrees = given == given[-1]
    exits = np.searchsorted(classifier.layers, wanted.exits)
    summary = audit.summary()
    assert summary.audited == 12
    assert [e.agreement for e in summary.exits] == pytest.approx(agrees.mean(axis=1).tolist())
    assert summary.agreement == pytest.approx(agrees[exits, np.arange(12)].mean())
    assert summary.low <= summary.agreement <= summary.high
    assert summary.cost == pytest.approx(wanted.cost.mean())
    requests, scheduler = classifier.encode(texts), classifier.make_scheduler(4)
    for request in requests:
        scheduler.admit(request)
    scheduler.drain()
    statistics = AuditStatistics(classifier.model, classifier.rule, None, 0.95)
    raw = softmax(outputs.astype(np.float64)).max(axis=-1)  # [E, N]
    np.testing.assert_allclose(
        statistics.answer_confidences(requests), raw[exits, np.arange(12)], atol=1e-6
    )
    logits, _ = read_audit_log(str(path), describe_audited(classifier.model, "float32"))
    np.testing.assert_allclose(logits, outputs, rtol=1e-5, atol=1e-5)
    assert "word" not in path.read_text()
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["class_names"], first["precision"]) == (list(classifier.classes), "float32")
    page = running.call("GET", "/audit")[1].decode()
    assert "No alarm." in page
    assert page.count('<th scope="row">layer') == 3
    metrics = running.call("GET", "/metrics")[1].decode()
    assert "sweet_jax_audit_texts_total 12.0" in metrics
    assert "sweet_jax_audit_alarm 0.0" in metrics
    assert f'sweet_jax_audit_exit_agreement{{exit="2"}} {summary.exits[0].agreement}' in metrics


@pytest.mark.parametrize("metric", ["micro_f1", "neg_hamming_loss"])
def test_answers_of_several_labels_are_compared_by_their_labels(serve_audited, sweet, metric):
    """As certificates compare them: whole, or by the share of labels where that is the metric."""
    model, texts = sweet.classifier.model, sweet.texts
    engine = load_engine(model)
    logits, _ = compute_all_exits(model, engine, texts)
    targets = (logits[-1] > 0) ^ (np.random.default_rng(0).random(logits[-1].shape) < 0.1)
    about = RunIdentity(objective="multi_label", metric=metric)
    outputs = ExitOutputs(logits, targets, model.layers, identity=about)
    resolver = make_resolver(outputs, ("min_confidence",))
    model = dataclasses.replace(model, objective=MULTI_LABEL, resolver=resolver)
    confidences = exit_confidences(outputs, "min_confidence", [resolver.calibrator])[0]  # [E, N]
    target = {"threshold": float(np.median(confidences[0]))}
    classifier = AdaptiveClassifier(model, "min_confidence", target, engine)
    running, audit, path = serve_audited(classifier)
    running.predict({"texts": texts})
    settle(audit, len(texts))
    same = outputs.predictions[0] == outputs.predictions[0, -1]  # [E, N, C]
    agrees = same.mean(-1) if metric == "neg_hamming_loss" else same.all(-1)
    assert same.all(-1).mean() < same.mean(-1).mean() < 1
    summary = audit.summary()
    assert [e.agreement for e in summary.exits] == pytest.approx(agrees.mean(axis=1).tolist())
    assert summary.agreement >= certified_agreement(model, classifier.rule, 0.95)
    # The very rows of calibration, whose confidences are the same.
    assert max(exit.stability for exit in summary.exits[:-1]) < 0.05
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    rows.sort(key=lambda row: row["logits"])
    order = sorted(range(len(texts)), key=lambda n: logits[:, n].tolist())
    for name, wanted in (("agrees", agrees), ("confidence", confidences)):
        np.testing.assert_allclose([row[name] for row in rows], wanted.T[order], rtol=1e-5)
    requests, scheduler = classifier.encode(texts), classifier.make_scheduler(4)
    for request in requests:
        scheduler.admit(request)
    scheduler.drain()
    answered = AuditStatistics(model, classifier.rule, None, 0.95).answer_confidences(requests)
    exits = [request.exit for request in requests]
    np.testing.assert_allclose(answered, confidences[exits, np.arange(len(texts))], atol=1e-6)
    assert 0 in exits
    assert "No alarm" in running.call("GET", "/audit")[1].decode()


def test_the_alarm_is_logged_shown_and_posted_once(serve_audited, classifier, sweet, caplog):
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
    given = outputs.argmax(axis=-1)  # [E, N]
    texts = [sweet.texts[i] for i in np.flatnonzero(given[0] != given[-1])][:10]
    first = classifier.at(threshold=0.0)
    url = f"http://127.0.0.1:{hook.server_port}/alarm"
    running, audit, path = serve_audited(first, agreement=0.9, webhook=url, texts=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            running.predict({"texts": texts})
        settle(audit, 3 * len(texts))
        while not posted:  # by a thread of its own
            time.sleep(0.01)
    hook.shutdown()
    hook.server_close()
    assert sum("AUDIT ALARM" in r.getMessage() for r in caplog.records) == 1
    assert [(p["alarm"], p["target"]) for p in posted] == [("agreement", 0.9)]
    assert "with the full model is 0.0000; the target is at least 0.9000" in posted[0]["text"]
    assert "Alarm since" in running.call("GET", "/audit")[1].decode()
    assert "sweet_jax_audit_alarm 1.0" in running.call("GET", "/metrics")[1].decode()
    assert json.dumps(texts[0]) in path.read_text()


def test_an_audit_that_fails_ends_alone(serve_audited, sweet, caplog, monkeypatch):
    running, audit, _ = serve_audited()
    monkeypatch.setattr(audit, "_record", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        assert running.predict({"texts": sweet.texts[:2]})[0] == 200
        deadline = time.monotonic() + 60
        while audit.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    for _ in range(2):
        assert running.predict({"texts": sweet.texts[:12]})[0] == 200
    while audit.counts().answered < 26:  # offered after the response
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not audit._chosen  # a text that nothing will compute is not kept
    assert not audit._under_way
    assert audit.counts().waiting == 0
    assert "The audit has ended with an error" in running.call("GET", "/audit")[1].decode()
    running.stop()
    with pytest.raises(ValueError, match="closed file"):  # by the server that has stopped
        audit._log.add(row(0), [1, 2])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_an_audit_goes_on_without_its_log_when_the_disk_is_full(serve_audited, sweet, caplog):
    running, audit, _ = serve_audited()
    audit._log._file.close()
    audit._log._file = open("/dev/full", "w")  # noqa: SIM115 - closed by the audit
    with caplog.at_level(logging.WARNING):
        running.predict({"texts": sweet.texts[:3]})
        settle(audit, 3)
    assert audit.running
    (said,) = (record for record in caplog.records if "without its log" in record.getMessage())
    assert said.exc_info is None
    running.stop()  # nothing is raised by what could not be written


def test_the_share_is_drawn_by_seed_and_number_alone():
    from sweet_jax.server.audit import uniform_draws

    drawn = [uniform_draws(3, number) for number in range(2000)]
    assert stats.kstest(np.ravel(drawn), "uniform").pvalue > 0.01
    assert drawn[1500:] == [uniform_draws(3, number) for number in range(1500, 2000)]
    assert not set(drawn) & {uniform_draws(4, number) for number in range(2000)}


def test_what_is_certified_is_that_of_the_next_candidate_that_lets_more_leave(sweet):
    counts = LossCounts("agreement", np.asarray([0.9, 0.8, 0.6]), np.asarray([0, 3, 30]), 100)
    bounds = [1 - stats.beta.ppf(0.95, k + 1, 100 - k) for k in (0, 3, 30)]
    at = {0.95: 0, 0.9: 0, 0.85: 1, 0.7: 2, 0.6: 2, 0.1: 2}
    for threshold, place in at.items():
        assert counts.kept_at(threshold) == pytest.approx(bounds[place])
    assert counts.kept_at(float("inf")) == 1
    # Of a model chosen out of five, and of rows that agree in part: as of certificates.
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
def test_options_that_will_not_do(capsys, arguments, message):
    pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
    from sweet_jax import serve

    assert serve.main(["--model=x", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_scipy_the_agreement_is_to_be_given(classifier, monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
    from sweet_jax import serve
    from sweet_jax.server.audit_arguments import make_audit

    monkeypatch.setitem(sys.modules, "scipy", None)
    options = ["--model=x", "--audit=0.5"]
    with pytest.raises(UserError, match=r"^without SciPy, --audit needs --audit_agreement too:"):
        make_audit(classifier, serve._parse(options))
    make_audit(classifier, serve._parse([*options, "--audit_agreement=0.9"]))
    # The level of what the calibration rows certify: no target of the answers is needed.
    assert serve._parse([*options, "--level=0.9"]).level == 0.9
    assert "when the agreement is below 0.9000 (from --audit_agreement)" in capsys.readouterr().out


def test_a_share_of_nothing_is_zero_on_the_page():
    from sweet_jax.server.audit_page import _number

    shown = [_number(value) for value in (0.0, 1e-5, 0.5, float("nan"))]
    assert shown == ["0.0000", "below 0.0001", "0.5000", "unknown"]
