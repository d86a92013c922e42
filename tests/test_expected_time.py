"""The expected time of a run, from a few steps that compiled nothing."""

import pytest

from sweet_jax.training.expected_time import ExpectedTime


def spend(expected: ExpectedTime, now: list[float], lengths: list[int], lag: int) -> list[str]:
    """What is said of steps that take 0.1 s for 16 tokens, and 30 s more where a length is new."""
    seen, late, said = set(), [], []
    for length in lengths:
        now[0] += 0 if length in seen else 30  # compiling
        seen.add(length)
        expected.dispatched(length, lag)
        late.append(length)
        while len(late) > lag:
            now[0] += 0.1 * late[0] / 16
            said.append(expected.done(late.pop(0)))
    return [text for text in said if text]


@pytest.mark.parametrize("lag", [0, 1])
def test_steps_that_compile_are_not_counted(lag):
    now = [0.0]
    expected = ExpectedTime(1000, 500.0, lambda: now[0])
    lengths = [16, 16, 32, 16, 16, 32, 32, 16, 16, 32, 16, 32, 16, 32]
    (said,) = spend(expected, now, lengths, lag)
    assert spend(expected, now, lengths, lag) == []
    # About 1,490 steps of 0.14 s; those whose length was new took 30 s.
    assert said.startswith("expected training time: about 3.")
    assert " minutes, at 0.1" in said


def test_nothing_is_said_where_it_was_said_before():
    now = [0.0]
    assert spend(ExpectedTime(1000, None, lambda: now[0]), now, [16] * 30, 1) == []
    (said,) = spend(ExpectedTime(100, 0.0, lambda: now[0]), now, [16] * 30, 1)
    assert said.startswith("expected training time: about 9 seconds, at 0.1 s per step")
