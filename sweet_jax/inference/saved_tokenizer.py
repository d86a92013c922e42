"""The tokenizer of a saved model, read from its tokenizer.json without transformers.

That file holds everything that determines token ids, as it was when the model was trained.
"""

from collections.abc import Sequence
from typing import Any

from sweet_jax.errors import UserError, one_line
from sweet_jax.files import read_json
from sweet_jax.inference.onnx_files import has_graphs
from sweet_jax.models.checkpoint_folder import (
    TOKENIZER_REPAIRS,
    CheckpointFiles,
    check_vocabulary,
    load_tokenizer,
)
from sweet_jax.models.special_tokens import ensure_first_token
from sweet_jax.storage_errors import discard_native_errors


class EncodedRows(dict[str, list[list[int]]]):
    """Holds the parts of transformers' BatchEncoding that this library reads.

    Attributes:
      encodings: the `tokenizers.Encoding` of each row.

    """

    encodings: list[Any]


class SavedTokenizer:
    """Tokenizes like the transformers tokenizer that wrote the same files.

    Args:
      backend: a `tokenizers.Tokenizer`.
      pad_token_id: token id that pads input_ids.
      truncation_side: side on which a text that is too long is truncated, "right" or "left".

    """

    def __init__(self, backend: Any, pad_token_id: int, truncation_side: str = "right"):
        self.backend_tokenizer, self.pad_token_id = backend, pad_token_id
        self.truncation_side = truncation_side
        backend.no_padding()

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def begins_texts(self) -> bool:
        """Returns whether the tokenizer adds a special token before a text."""
        return self.backend_tokenizer.encode("a").special_tokens_mask[:1] == [1]

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        truncation: bool = False,
        max_length: int | None = None,
        **_: object,
    ) -> "EncodedRows":
        """Returns the input_ids and token_type_ids of each text, or of each pair.

        With `truncation`, a row has at most max_length tokens; in a pair, the longer text is
        truncated first. Other options of transformers' tokenizers are ignored.
        """
        if truncation and max_length is not None:
            self.backend_tokenizer.enable_truncation(max_length, direction=self.truncation_side)
        else:
            self.backend_tokenizer.no_truncation()
        rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = self.backend_tokenizer.encode_batch_fast(rows)  # without offsets
        encoded = EncodedRows(
            input_ids=[row.ids for row in encodings],
            token_type_ids=[row.type_ids for row in encodings],
        )
        encoded.encodings = encodings
        return encoded


def load_saved_tokenizer(checkpoint: CheckpointFiles, *, first_token: bool = False) -> Any:
    """Loads the tokenizer of a saved model, with transformers if tokenizer.json is not enough.

    Args:
      checkpoint: files of the saved model.
      first_token: whether each text must begin with a special token, because exits read it.

    Raises UserError if there is no tokenizer, or it is damaged.

    """
    exported = has_graphs(checkpoint.folder)
    tokenizer = _read_tokenizer(checkpoint, repaired=exported)
    if tokenizer is None and exported:
        raise UserError(f"no tokenizer in {str(checkpoint.folder)!r}: export the model again")
    if tokenizer is None or (first_token and not exported and not tokenizer.begins_texts()):
        tokenizer = load_tokenizer(checkpoint)
        if first_token:
            ensure_first_token(tokenizer, str(checkpoint.folder))
    return tokenizer


def _read_tokenizer(checkpoint: CheckpointFiles, *, repaired: bool) -> SavedTokenizer | None:
    """Returns the tokenizer in tokenizer.json, or None if that file is not enough.

    Args:
      checkpoint: files of the saved model.
      repaired: whether the file already includes the changes of TOKENIZER_REPAIRS.

    Raises UserError if the file is damaged.

    """
    path = checkpoint.folder / "tokenizer.json"
    try:
        config = read_json(checkpoint.folder / "tokenizer_config.json")
        pad = config["pad_token"]
        pad = pad["content"] if isinstance(pad, dict) else pad
    except (OSError, ValueError, KeyError, TypeError):
        return None
    needs_repair = checkpoint.model_type in TOKENIZER_REPAIRS and not repaired
    if not path.exists() or not pad or needs_repair:
        return None
    import tokenizers

    try:
        with discard_native_errors():
            backend = tokenizers.Tokenizer.from_file(str(path))
            backend.encode("a text")  # some damaged files only fail in use
        number = backend.token_to_id(pad)
        side = (backend.truncation or {}).get("direction", "right")
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in the Rust code is not a subclass of Exception
        raise UserError(f"no tokenizer in {str(checkpoint.folder)!r}: {one_line(error)}") from error
    if number is None:
        return None
    check_vocabulary(backend.get_vocab(with_added_tokens=True), checkpoint)
    return SavedTokenizer(backend, number, config.get("truncation_side", side))
