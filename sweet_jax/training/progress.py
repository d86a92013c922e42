"""Where the progress bars of training are shown."""

import os

from sweet_jax.distributed import is_primary


def bar_disabled() -> bool | None:
    """Returns the argument `disable` of the progress bars of a training, for tqdm.

    Only the primary process shows them, and only on a terminal, since a file would keep every step
    of a bar; tqdm's environment variable TQDM_DISABLE overrides the latter: with 0 they are shown
    anywhere, with 1 nowhere.
    """
    if not is_primary():
        return True
    chosen = os.environ.get("TQDM_DISABLE")
    return None if chosen is None else chosen not in ("", "0")  # None: on a terminal
