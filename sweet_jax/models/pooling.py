"""The functions of the poolings in `poolings.POOLINGS`, which describes their arguments.

Shape letters: B batch, L length, H hidden, P width of a pooled vector.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from sweet_jax.errors import UnknownNameError, UserError, one_line
from sweet_jax.files import read_json
from sweet_jax.models.checkpoint_folder import first_module
from sweet_jax.poolings import POOLINGS

SHARPNESS = 20.0  # factor of the cosines whose softmax aligns the tokens of two texts


def first_token(h: jax.Array, mask: jax.Array, second: jax.Array | None) -> jax.Array:
    """Returns the hidden state of the first token [B, H], given h [B, L or 1, H]."""
    return h[:, 0]


def mean_of_tokens(h: jax.Array, mask: jax.Array, second: jax.Array | None = None) -> jax.Array:
    """Returns the mean of h [B, L, H] over the tokens where mask [B, L] is True, [B, H].

    The mean includes special tokens, as in sentence-transformers, and is computed in float32. It is
    zero for a row without tokens.
    """
    masked = jnp.where(mask[..., None], h, 0).astype(jnp.float32)  # [B, L, H]
    count = jnp.maximum(mask.sum(axis=1), 1)[:, None]  # [B, 1]
    return (masked.sum(axis=1) / count).astype(h.dtype)


def means_of_pair(h: jax.Array, mask: jax.Array, second: jax.Array | None) -> jax.Array:
    """Returns (u, v, |u - v|, u v) for the means u and v of a pair's two texts, [B, 4 H].

    Special tokens count with the text before them. These are the matching features of Conneau et
    al. 2017 (InferSent, arXiv 1705.02364, section 3.1). There, the two texts are encoded
    separately; here, each attends to the other. With a single mean of all tokens, a linear
    classifier could not compare the texts.

    Raises ValueError if `second` is None.
    """
    if second is None:
        raise ValueError("a pair needs second_start, the position where its second text begins")
    u = mean_of_tokens(h, mask & ~second)  # [B, H]
    v = mean_of_tokens(h, mask & second)  # [B, H]
    return jnp.concatenate([u, v, jnp.abs(u - v), u * v], axis=-1)  # [B, 4 H]


def aligned_pair(h: jax.Array, mask: jax.Array, second: jax.Array | None) -> jax.Array:
    """Returns (u, v, |u - v|, u v, d_u, d_v) for a pair's two texts, [B, 6 H].

    The first four are those of `means_of_pair`. d_u is the mean over the first text's tokens x of
    |x - a(x)|, where a(x) is the mean of the second text's tokens y with weights
    softmax(SHARPNESS cos(x, y)): the part of the second text that x is aligned to. d_v is the same
    from the second text to the first. Thus d_u and d_v are small if each token has a counterpart in
    the other text, which cannot be seen from u and v. A token has the counterpart 0 if the other
    text has no tokens.

    Soft alignment is from Parikh et al. 2016 (arXiv 1606.01933, section 3.1) and Chen et al. 2017
    (ESIM, arXiv 1609.06038, section 3.2), which train a similarity of word embeddings. The cosine
    of an encoder's states needs no training.

    Raises ValueError if `second` is None.
    """
    means = means_of_pair(h, mask, second)  # [B, 4 H]
    assert second is not None, "means_of_pair raises"
    x = jnp.where(mask[..., None], h, 0).astype(jnp.float32)  # [B, L, H]
    unit = x / jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)  # [B, L, H]
    cosine = jnp.einsum("bih,bjh->bij", unit, unit)  # [B, L, L]
    other = mask[:, None, :] & (second[:, :, None] != second[:, None, :])  # [B, L, L]
    weights = jax.nn.softmax(jnp.where(other, SHARPNESS * cosine, -1e9))  # [B, L, L]
    aligned = jnp.einsum("bij,bjh->bih", jnp.where(other, weights, 0), x)  # [B, L, H]
    distances = jnp.abs(x - aligned)  # [B, L, H]
    sides = (mask & ~second, mask & second)
    own = [mean_of_tokens(distances, side).astype(h.dtype) for side in sides]  # [B, H] each
    return jnp.concatenate([means, *own], axis=-1)  # [B, 6 H]


def check_pooling(name: str, hidden: int) -> None:
    """Checks a pooling on the shapes of two rows with H = `hidden`, without computing it.

    Raises UserError unless the pooling exists and returns [B, P] with the width that it declares.
    """
    pooling = POOLINGS[name]
    mask = jax.ShapeDtypeStruct((2, 8), bool)  # [B, L]
    h = jax.ShapeDtypeStruct((2, 1 if pooling.first_only else 8, hidden), jnp.float32)
    try:
        found = jax.eval_shape(pooling, h, mask, mask if pooling.pairs else None)
    except UnknownNameError:
        raise
    except Exception as error:  # a function of the user's own can raise anything
        raise UserError(
            f"pooling {name!r} failed on h {list(h.shape)} and mask {list(mask.shape)}: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    wanted, shape = (2, pooling.width * hidden), getattr(found, "shape", None)
    if shape != wanted:
        raise UserError(
            f"pooling {name!r} must return an array of shape {list(wanted)} for h "
            f"{list(h.shape)}, [B, width H]; got {shape and list(shape)}"
        )


_DECLARED = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}


def declared_pooling(folder: Path) -> str | None:
    """Returns the pooling that a checkpoint's sentence-transformers files declare.

    These files are in the folder, or in its parent if the folder is the parent's first module.
    Returns None if there are no such files, or if they declare a pooling that is not in POOLINGS.
    Raises UserError if they cannot be read.
    """
    around = folder.parent
    if not (folder / "modules.json").exists() and around / first_module(around) == folder:
        folder = around
    modules = folder / "modules.json"
    if not modules.exists():
        return None
    path = modules
    try:
        for module in read_json(modules):
            if str(module.get("type") or module["path"]).endswith("Pooling"):
                path = folder / module["path"] / "config.json"
                values = read_json(path)
                mode = values.get("pooling_mode")
                mode = "+".join(map(str, mode)) if isinstance(mode, list) else mode  # of several
                named = {"cls": "first", "mean": "mean"}.get(mode)
                declared = [name for key, name in _DECLARED.items() if values.get(key) is True]
                others = [k for k, v in values.items() if k.startswith("pooling_mode_") and v]
                return named or (declared[0] if len(declared) == len(others) == 1 else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error!r}): repair it, or remove modules.json and set "
            "--config.pooling"
        ) from error
    return None
