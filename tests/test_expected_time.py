"""The estimate of the training time, from steps that did not wait for compilation."""

import pytest

from sweet_jax.training.expected_time import ExpectedTime


def run_steps(expected: ExpectedTime, now: list[float], lengths: list[int], lag: int) -> list[str]:
    """Returns the messages of steps of 0.1 s for 16 tokens, and 30 s more for a new length."""
    compiled, pending, messages = set(), [], []
    for length in lengths:
        now[0] += 0 if length in compiled else 30  # compiling
        compiled.add(length)
        expected.dispatched(length, lag)
        pending.append(length)
        while len(pending) > lag:
            now[0] += 0.1 * pending[0] / 16
            messages.append(expected.done(pending.pop(0)))
    return [text for text in messages if text]


@pytest.mark.parametrize("lag", [0, 1])
def test_expected_time_excludes_steps_that_compile(lag):
    now = [0.0]
    expected = ExpectedTime(1000, 500.0, lambda: now[0])
    lengths = [16, 16, 32, 16, 16, 32, 32, 16, 16, 32, 16, 32, 16, 32]
    (message,) = run_steps(expected, now, lengths, lag)
    assert run_steps(expected, now, lengths, lag) == []
    # About 1,490 steps of 0.14 s; only the first of each length takes 30 s more.
    assert message.startswith("expected training time: about 3.")
    assert " minutes, at 0.1" in message


def test_expected_time_is_reported_once_or_not_at_all():
    now = [0.0]
    assert run_steps(ExpectedTime(1000, None, lambda: now[0]), now, [16] * 30, 1) == []
    (message,) = run_steps(ExpectedTime(100, 0.0, lambda: now[0]), now, [16] * 30, 1)
    assert message.startswith("expected training time: about 9 seconds, at 0.1 s per step")
