"""Compiles the programs of a classifier in advance, with a progress bar."""

import functools
import sys
import time

from tqdm import tqdm

from sweet_jax.inference.classifier import AdaptiveClassifier


def warm_up(classifier: AdaptiveClassifier, batch_size: int, *, full: bool | None = None) -> None:
    """Compiles all programs that batches may need, and prints to stderr how long it took.

    See `AdaptiveClassifier.warm_up`.
    """
    began = time.perf_counter()
    bar = functools.partial(tqdm, desc="compiling", unit=" stages x lengths", disable=None)
    count = classifier.warm_up(batch_size, full=full, progress=bar)
    seconds = time.perf_counter() - began
    done = f"compiled {count} programs in {seconds:.0f} s" if count else "nothing to compile"
    print(done, file=sys.stderr, flush=True)
