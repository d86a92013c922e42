"""Confidences of the JAX engine, its splitting of batches, and its compilation."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweet_jax.exits.calibration import BELOW_ONE, Calibrator
from sweet_jax.exits.confidences import POLICIES, PolicyInput
from sweet_jax.inference.batch_split import Splitting, split_by_length
from sweet_jax.inference.engine import PLAIN_POLICIES, load_engine, padded_lengths
from sweet_jax.inference.plain_confidences import plain_complement, plain_complements


def complements_by_row(logits, temperatures):
    pairs = list(zip(logits.tolist(), temperatures.tolist(), strict=True))
    return np.asarray([[plain_complement(p, *pair) for p in PLAIN_POLICIES] for pair in pairs])


@pytest.mark.parametrize(
    "compute", [jax.jit(plain_complements), plain_complements, complements_by_row]
)
@pytest.mark.parametrize("classes", [2, 5])
def test_plain_complements_equal_policy_confidences(classes, compute):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, classes)) * 10.0 ** rng.uniform(-3, 2, (200, 1))
    logits = logits.astype(np.float32)
    logits[0], logits[1, 0], logits[2, 0] = np.nan, np.inf, -np.inf
    logits[3], logits[4, 0] = 0, np.nan
    for temperature in (0.5, 1.0, 7.0, np.nan):
        fitted = np.full(len(logits), temperature, np.float32)
        with np.errstate(all="ignore"):
            complements = np.asarray(compute(logits, fitted))
        policy_input = PolicyInput(logits[None], None, Calibrator(np.asarray([temperature])))
        for column, name in enumerate(PLAIN_POLICIES):
            with np.errstate(invalid="ignore"):
                (expected,) = POLICIES[name].confidences(policy_input)
            actual = 1 - complements[:, column].astype(np.float64)
            np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
            defined = ~np.isnan(expected)
            np.testing.assert_allclose(actual[defined], expected[defined], rtol=0, atol=2e-6)
            assert (actual[defined] <= BELOW_ONE).all()
            # Near 1 the distance to 1 counts.
            near_one = defined & (1 - expected < 1e-3) & (1 - expected > 1e-12)
            np.testing.assert_allclose(1 - actual[near_one], 1 - expected[near_one], rtol=1e-3)


@given(
    count=st.integers(1, 64),
    largest=st.integers(1, 64),
    length=st.sampled_from(padded_lengths(512)),
    platform=st.sampled_from(["cpu", "gpu"]),
)
def test_split_of_batch_has_few_sizes_and_nearly_full_parts(count, largest, length, platform):
    splitting = Splitting.on(platform)
    sizes = splitting.sizes(largest, length)
    parts = splitting.split(min(count, largest), sizes)
    assert len(sizes) <= 3
    assert set(parts) <= set(sizes)
    assert max(parts) * length <= max(splitting.tokens, length)
    texts = min(count, largest)
    assert sum(parts[:-1]) < texts <= sum(parts)
    if platform == "cpu":
        assert texts - sum(parts[:-1]) >= 0.6 * parts[-1]
    else:
        assert len(parts) == 1


def test_splitting_needs_at_most_a_third_of_the_programs():
    """Without splitting there are 320: 4 exits, 8 batch sizes up to 32, 10 lengths up to 128."""
    splitting = Splitting(512, 0.6)
    pairs = [size for length in padded_lengths(128) for size in splitting.sizes(32, length)]
    assert 4 * len(pairs) <= 320 / 3


@given(tokens=st.lists(st.integers(1, 60), min_size=1, max_size=40), most=st.integers(1, 200))
def test_split_by_length_covers_texts_once_within_token_limit(tokens, most):
    lengths = np.asarray(tokens)
    parts = split_by_length(lengths, most)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(tokens)))
    assert all(len(part) * lengths[part].max() <= most or len(part) == 1 for part in parts)
    # Shorter texts are in earlier parts, and no two neighbors would have been one part.
    for part, next_part in itertools.pairwise(parts):
        assert lengths[part].max() <= lengths[next_part].min()
        assert (len(part) + 1) * lengths[next_part].min() > most


def test_concurrent_threads_compile_program_once(sweet, monkeypatch):
    engine, lowered = load_engine("jax", sweet.classifier.model), []

    def lower(*program):
        lowered.append(program)
        time.sleep(0.05)
        return SimpleNamespace(compile=object)

    monkeypatch.setattr(engine, "lower", lower)
    stage = engine.stages()[0]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: engine.compile(stage, 1, 16, 2), range(4)))
    assert len(lowered) == engine.compilations == 1
