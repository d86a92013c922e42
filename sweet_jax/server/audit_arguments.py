"""The flags of an audit, see `audit`."""

import argparse
import ipaddress
import urllib.parse

from sweet_jax.arguments import ArgumentParser
from sweet_jax.config import UserError
from sweet_jax.exits.targets import DEFAULT_LEVEL
from sweet_jax.inference.audit_statistics import certified_agreement
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.server.audit import Audit, AuditSettings


def add_audit_arguments(parser: ArgumentParser) -> None:
    """Adds --audit and what goes with it."""
    for name, kind, default, text in (
        ("", float, 0.0, "share of the texts to compute by all layers too (default 0: none)"),
        ("_agreement", float, None, "smallest agreement with the full model before an alarm"),
        ("_level", float, 0.95, "1 - the chance of a false alarm, ever (default 0.95)"),
        ("_seed", int, 0, "random seed of the texts that are audited (default 0)"),
        ("_log", str, "", "file to append audited texts to, as JSON lines"),
        ("_log_megabytes", int, 64, "largest size of the log (default 64)"),
        ("_webhook", str, "", "URL on this machine that an alarm is posted to"),
    ):
        parser.add_argument(f"--audit{name}", type=kind, default=default, help=text)
    parser.add_argument(
        "--audit_texts", action="store_true", help="whether the log holds the texts themselves"
    )


def check_audit_arguments(options: argparse.Namespace) -> None:
    """Raises UserError for a value out of range, or an option of an audit without one."""
    share, agreement, level = options.audit, options.audit_agreement, options.audit_level
    if not 0 <= share <= 1:
        raise UserError(f"--audit must be a share from 0 to 1; got {share:g}")
    if agreement is not None and not 0 < agreement < 1:
        raise UserError(f"--audit_agreement must be between 0 and 1; got {agreement:g}")
    if not 0.5 <= level <= 0.9999:
        raise UserError(f"--audit_level must be from 0.5 to 0.9999; got {level:g}")
    if options.audit_log_megabytes < 1:
        raise UserError(
            f"--audit_log_megabytes must be 1 or more; got {options.audit_log_megabytes}"
        )
    if options.audit_seed < 0:
        raise UserError(f"--audit_seed must be 0 or more; got {options.audit_seed}")
    given = [n for n in ("agreement", "log", "webhook", "texts") if getattr(options, f"audit_{n}")]
    if given and not share:
        raise UserError(f"--audit_{given[0]} needs --audit=SHARE, such as --audit=0.02")
    if options.audit_webhook:
        _check_webhook(options.audit_webhook)


def _check_webhook(url: str) -> None:
    """Raises UserError unless a URL leads to this machine alone, at a port that can be."""
    if not _is_loopback(url):
        raise UserError(
            "--audit_webhook must be an address of this machine, such as "
            f"http://127.0.0.1:9000/alarm; got {url!r}"
        )
    try:
        possible = urllib.parse.urlsplit(url).port != 0
    except ValueError:  # beyond 65535, or no number
        possible = False
    if not possible:
        raise UserError(f"--audit_webhook must have a port from 1 to 65535; got {url!r}")


def _is_loopback(url: str) -> bool:
    """Returns whether an http URL leads to this machine alone."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    return local and parts.scheme in ("http", "https")


def make_audit(classifier: AdaptiveClassifier, options: argparse.Namespace) -> Audit:
    """Returns the audit that was asked for, and says what its alarm holds the answers to."""
    agreement, why = options.audit_agreement, "asked for"
    if agreement is None and options.agreement is not None:
        agreement, why = options.agreement, "the operating point's target"
    if agreement is None:
        why = "what the calibration rows certify"
        try:
            level = options.level or DEFAULT_LEVEL
            agreement = certified_agreement(classifier.model, classifier.rule, level)
        except UserError as error:  # SciPy is not installed
            raise UserError(
                "without SciPy, --audit needs --audit_agreement too: give it, or pip install scipy"
            ) from error
    if agreement is None:
        print(
            "audit: no alarm, since no calibration row certifies an agreement: give "
            "--audit_agreement",
            flush=True,
        )
    else:
        print(f"audit: alarm when agreement falls below {agreement:.4f} ({why})", flush=True)
    settings = AuditSettings(
        options.audit,
        options.audit_seed,
        agreement,
        options.audit_level,
        options.audit_webhook,
        options.audit_log,
        options.audit_log_megabytes << 20,
        options.audit_texts,
        options.precision or "float32",
    )
    return Audit(classifier, settings)
