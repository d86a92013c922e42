"""What the JAX engine computes beside logits, and the parts that it splits batches into."""

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


def row_by_row(logits, temperatures):
    pairs = list(zip(logits.tolist(), temperatures.tolist(), strict=True))
    return np.asarray([[plain_complement(p, *pair) for p in PLAIN_POLICIES] for pair in pairs])


@pytest.mark.parametrize("compute", [jax.jit(plain_complements), plain_complements, row_by_row])
@pytest.mark.parametrize("classes", [2, 5])
def test_confidences_of_an_engine_are_those_of_the_policies(classes, compute):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, classes)) * 10.0 ** rng.uniform(-3, 2, (200, 1))
    logits = logits.astype(np.float32)
    logits[0], logits[1, 0], logits[2, 0] = np.nan, np.inf, -np.inf
    logits[3], logits[4, 0] = 0, np.nan
    for temperature in (0.5, 1.0, 7.0, np.nan):
        fitted = np.full(len(logits), temperature, np.float32)
        with np.errstate(all="ignore"):
            found = np.asarray(compute(logits, fitted))
        given = PolicyInput(logits[None], None, Calibrator(np.asarray([temperature])))
        for column, name in enumerate(PLAIN_POLICIES):
            with np.errstate(invalid="ignore"):
                (wanted,) = POLICIES[name].confidences(given)
            ours = 1 - found[:, column].astype(np.float64)
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(wanted))
            known = ~np.isnan(wanted)
            np.testing.assert_allclose(ours[known], wanted[known], rtol=0, atol=2e-6)
            assert (ours[known] <= BELOW_ONE).all()
            # Near 1 the distance to 1 counts.
            sure = known & (1 - wanted < 1e-3) & (1 - wanted > 1e-12)
            np.testing.assert_allclose(1 - ours[sure], 1 - wanted[sure], rtol=1e-3)


@given(
    count=st.integers(1, 64),
    largest=st.integers(1, 64),
    length=st.sampled_from(padded_lengths(512)),
    platform=st.sampled_from(["cpu", "gpu"]),
)
def test_parts_hold_a_batch_and_are_few_and_nearly_full(count, largest, length, platform):
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


def test_warm_up_compiles_a_third_of_the_programs_there_were():
    """320: four exits, batches of up to 32 in 8 sizes, 10 lengths up to 128 tokens."""
    splitting = Splitting(512, 0.6)
    pairs = [size for length in padded_lengths(128) for size in splitting.sizes(32, length)]
    assert 4 * len(pairs) <= 320 / 3


@given(tokens=st.lists(st.integers(1, 60), min_size=1, max_size=40), most=st.integers(1, 200))
def test_parts_by_length_hold_every_text_once_and_fit(tokens, most):
    lengths = np.asarray(tokens)
    parts = split_by_length(lengths, most)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(tokens)))
    assert all(len(part) * lengths[part].max() <= most or len(part) == 1 for part in parts)
    # Shorter texts are in earlier parts, and no two neighbors would have been one part.
    for one, following in itertools.pairwise(parts):
        assert lengths[one].max() <= lengths[following].min()
        assert (len(one) + 1) * lengths[following].min() > most


def test_threads_compile_each_program_once(sweet, monkeypatch):
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
