"""The special token before a text, for exits that read the first token."""

import logging
from typing import Any

from sweet_jax.errors import UserError

log = logging.getLogger(__name__)


def ensure_first_token(tokenizer: Any, name: str) -> None:
    """Makes a tokenizer add special tokens around a text, and warns, if it adds none before it.

    Args:
      tokenizer: fast tokenizer of transformers, changed in place.
      name: name of the checkpoint, for messages.

    Raises:
      UserError: if the tokenizer has no such tokens.

    """
    from tokenizers import processors  # slow to import, and not needed for the arithmetic

    encoded = tokenizer("a", return_special_tokens_mask=True)
    if encoded["special_tokens_mask"][:1] == [1]:
        return
    ids = {"cls_token": tokenizer.cls_token_id, "sep_token": tokenizer.sep_token_id}
    absent = [token for token, number in ids.items() if number is None]
    if absent:
        raise UserError(
            f"the pooling reads the first token, but the tokenizer of {name!r} adds none before a "
            f"text and has no {' and no '.join(absent)}: set --config.pooling=mean, or add the "
            "tokens to tokenizer_config.json"
        )
    first, last = str(tokenizer.cls_token), str(tokenizer.sep_token)
    # As in the pretraining of RoBERTa and of BERT, respectively.
    second = [last, "$B", last] if first == "<s>" else ["$B:1", f"{last}:1"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last],
        pair=[first, "$A", last, *second],
        special_tokens=[(first, ids["cls_token"]), (last, ids["sep_token"])],
    )
    log.warning(
        "the tokenizer of %r adds no special token before a text, but the pooling reads the first "
        "token: %s is added before each text and %s after it",
        name,
        first,
        last,
    )
