"""Tokenization, calibration splits, and batches padded to a few lengths."""

import dataclasses

import numpy as np
import pytest

from sweet_jax.config import Config
from sweet_jax.data.batches import (
    Tokens,
    evaluation_batch_indices,
    random_batch_indices,
    rows_of_steps,
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


@pytest.mark.parametrize("lengths", [None, np.arange(70) % 9])
def test_rows_of_steps_are_counted_without_those_that_fill_a_partial_batch(lengths):
    rows = [np.arange(35), np.arange(35, 70)]
    steps = 2 * steps_per_epoch(35, 8)
    drawn = [training_batch_indices(rows, (0, 1), step, 8, lengths) for step in range(steps)]
    counted = rows_of_steps(35, steps, 8, grouped=lengths is not None)
    assert counted.tolist() == [int((indices[0] >= 0).sum()) for indices in drawn]
    assert sorted(counted) == [3, 3, *[8] * 8]


@pytest.fixture
def tokenizer(checkpoint):
    return load_tokenizer(open_checkpoint(str(checkpoint)))


@pytest.fixture
def tokens(rows, tokenizer) -> Tokens:
    train = load_dataset(Config(task="own", data_files=str(rows), text_columns="text")).train
    return tokenize(tokenizer, train, max_length=40)


def split_rows(seed: int = 0, labels: np.ndarray = LABELS, **values):
    return split_calibration_rows(labels, Config(**{"train_size": 100, **values}).resolved(), seed)


@pytest.mark.parametrize(
    ("max_length", "lengths"),
    [(8, (8,)), (32, (32,)), (33, (32, 33)), (128, (32, 48, 64, 96, 128))],
)
def test_bucket_lengths_ascend_to_max_length(max_length, lengths):
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
def test_short_lengths_are_added_when_they_save_enough_tokens(longest, steps, short):
    assert with_short((32, 48, 64), np.asarray(longest), steps) == (*short, 32, 48, 64)
    assert with_short((16,), np.minimum(longest, 16), steps) == (16,)


@pytest.mark.parametrize(
    ("longest", "rows", "lengths"),
    [
        ([30, 50, 90], 1000, (96,)),  # one program
        ([30, 50, 50, 90], 1_200_000, (64, 96)),
        ([30, 50, 90], 10_000_000, (32, 64, 96)),
        ([100] * 3, 10**9, (128,)),
        ([200], 1000, (256,)),  # the last length holds every row
    ],
)
def test_accelerator_keeps_only_lengths_that_save_enough_tokens(longest, rows, lengths):
    chosen = worth_compiling(bucket_lengths(256), np.asarray(longest), rows)
    assert chosen == tuple(dict.fromkeys((*lengths, 256)))


def test_accelerator_evaluates_few_rows_at_few_lengths():
    assert evaluation_lengths(200, 1000) == (64, 128, 200)
    assert evaluation_lengths(48, 1000) == (48,)
    assert evaluation_lengths(200, 10**6) == bucket_lengths(200)


def test_single_texts_are_tokenized_with_special_tokens(tokenizer):
    split = Split([("word0 word7",), ("absent",)], np.array([1, 0], np.int32))
    tokens = tokenize(tokenizer, split, max_length=16)
    assert tokens.input_ids.tolist() == [CLS, WORD0, WORD0 + 7, SEP, CLS, 1, SEP]
    assert tokens.starts.tolist() == [0, 4, 7]
    assert tokens.lengths.tolist() == [4, 3]
    assert not tokens.token_type_ids.any()
    assert tokens.labels.tolist() == [1, 0]
    assert (len(tokens), tokens.pad_id) == (2, 0)


def test_tokens_of_a_row_do_not_depend_on_number_of_rows(tokens, rows, tokenizer):
    train = load_dataset(Config(task="own", data_files=str(rows), text_columns="text")).train
    repeats = 10_000 // len(train.texts)  # more than one call of the tokenizer
    large = tokenize(tokenizer, Split(train.texts * repeats, np.tile(train.labels, repeats)), 40)
    for name in ("input_ids", "token_type_ids", "lengths", "labels"):
        np.testing.assert_array_equal(getattr(large, name), np.tile(getattr(tokens, name), repeats))


def test_duplicates_of_calibration_texts_are_dropped_from_training_rows():
    texts = [(word,) for word in ["a", "b", "a", "c", "d", "e", "d", "b"]]
    first_split = np.array([0, 1, 3, 5]), np.array([2, 4])  # row 0 repeats row 2
    second_split = np.array([1, 2, 3, 4]), np.array([5])
    strata = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    splits, dropped = drop_duplicates(texts, [first_split, second_split], strata, [0, 1])
    (trained, held_out), (other_trained, other_held_out) = splits
    assert (trained.tolist(), held_out.tolist()) == ([1, 3, 5], [2, 4])
    assert len(other_trained) == 3  # as many as of the first split, for one compiled program
    assert (other_held_out.tolist(), dropped) == ([5], 1)
    assert set(other_trained) < {1, 2, 3, 4}
    assert 4 in other_trained  # the only row of its class
    (single_split,), dropped = drop_duplicates(texts, [second_split], strata, [1])
    assert (single_split[0].tolist(), dropped) == ([1, 2, 3, 4], 0)


def test_rows_dropped_for_equal_size_are_in_proportion_to_classes():
    """The rows are sorted by class, so dropping the last ones would remove a whole class."""
    classes = np.repeat([0, 1, 2], [60, 30, 10])
    texts = [("thanks" if row < 12 else f"text {row}",) for row in range(100)]
    everything = np.arange(100)
    held_out = ([0, 70], [50, 71])
    rows = [(np.setdiff1d(everything, held), np.array(held)) for held in held_out]
    (deduplicated, thinned), dropped = drop_duplicates(texts, rows, classes, [0, 1])
    assert dropped == 11
    assert deduplicated[0].tolist() == [*range(12, 70), *range(71, 100)]
    counts = np.bincount(classes[thinned[0]])
    assert counts.tolist() == [59 - 7, 29 - 3, 10 - 1]
    (_, repeated), _ = drop_duplicates(texts, rows, classes, [0, 1])
    np.testing.assert_array_equal(thinned[0], repeated[0])
    (_, other_seed), _ = drop_duplicates(texts, rows, classes, [0, 2])
    assert thinned[0].tolist() != other_seed[0].tolist()


def test_second_text_of_a_pair_has_token_type_1(tokenizer):
    split = Split([("word1", "word2 word3")], np.array([0], np.int32))
    tokens = tokenize(tokenizer, split, max_length=16)
    assert tokens.input_ids.tolist() == [CLS, WORD0 + 1, SEP, WORD0 + 2, WORD0 + 3, SEP]
    assert tokens.token_type_ids.tolist() == [0, 0, 0, 1, 1, 1]


def test_truncation_to_max_length_shortens_the_longer_text(tokenizer):
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


def test_whole_lengths_are_those_before_truncation(tokenizer):
    words = [5, 50, 3, 10, 200]
    texts = [(" ".join(["word1"] * n),) for n in words]
    tokens = tokenize(tokenizer, Split(texts, np.zeros(5, np.int32)), max_length=12)
    assert tokens.lengths.tolist() == [7, 12, 5, 12, 12]
    assert whole_lengths(tokenizer, texts, tokens).tolist() == [n + 2 for n in words]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (12, 4), (3, 8)])
def test_epoch_visits_every_row_once_and_pads_the_last_batch(count, size):
    rows = np.arange(100, 100 + count)
    steps = steps_per_epoch(count, size)
    for epoch in range(3):
        batches = [random_batch_indices(rows, 0, epoch, batch, size) for batch in range(steps)]
        assert {batch.shape for batch in batches} == {(size,)}
        assert all((batch >= 0).all() for batch in batches[:-1])
        visited = np.concatenate(batches)
        assert sorted(visited[visited >= 0]) == rows.tolist()
        assert (visited[count:] == -1).all()


def test_training_batch_depends_only_on_seed_epoch_and_number():
    rows = np.arange(64)
    key = {"seed": 3, "epoch": 1, "batch": 2, "size": 8}
    first = random_batch_indices(rows, **key).copy()
    random_batch_indices(rows, 9, 9, 0, 8)[:] = -7  # a caller may overwrite its batch
    np.testing.assert_array_equal(random_batch_indices(rows, **key), first)
    for changed in ({"seed": 4}, {"epoch": 2}, {"batch": 3}):
        assert (random_batch_indices(rows, **{**key, **changed}) != first).any()


def test_training_batches_of_a_seed_do_not_depend_on_learning_rate():
    rows = [np.arange(50), np.arange(50), np.arange(50, 100)]  # a seed at two rates, another seed
    for step in (0, 6, 7, 20):
        picked = training_batch_indices(rows, [5, 5, 6], step, 8)
        epoch, batch = divmod(step, 7)
        for r, seed in enumerate((5, 5, 6)):
            expected = random_batch_indices(rows[r], seed, epoch, batch, 8)
            np.testing.assert_array_equal(picked[r], expected)
        assert (picked[0] == picked[1]).all()
        assert (picked[0] + 50 != picked[2]).any()


def test_evaluation_batches_hold_every_row_once_with_its_position(tokens):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(len(tokens))[:45] for _ in range(2)])
    labels, ids = np.full(rows.shape, -2), np.full(rows.shape, -2)
    visits = np.zeros(rows.shape, int)
    widths = []
    for positions, picked in evaluation_batch_indices(tokens, rows, 16):
        batch = pad_rows(tokens, picked, bucket_lengths(40))
        assert positions.shape == batch["labels"].shape == (2, 16)
        widths.append(batch["mask"].shape[-1])
        for r in range(2):
            real = positions[r] >= 0
            visits[r, positions[r, real]] += 1
            labels[r, positions[r, real]] = batch["labels"][r, real]
            ids[r, positions[r, real]] = batch["input_ids"][r, real].sum(-1)
            np.testing.assert_array_equal(batch["row_mask"][r], real)
            assert (batch["mask"][r, ~real].sum(axis=-1) == 1).all()
    assert (visits == 1).all()
    np.testing.assert_array_equal(labels, tokens.labels[rows])
    totals = np.add.reduceat(tokens.input_ids, tokens.starts[:-1])  # padding adds 0
    np.testing.assert_array_equal(ids, totals[rows])
    assert widths == sorted(widths)
    assert set(widths) == {32, 40}


def test_pad_rows_masks_padding_tokens_and_rows():
    tokens = Tokens(
        input_ids=np.array([2, 9, 3, 2, 8, 7, 3], np.int32),
        token_type_ids=np.array([1, 1, 1, 0, 0, 1, 1], np.int32),
        starts=np.array([0, 3, 7]),
        labels=np.array([1, 0], np.int32),
        pad_id=4,
    )
    batch = pad_rows(tokens, np.array([1, -1, 0]), (2, 5, 8))
    assert batch["input_ids"].tolist() == [[2, 8, 7, 3, 4], [2, 4, 4, 4, 4], [2, 9, 3, 4, 4]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0], [1] + [0] * 4, [1, 1, 1, 0, 0]]
    assert batch["mask"].sum(-1).tolist() == [4, 1, 3]
    assert batch["labels"][[0, 2]].tolist() == [0, 1]
    assert batch["row_mask"].tolist() == [True, False, True]
    masks = {"mask", "row_mask"}
    assert {str(v.dtype) for k, v in batch.items() if k not in masks} == {"int32"}
    assert {str(batch[k].dtype) for k in masks} == {"bool"}
    assert pad_rows(tokens, np.array([0, -1]), (3, 8))["mask"].shape == (2, 3)
    pairs = dataclasses.replace(tokens, second_starts=np.array([1, 2], np.int32))
    batch = pad_rows(pairs, np.array([1, -1]), (5,))
    assert batch["second_start"].tolist() == [2, 1]
    assert batch["mask"].sum(-1).tolist() == [4, 2]  # a padding row has a token in each text


def test_pad_rows_accepts_a_last_row_without_tokens():
    tokens = Tokens(
        input_ids=np.array([2, 9, 3], np.int32),
        token_type_ids=np.zeros(3, np.int32),
        starts=np.array([0, 3, 3]),
        labels=np.array([1, 0], np.int32),
        pad_id=4,
    )
    batch = pad_rows(tokens, np.array([0, 1]), (4,))
    assert batch["input_ids"].tolist() == [[2, 9, 3, 4], [4] * 4]


@pytest.mark.parametrize("length", [31, 32, 33])
def test_batch_is_padded_to_the_smallest_sufficient_length(length):
    ids = np.ones(length, np.int32)
    tokens = Tokens(ids, ids, np.array([0, length]), np.zeros(1, np.int32), 0)
    batch = pad_rows(tokens, np.array([0]), bucket_lengths(64))
    assert batch["mask"].shape == (1, 32 if length <= 32 else 48)
    assert batch["mask"].sum() == length


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_calibration_split_is_disjoint_stratified_and_of_exact_size(fraction):
    train, calibration = split_rows(calibration_fraction=fraction)
    assert len(train) + len(calibration) == 100
    assert len(calibration) == round(100 * fraction)
    assert not set(train) & set(calibration)
    assert train.tolist() == sorted(train)
    assert calibration.tolist() == sorted(calibration)
    counts = np.bincount(LABELS[np.concatenate([train, calibration])], minlength=3)
    held_out = np.bincount(LABELS[calibration], minlength=3)
    assert np.abs(held_out - fraction * counts).max() < 1


@pytest.mark.parametrize("preset", ["", "paper", "reference"])
def test_calibration_split_is_the_same_for_every_method(preset):
    splits = [split_rows(method=method, preset=preset) for method in METHODS]
    for train, calibration in splits[1:]:
        np.testing.assert_array_equal(train, splits[0][0])
        np.testing.assert_array_equal(calibration, splits[0][1])


def test_calibration_split_differs_by_seed_but_not_in_size():
    (train, held_out), (other_train, other_held_out) = split_rows(seed=0), split_rows(seed=1)
    assert (len(train), len(held_out)) == (len(other_train), len(other_held_out))
    assert set(train) != set(other_train)
    np.testing.assert_array_equal(split_rows(seed=0)[0], train)


@pytest.mark.parametrize("seed", [0, 1])
def test_reference_preset_trains_on_first_rows_and_holds_out_none(seed):
    train, calibration = split_rows(seed, preset="reference")
    assert train.tolist() == list(range(100))
    assert calibration.shape == (0,)


def test_paper_preset_trains_on_all_drawn_rows():
    train, calibration = split_rows(preset="paper")
    assert calibration.shape == (0,)
    all_rows = np.sort(np.concatenate(split_rows(preset="")))
    np.testing.assert_array_equal(train, all_rows)  # the same rows, none held out


def test_train_size_above_number_of_rows_takes_all_rows():
    train, calibration = split_rows(train_size=6000)
    assert sorted([*train, *calibration]) == list(range(len(LABELS)))


@pytest.mark.parametrize(
    ("size", "fraction"),
    [(2, 0.1), (4, 0.1), (2, 0.9)],
    ids=["nothing held out", "half a row held out", "one row of each class"],
)
def test_too_few_rows_for_calibration_are_refused(size, fraction):
    labels = np.array([0, 1] * 20)
    with pytest.raises(UserError, match=f"{size} training rows are too few .* raise train_size"):
        split_rows(labels=labels, train_size=size, calibration_fraction=fraction)
