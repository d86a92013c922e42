"""The steps of a checkpoint's tokenizer.json, which take precedence over its class's own.

transformers 5 builds the tokenizer of a named class from the vocabulary in tokenizer.json alone.
The normalizer, the pre-tokenizer, the post-processor, and the model are then the defaults of the
class, whatever the file says. transformers 4 reads them from the file, and so does this module.
"""

from pathlib import Path
from typing import Any

_STEPS = ("normalizer", "pre_tokenizer", "model", "post_processor")

# By step: the kind whose options the class and tokenizer_config.json set, whatever tokenizer.json
# says, as in transformers 4.
_OPTIONS = {
    "normalizer": ("BertNormalizer", ("lowercase", "strip_accents", "handle_chinese_chars")),
    "pre_tokenizer": ("ByteLevel", ("add_prefix_space",)),
}


def with_steps_of_file(tokenizer: Any, folder: Path) -> Any:
    """Returns a tokenizer that has the steps of the folder's tokenizer.json.

    Returns the given tokenizer if there is no such file, if it has these steps already, or if it is
    not a fast tokenizer.

    Args:
      tokenizer: the tokenizer that transformers' AutoTokenizer loads from the folder.
      folder: directory of the checkpoint.

    """
    import tokenizers  # heavy, and not needed for the arithmetic
    import transformers

    path = folder / "tokenizer.json"
    if not path.exists() or not tokenizer.is_fast:
        return tokenizer
    own = tokenizers.Tokenizer.from_file(str(path))
    _set_class_options(own, tokenizer.backend_tokenizer)
    if all(_state(own, step) == _state(tokenizer.backend_tokenizer, step) for step in _STEPS):
        return tokenizer
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    _set_class_options(plain.backend_tokenizer, tokenizer.backend_tokenizer)
    named = {key: tokenizer.special_tokens_map.get(key) for key in plain.SPECIAL_TOKENS_ATTRIBUTES}
    plain.add_special_tokens(
        {key: token for key, token in named.items() if token and getattr(plain, key) is None}
    )
    return plain


def _set_class_options(own: Any, built: Any) -> None:
    """Sets the options in _OPTIONS of one `tokenizers.Tokenizer`, `own`, to those of `built`."""
    for step, (kind, options) in _OPTIONS.items():
        target, source = getattr(own, step), getattr(built, step)
        if type(target).__name__ == type(source).__name__ == kind:
            for option in options:
                setattr(target, option, getattr(source, option))


def _state(backend: Any, step: str) -> bytes | None:
    part = getattr(backend, step)
    return None if part is None else part.__getstate__()
