"""The command-line flags of an audit, see `audit`."""

import argparse
import ipaddress
import urllib.parse

from sweet_jax.arguments import ArgumentParser
from sweet_jax.errors import UserError
from sweet_jax.exits.targets import DEFAULT_LEVEL
from sweet_jax.inference.audit_statistics import certified_agreement
from sweet_jax.inference.classifier import AdaptiveClassifier
from sweet_jax.server.audit import Audit, AuditSettings


def add_audit_arguments(parser: ArgumentParser) -> None:
    """Adds --audit and the flags --audit_*."""
    for name, kind, default, text in (
        ("", float, 0.0, "share of the texts to audit with all exits (default 0: no audit)"),
        ("_agreement", float, None, "minimum agreement with the full model, else an alarm"),
        ("_level", float, 0.95, "1 - the probability of ever a false alarm (default 0.95)"),
        ("_seed", int, 0, "random seed of the choice of audited texts (default 0)"),
        ("_log", str, "", "file to append audited texts to, as JSON lines"),
        ("_log_megabytes", int, 64, "maximum size of the log in MiB (default 64)"),
        ("_webhook", str, "", "URL on this machine that alarms are posted to"),
    ):
        parser.add_argument(f"--audit{name}", type=kind, default=default, help=text)
    parser.add_argument(
        "--audit_texts", action="store_true", help="write the texts themselves to the log"
    )


def check_audit_arguments(options: argparse.Namespace) -> None:
    """Raises UserError for a value out of range, or for flags of an audit without --audit."""
    share, agreement, level = options.audit, options.audit_agreement, options.audit_level
    if not 0 <= share <= 1:
        raise UserError(f"--audit must be a share from 0 to 1; got {share:g}")
    if agreement is not None and not 0 < agreement < 1:
        raise UserError(f"--audit_agreement must be between 0 and 1; got {agreement:g}")
    if not 0.5 <= level <= 0.9999:
        raise UserError(f"--audit_level must be from 0.5 to 0.9999; got {level:g}")
    if options.audit_log_megabytes < 1:
        raise UserError(
            f"--audit_log_megabytes must be at least 1; got {options.audit_log_megabytes}"
        )
    if options.audit_seed < 0:
        raise UserError(f"--audit_seed must be at least 0; got {options.audit_seed}")
    names = [n for n in ("agreement", "log", "webhook", "texts") if getattr(options, f"audit_{n}")]
    if names and not share:
        raise UserError(f"--audit_{names[0]} needs --audit=SHARE, such as --audit=0.02")
    if options.audit_webhook:
        _check_webhook(options.audit_webhook)


def _check_webhook(url: str) -> None:
    """Raises UserError unless a URL is on this machine and has a valid port."""
    if not _is_loopback(url):
        raise UserError(
            "--audit_webhook must be a URL on this machine, such as "
            f"http://127.0.0.1:9000/alarm; got {url!r}"
        )
    try:
        possible = urllib.parse.urlsplit(url).port != 0
    except ValueError:  # above 65535, or not a number
        possible = False
    if not possible:
        raise UserError(f"--audit_webhook must have a port from 1 to 65535; got {url!r}")


def _is_loopback(url: str) -> bool:
    """Returns whether a URL is an HTTP or HTTPS URL on this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    return local and parts.scheme in ("http", "https")


def make_audit(classifier: AdaptiveClassifier, options: argparse.Namespace) -> Audit:
    """Returns the audit that the flags request, and prints when it raises an alarm."""
    agreement, why = options.audit_agreement, "from --audit_agreement"
    if agreement is None and options.agreement is not None:
        agreement, why = options.agreement, "the target of the operating point"
    if agreement is None:
        why = "certified on the calibration rows"
        try:
            level = options.level or DEFAULT_LEVEL
            agreement = certified_agreement(classifier.model, classifier.rule, level)
        except UserError as error:  # SciPy is not installed
            raise UserError(
                "without SciPy, --audit needs --audit_agreement too: set it, or pip install scipy"
            ) from error
    if agreement is None:
        print(
            "audit: no alarm for the agreement, since no calibration rows certify one under this "
            "policy: set --audit_agreement",
            flush=True,
        )
    else:
        print(f"audit: alarm when the agreement is below {agreement:.4f} ({why})", flush=True)
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
