"""The first token of a text, for exits that read it. It holds no arrays."""

import logging
from typing import Any

from sweet_jax.config import UserError

log = logging.getLogger(__name__)


def ensure_first_token(tokenizer: Any, name: str) -> None:
    """Makes a tokenizer put its special tokens around a text, where it puts none, with a warning.

    Args:
      tokenizer: a fast tokenizer of transformers; changed in place.
      name: the checkpoint's, for messages.

    Raises UserError where the tokenizer has no token to put there.

    """
    from tokenizers import processors  # heavy, and not needed for the arithmetic

    encoded = tokenizer("a", return_special_tokens_mask=True)
    if encoded["special_tokens_mask"][:1] == [1]:
        return
    ids = {"cls_token": tokenizer.cls_token_id, "sep_token": tokenizer.sep_token_id}
    absent = [token for token, number in ids.items() if number is None]
    if absent:
        raise UserError(
            f"pooling is 'first', but the tokenizer of {name!r} puts no token before a text and "
            f"has no {' and no '.join(absent)}: set --config.pooling=mean, or name them in "
            "tokenizer_config.json"
        )
    first, last = str(tokenizer.cls_token), str(tokenizer.sep_token)
    # As RoBERTa was pretrained, and as BERT was.
    second = [last, "$B", last] if first == "<s>" else ["$B:1", f"{last}:1"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last],
        pair=[first, "$A", last, *second],
        special_tokens=[(first, ids["cls_token"]), (last, ids["sep_token"])],
    )
    log.warning(
        "the tokenizer of %r has no post-processor: pooling 'first' reads the first token, so %s "
        "is put before each text and %s after it",
        name,
        first,
        last,
    )
