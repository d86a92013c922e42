"""Times predictions of the JAX engine for `overhead`, which runs this file by its path.

    PYTHONPATH=CHECKOUT python experiments/benchmarks/overhead_process.py MODEL TEXTS TOKENS

sweet_jax is that of PYTHONPATH, which may be another checkout than this file's. Prints a JSON list
with, for each text, the milliseconds of the prediction and those spent in the programs.
"""

import argparse
import json
import os
import sys
import time

_WARM_UP = 20  # predictions that compile and fill caches


def measure(model: str, texts: int, tokens: int) -> list[list[float]]:
    """Returns the milliseconds of each prediction, and those of it in the programs."""
    import jax

    from sweet_jax import AdaptiveClassifier
    from sweet_jax.inference.engine_jax import JaxEngine

    inside, original = [0.0], JaxEngine._program

    def timed(engine: JaxEngine, *key):
        program = original(engine, *key)

        def run(*arguments):
            start = time.process_time()
            outputs = program(*arguments)
            jax.block_until_ready(outputs)
            inside[0] += time.process_time() - start
            return outputs

        return run

    # No option of the engine times its programs.
    JaxEngine._program = timed  # type: ignore[assignment, method-assign]
    classifier = AdaptiveClassifier.from_pretrained(model, engine="jax", threshold=2.0)
    text, times = " ".join(["film"] * (tokens - 2)), []
    for _ in range(texts + _WARM_UP):
        inside[0], start = 0.0, time.process_time()
        classifier.predict([text], 1, "latency")
        times.append([1e3 * (time.process_time() - start), 1e3 * inside[0]])
    return times[_WARM_UP:]


def main(argv: list[str] | None = None) -> None:
    """Prints the times. Uses nothing of sweet_jax for this, which may be another checkout's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="model/ folder of a run")
    parser.add_argument("texts", metavar="TEXTS", type=int, help="number of timed predictions")
    parser.add_argument("tokens", metavar="TOKENS", type=int, help="number of tokens of each text")
    options = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # before jax starts its threads
    json.dump(measure(options.model, options.texts, options.tokens), sys.stdout)


if __name__ == "__main__":
    main()
