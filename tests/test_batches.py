"""Tokens, the rows a replica reads, and batches of a handful of lengths."""

import numpy as np
import pytest

from sweet_jax.config import Config
from sweet_jax.data.batches import (
    Tokens,
    evaluation_batch_indices,
    random_batch_indices,
    steps_per_epoch,
    tokenize,
    training_batch_indices,
    whole_lengths,
)
from sweet_jax.data.load import load_dataset
from sweet_jax.data.padding import (
    bucket_lengths,
    evaluation_lengths,
    pad_rows,
    with_short,
    worth_compiling,
)
from sweet_jax.data.splits import Split, drop_duplicates, split_calibration_rows
from sweet_jax.errors import UserError
from sweet_jax.methods import METHODS
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pretrained import open_checkpoint

CLS, SEP, WORD0 = 2, 3, 5  # ids of the tiny checkpoint's tokenizer
LABELS = np.repeat([0, 1, 2], [200, 60, 140]).astype(np.int32)


@pytest.fixture
def tokenizer(checkpoint):
    return load_tokenizer(open_checkpoint(str(checkpoint)))


@pytest.fixture
def tokens(rows, tokenizer) -> Tokens:
    train = load_dataset(Config(task="own", data_files=str(rows), text_columns="text")).train
    return tokenize(tokenizer, train, max_length=40)


def drawn(seed: int = 0, labels: np.ndarray = LABELS, **values):
    return split_calibration_rows(labels, Config(**{"train_size": 100, **values}).resolved(), seed)


@pytest.mark.parametrize(
    ("max_length", "lengths"),
    [(8, (8,)), (32, (32,)), (33, (32, 33)), (128, (32, 48, 64, 96, 128))],
)
def test_buckets_ascend_to_the_longest_length(max_length, lengths):
    assert bucket_lengths(max_length) == lengths


@pytest.mark.parametrize(
    ("longest", "steps", "short"),
    [
        ([10] * 8 + [20] + [40], 1000, (16,)),  # 800 steps save 16 tokens each; 100 would save 8
        ([10] * 8 + [20] + [40], 2000, (16, 24)),
        ([10] * 8 + [20] + [40], 100, (16,)),
        ([10] * 8 + [20] + [40], 60, ()),
        ([10] + [22] * 19, 1000, (24,)),  # the shortest batches are padded to 24 too
        ([40] * 10, 10_000, ()),
    ],
)
def test_short_lengths_are_compiled_for_where_that_saves_enough(longest, steps, short):
    assert with_short((32, 48, 64), np.asarray(longest), steps) == (*short, 32, 48, 64)
    assert with_short((16,), np.minimum(longest, 16), steps) == (16,)


@pytest.mark.parametrize(
    ("longest", "rows", "lengths"),
    [
        ([30, 50, 90], 1000, (96,)),  # one program
        ([30, 50, 50, 90], 1_200_000, (64, 96)),
        ([30, 50, 90], 10_000_000, (32, 64, 96)),
        ([100] * 3, 10**9, (128,)),
        ([200], 1000, (256,)),  # cut there: the last length holds every row
    ],
)
def test_an_accelerator_compiles_for_the_lengths_that_save_enough(longest, rows, lengths):
    chosen = worth_compiling(bucket_lengths(256), np.asarray(longest), rows)
    assert chosen == tuple(dict.fromkeys((*lengths, 256)))


def test_an_accelerator_evaluates_few_rows_at_few_lengths():
    assert evaluation_lengths(200, 1000) == (64, 128, 200)
    assert evaluation_lengths(48, 1000) == (48,)
    assert evaluation_lengths(200, 10**6) == bucket_lengths(200)


def test_tokens_of_single_texts(tokenizer):
    split = Split([("word0 word7",), ("absent",)], np.array([1, 0], np.int32))
    tokens = tokenize(tokenizer, split, max_length=16)
    assert tokens.input_ids.tolist() == [CLS, WORD0, WORD0 + 7, SEP, CLS, 1, SEP]
    assert tokens.starts.tolist() == [0, 4, 7]
    assert tokens.lengths.tolist() == [4, 3]
    assert not tokens.token_type_ids.any()
    assert tokens.labels.tolist() == [1, 0]
    assert (len(tokens), tokens.pad_id) == (2, 0)


def test_a_large_split_is_tokenised_as_a_small_one(tokens, rows, tokenizer):
    train = load_dataset(Config(task="own", data_files=str(rows), text_columns="text")).train
    times = 10_000 // len(train.texts)  # more than one call of the tokenizer
    large = tokenize(tokenizer, Split(train.texts * times, np.tile(train.labels, times)), 40)
    for name in ("input_ids", "token_type_ids", "lengths", "labels"):
        np.testing.assert_array_equal(getattr(large, name), np.tile(getattr(tokens, name), times))


def test_no_trained_text_is_a_calibration_text():
    texts = [(word,) for word in ["a", "b", "a", "c", "d", "e", "d", "b"]]
    first = np.array([0, 1, 3, 5]), np.array([2, 4])  # row 0 repeats row 2
    second = np.array([1, 2, 3, 4]), np.array([5])
    strata = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    pairs, lost = drop_duplicates(texts, [first, second], strata, [0, 1])
    (trained, held), (other, same) = pairs
    assert (trained.tolist(), held.tolist()) == ([1, 3, 5], [2, 4])
    assert (len(other), same.tolist(), lost) == (3, [5], 1)  # as many, for one program
    assert set(other) < {1, 2, 3, 4}
    assert 4 in other  # the only row of its class
    (alone,), lost = drop_duplicates(texts, [second], strata, [1])
    assert (alone[0].tolist(), lost) == ([1, 2, 3, 4], 0)


def test_seeds_with_fewer_repeats_lose_other_rows_of_every_class_in_proportion():
    """The rows are sorted by class: the last ones would be a whole class."""
    classes = np.repeat([0, 1, 2], [60, 30, 10])
    texts = [("thanks" if row < 12 else f"text {row}",) for row in range(100)]
    everything = np.arange(100)
    rows = [(np.setdiff1d(everything, held), np.array(held)) for held in ([0, 70], [50, 71])]
    (bare, thinned), lost = drop_duplicates(texts, rows, classes, [0, 1])
    assert lost == 11
    assert bare[0].tolist() == [*range(12, 70), *range(71, 100)]
    counts = np.bincount(classes[thinned[0]])
    assert counts.tolist() == [59 - 7, 29 - 3, 10 - 1]
    (_, again), _ = drop_duplicates(texts, rows, classes, [0, 1])
    np.testing.assert_array_equal(thinned[0], again[0])
    (_, other), _ = drop_duplicates(texts, rows, classes, [0, 2])
    assert thinned[0].tolist() != other[0].tolist()


def test_the_second_text_of_a_pair_has_token_type_1(tokenizer):
    split = Split([("word1", "word2 word3")], np.array([0], np.int32))
    tokens = tokenize(tokenizer, split, max_length=16)
    assert tokens.input_ids.tolist() == [CLS, WORD0 + 1, SEP, WORD0 + 2, WORD0 + 3, SEP]
    assert tokens.token_type_ids.tolist() == [0, 0, 0, 1, 1, 1]


def test_truncation_keeps_max_length_tokens_and_shortens_the_longer_text(tokenizer):
    long, short = " ".join(["word1"] * 50), "word2 word3"
    labels = np.zeros(2, np.int32)
    single = tokenize(tokenizer, Split([(long,), (short,)], labels), max_length=12)
    assert single.lengths.tolist() == [12, 4]
    assert single.input_ids[11] == SEP
    pairs = tokenize(tokenizer, Split([(long, short), (short, long)], labels), max_length=12)
    assert pairs.lengths.tolist() == [12, 12]
    for row in pairs.input_ids.reshape(2, 12):
        assert (row == WORD0 + 1).sum() == 7
        assert {WORD0 + 2, WORD0 + 3} <= set(row.tolist())


def test_whole_lengths_are_those_before_rows_are_cut(tokenizer):
    words = [5, 50, 3, 10, 200]
    texts = [(" ".join(["word1"] * n),) for n in words]
    tokens = tokenize(tokenizer, Split(texts, np.zeros(5, np.int32)), max_length=12)
    assert tokens.lengths.tolist() == [7, 12, 5, 12, 12]
    assert whole_lengths(tokenizer, texts, tokens).tolist() == [n + 2 for n in words]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (12, 4), (3, 8)])
def test_an_epoch_visits_every_row_once_and_fills_the_last_batch(count, size):
    rows = np.arange(100, 100 + count)
    steps = steps_per_epoch(count, size)
    for epoch in range(3):
        batches = [random_batch_indices(rows, 0, epoch, batch, size) for batch in range(steps)]
        assert {batch.shape for batch in batches} == {(size,)}
        assert all((batch >= 0).all() for batch in batches[:-1])
        read = np.concatenate(batches)
        assert sorted(read[read >= 0]) == rows.tolist()
        assert (read[count:] == -1).all()


def test_training_rows_are_a_pure_function_of_seed_epoch_and_batch():
    rows = np.arange(64)
    key = {"seed": 3, "epoch": 1, "batch": 2, "size": 8}
    first = random_batch_indices(rows, **key).copy()
    random_batch_indices(rows, 9, 9, 0, 8)[
        :
    ] = -7  # what a caller does to its batch is its own affair
    np.testing.assert_array_equal(random_batch_indices(rows, **key), first)
    for other in ({"seed": 4}, {"epoch": 2}, {"batch": 3}):
        assert (random_batch_indices(rows, **{**key, **other}) != first).any()


def test_training_rows_are_those_of_the_seed_whatever_the_learning_rate():
    rows = [np.arange(50), np.arange(50), np.arange(50, 100)]  # a seed at two rates, another seed
    for step in (0, 6, 7, 20):
        picked = training_batch_indices(rows, [5, 5, 6], step, 8)
        epoch, number = divmod(step, 7)
        for r, seed in enumerate((5, 5, 6)):
            alone = random_batch_indices(rows[r], seed, epoch, number, 8)
            np.testing.assert_array_equal(picked[r], alone)
        assert (picked[0] == picked[1]).all()
        assert (picked[0] + 50 != picked[2]).any()


def test_evaluation_visits_every_row_once_and_puts_it_back_in_order(tokens):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(len(tokens))[:45] for _ in range(2)])
    labels, ids = np.full(rows.shape, -2), np.full(rows.shape, -2)
    visits = np.zeros(rows.shape, int)
    widths = []
    for places, picked in evaluation_batch_indices(tokens, rows, 16):
        batch = pad_rows(tokens, picked, bucket_lengths(40))
        assert places.shape == batch["labels"].shape == (2, 16)
        widths.append(batch["mask"].shape[-1])
        for r in range(2):
            real = places[r] >= 0
            visits[r, places[r, real]] += 1
            labels[r, places[r, real]] = batch["labels"][r, real]
            ids[r, places[r, real]] = batch["input_ids"][r, real].sum(-1)
            np.testing.assert_array_equal(batch["row_mask"][r], real)
            assert not batch["mask"][r, ~real].any()
    assert (visits == 1).all()
    np.testing.assert_array_equal(labels, tokens.labels[rows])
    totals = np.add.reduceat(tokens.input_ids, tokens.starts[:-1])  # padding adds 0
    np.testing.assert_array_equal(ids, totals[rows])
    assert widths == sorted(widths)
    assert set(widths) == {32, 40}


def test_padding_and_the_masks_of_tokens_and_rows():
    tokens = Tokens(
        input_ids=np.array([2, 9, 3, 2, 8, 7, 3], np.int32),
        token_type_ids=np.array([1, 1, 1, 0, 0, 1, 1], np.int32),
        starts=np.array([0, 3, 7]),
        labels=np.array([1, 0], np.int32),
        pad_id=4,
    )
    batch = pad_rows(tokens, np.array([1, -1, 0]), (2, 5, 8))
    assert batch["input_ids"].tolist() == [[2, 8, 7, 3, 4], [4] * 5, [2, 9, 3, 4, 4]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0], [0] * 5, [1, 1, 1, 0, 0]]
    assert batch["mask"].sum(-1).tolist() == [4, 0, 3]
    assert batch["labels"][[0, 2]].tolist() == [0, 1]
    assert batch["row_mask"].tolist() == [True, False, True]
    masks = {"mask", "row_mask"}
    assert {str(v.dtype) for k, v in batch.items() if k not in masks} == {"int32"}
    assert {str(batch[k].dtype) for k in masks} == {"bool"}
    assert pad_rows(tokens, np.array([0, -1]), (3, 8))["mask"].shape == (2, 3)


@pytest.mark.parametrize("length", [31, 32, 33])
def test_the_bucket_is_the_smallest_that_holds_the_batch(length):
    ids = np.ones(length, np.int32)
    tokens = Tokens(ids, ids, np.array([0, length]), np.zeros(1, np.int32), 0)
    batch = pad_rows(tokens, np.array([0]), bucket_lengths(64))
    assert batch["mask"].shape == (1, 32 if length <= 32 else 48)
    assert batch["mask"].sum() == length


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_drawn_rows_are_disjoint_in_proportion_and_of_exact_size(fraction):
    train, calibration = drawn(calibration_fraction=fraction)
    assert len(train) + len(calibration) == 100
    assert len(calibration) == round(100 * fraction)
    assert not set(train) & set(calibration)
    assert train.tolist() == sorted(train)
    assert calibration.tolist() == sorted(calibration)
    counts = np.bincount(LABELS[np.concatenate([train, calibration])], minlength=3)
    held = np.bincount(LABELS[calibration], minlength=3)
    assert np.abs(held - fraction * counts).max() < 1


@pytest.mark.parametrize("preset", ["", "paper", "reference"])
def test_drawn_rows_are_the_same_for_every_method(preset):
    found = [drawn(method=method, preset=preset) for method in METHODS]
    for train, calibration in found[1:]:
        np.testing.assert_array_equal(train, found[0][0])
        np.testing.assert_array_equal(calibration, found[0][1])


def test_drawn_rows_differ_by_seed_in_content_and_not_in_size():
    (train, held), (other, other_held) = drawn(seed=0), drawn(seed=1)
    assert (len(train), len(held)) == (len(other), len(other_held))
    assert set(train) != set(other)
    np.testing.assert_array_equal(drawn(seed=0)[0], train)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_reference_preset_reads_the_first_rows_and_holds_out_none(seed):
    train, calibration = drawn(seed, preset="reference")
    assert train.tolist() == list(range(100))
    assert calibration.shape == (0,)


def test_nothing_is_held_out_where_temperatures_are_fitted_on_validation_rows():
    train, calibration = drawn(preset="paper")
    assert calibration.shape == (0,)
    together = np.sort(np.concatenate(drawn(preset="")))
    np.testing.assert_array_equal(train, together)  # the same subset, but whole


def test_a_train_size_over_the_rows_there_are_takes_them_all():
    train, calibration = drawn(train_size=6000)
    assert sorted([*train, *calibration]) == list(range(len(LABELS)))


@pytest.mark.parametrize(
    ("size", "fraction"),
    [(2, 0.1), (4, 0.1), (2, 0.9)],
    ids=["nothing held out", "half a row held out", "one row of each class"],
)
def test_too_few_rows_to_hold_any_out_are_refused(size, fraction):
    labels = np.array([0, 1] * 20)
    with pytest.raises(UserError, match=f"{size} training rows are too few .* raise train_size"):
        drawn(labels=labels, train_size=size, calibration_fraction=fraction)
