"""AdaptiveClassifier: classifies each text at the first confident exit of a saved model.

Shape letters: E exit, N texts, C classes.
"""

import functools
import itertools
import logging
import math
import numbers
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from sweet_jax.errors import UserError, check_choice
from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.policies import PolicyFunction, check_default_policy, policy_name, policy_rule
from sweet_jax.exits.targets import Target, check_targets
from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.encoding import encode_requests
from sweet_jax.inference.engine import (
    Engine,
    load_engine,
    padded_length,
    padded_lengths,
)
from sweet_jax.inference.engine_choice import default_engine
from sweet_jax.inference.engine_table import engine_name
from sweet_jax.inference.hub import upload_model
from sweet_jax.inference.latency import read_latency
from sweet_jax.inference.own_policy import calibrate_policy
from sweet_jax.inference.predictions import (
    InvalidRow,
    Prediction,
    Predictions,
    Text,
    collect_predictions,
    make_prediction,
    rows_of,
)
from sweet_jax.inference.scheduler import ExitRule, Request, Scheduler
from sweet_jax.inference.streaming import stream_in_order
from sweet_jax.inference.target_warnings import target_warning
from sweet_jax.inference.text_tables import TextTable

log = logging.getLogger(__name__)

MODES = ("throughput", "latency")


class AdaptiveClassifier:
    """Classifies texts with a saved model; easy texts exit early.

    Predictions equal those of evaluating all exits and then applying the threshold: they do not
    depend on the mode, the batch size, or the other texts in a batch (probabilities to 1e-5).
    Threads may share a classifier: each call has its own queues. A process that is forked after JAX
    has run a computation hangs: start processes with multiprocessing's "spawn" method, and open the
    model in each.

    Args:
      model: saved model, from `open_model`.
      policy: name of an exit policy; or a function of (outputs, temperatures) that reads the
        outputs of the exits so far; or the name "module:OBJECT" of such a function or of a Policy.
        Targets are resolved for these too, on the run's calibration rows, which are in the folder
        of the run. Defaults to the run's policy.
      target: see `Target`.
      engine: engine with the model's weights; defaults to `default_engine` in float32.

    Attributes:
      classes: names [C] of the classes or labels, in the order of the probabilities.
      layers: layers of the exits [E].
      text_columns: names of the one or two text columns that the model was trained on.
      threshold: the threshold that the target resolved to.
      full: whether the threshold is infinite, so that only the last exit is computed.
      calibrator: temperatures and reliability curves that the policy reads.
      rule: policy, threshold and calibrator, which decide when a text exits.

    Raises:
      UserError: the policy is unknown, or the target is out of range or cannot be met.

    """

    def __init__(
        self,
        model: ModelArtifact,
        policy: str | PolicyFunction | None = None,
        target: Mapping[str, float] = types.MappingProxyType({}),
        engine: Engine | None = None,
    ):
        self.model, self.classes, self.layers = model, model.classes, model.layers
        self._saved = model  # without the operating points of a user's own policy
        self.text_columns = model.text_columns
        self.policy = model.policy if policy is None else policy
        if policy is None:
            check_default_policy(model.policy, f"the model {str(model.folder)!r}")
        policy_rule(self.policy)  # raises for an unknown name, before weights are read
        self.engine = engine or load_engine(default_engine(model), model)
        self._exit_rates: list[float] = []
        self.threshold, self.calibrator = self._resolve(target)
        if front := self.model.resolver.fronts.get(self.policy_name):
            self._exit_rates = front.leaving(self.threshold)
        arguments = (self.threshold, self.calibrator, model.layers, model.objective)
        self.rule = ExitRule(self.policy, *arguments)
        self.full = self.threshold == math.inf
        self._idle: dict[tuple[int, int | None], list[Scheduler]] = {}  # by batch size and wait

    def _resolve(self, target: Mapping[str, float]) -> tuple[float, Calibrator]:
        """Returns the threshold of a target, and the calibrator that it was fitted with."""
        name = self.policy_name
        if ":" in name and name not in self.model.resolver.fronts:
            if "threshold" in target:
                return target["threshold"], self.model.resolver.calibrator
            self.model = calibrate_policy(self.model, self.policy)
        clock = None
        if "milliseconds" in target and (table := read_latency(self.model, self.engine)):
            clock = table.until_exit(self.model.median_tokens)
        return self.model.resolver.threshold(name, **target, clock=clock)

    def __reduce__(self) -> Any:
        raise TypeError(
            "an AdaptiveClassifier holds compiled programs and cannot be pickled or copied: open "
            f"AdaptiveClassifier.from_pretrained({str(self.model.folder)!r}) in each process"
        )

    def __repr__(self) -> str:
        count, outputs = len(self.classes), self.model.objective.outputs
        return (
            f"{type(self).__name__}({str(self.model.folder)!r}, policy={self.policy_name!r}, "
            f"threshold={self.threshold:.3g}, engine={engine_name(self.engine)!r}, "
            f"layers={self.layers}, {count} {outputs})"
        )

    @property
    def policy_name(self) -> str:
        """Returns the policy's name; for a user's own function, "module:function"."""
        return policy_name(self.policy)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        policy: str | PolicyFunction | None = None,
        engine: str | None = None,
        precision: str | None = None,
        dtype: str = "float32",
        cache_dir: str | Path | None = None,
        threads: int | None = None,
        **target: Unpack[Target],
    ) -> "AdaptiveClassifier":
        """Reads a saved model and resolves a target to a threshold.

        Args:
          name: folder model/ of a run, or id of the hub repository it was pushed to.
          policy: see the class.
          engine: name of the engine that runs the model, "jax", "onnxruntime" or that of an
            extension, or "module:OBJECT" (`EngineEntry`); defaults to `default_engine`.
          precision: precision of the layers: "float32" (default), "bfloat16" (engine jax), or
            "int8" (engine onnxruntime, after `sweet-jax quantize`).
          dtype: older name of `precision`; if both are set, `precision` counts.
          cache_dir: directory that keeps compiled programs between processes; defaults to
            ~/.cache/sweet_jax/xla. This is JAX's own compilation cache: if JAX already has a cache
            directory, it is kept.
          threads: number of threads that compute a batch, for an engine with this option, such as
            onnxruntime; defaults to the number of physical cores.
          **target: see `Target`.

        Raises UserError, see `open_model`, `load_engine` and `ThresholdResolver.threshold`. Logs a
        warning if an accuracy or error is out of reach under PCEE, where it can always be set,
        and if no early exit reaches a finite threshold.

        """
        targets = _given(target)
        check_targets(targets)  # before anything is read
        dtype = precision or dtype
        model = open_model(name, dtype)
        engine = engine or default_engine(model, dtype)
        loaded = load_engine(engine, model, dtype, cache_dir, threads)
        classifier = cls(model, policy, targets, loaded)
        if warning := target_warning(classifier.model, classifier.policy, targets):
            log.warning(warning)
        return classifier

    def at(
        self, policy: str | PolicyFunction | None = None, **target: Unpack[Target]
    ) -> "AdaptiveClassifier":
        """Returns a classifier with another policy or target, which shares this one's engine.

        Without a target the default target applies, as in `from_pretrained`, and not the target of
        this classifier: a threshold of one policy means nothing to another. Raises UserError as
        the class does.
        """
        # Two functions may have the same name, for example if one factory made both.
        model = self.model if policy is None else self._saved
        classifier = AdaptiveClassifier(model, policy or self.policy, _given(target), self.engine)
        classifier._saved = self._saved
        return classifier

    def warm_up(
        self,
        batch_size: int = 32,
        lengths: Iterable[int] | None = None,
        *,
        full: bool | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> int:
        """Compiles all programs that `predict` may need at this batch size.

        Args:
          batch_size: batch size of later calls of `predict`.
          lengths: lengths of later texts, in tokens; defaults to all lengths up to the model's
            maximum.
          full: whether to compile only for the last exit; by default, only if the threshold is
            infinite.
          progress: function that takes a list and yields its items while it displays progress, as
            `tqdm.tqdm` does.

        Returns:
          The number of programs compiled.

        """
        longest = self.model.max_length
        padded = padded_lengths(longest)
        if lengths is not None:
            padded = tuple(sorted({padded_length(n, longest) for n in lengths}))
        before, scheduler = self.engine.compilations, self.make_scheduler(batch_size, full=full)
        for stage, length in progress(list(itertools.product(scheduler.stages, padded))):
            self.engine.compile(stage, batch_size, length, scheduler.slots)
        for length in padded:
            self.engine.new_states(scheduler.slots, length)  # JAX compiles this too
        return self.engine.compilations - before

    def predict(
        self, texts: Iterable[Text] | TextTable, batch_size: int = 32, mode: str = "throughput"
    ) -> Predictions:
        """Returns the predictions of texts, or of pairs of texts as tuples, in their order.

        A blank text is classified like any other; `sweet-jax predict` reports it as an error.

        Args:
          texts: any finite iterable, or a table with the model's text columns: a pandas DataFrame,
            a `datasets.Dataset` or a PyArrow table. For an endless iterable, use `stream`.
          batch_size: maximum number of texts computed at once. Memory is reserved for this many
            texts at each exit, even if there are fewer.
          mode: "throughput" or "latency", see `stream`.

        Raises UserError if `texts` is a dict or a single string, for an item that is not a text (or
        not a pair, if the model takes pairs), and for a batch_size that is not a positive integer.

        """
        predictions = list(self.stream(texts, batch_size, mode))
        return collect_predictions(predictions, self.model)

    def stream(
        self, texts: Iterable[Text] | TextTable, batch_size: int = 32, mode: str = "throughput"
    ) -> Iterator[Prediction]:
        """Yields predictions in order while `texts` is read; memory use does not grow with it.

        Args:
          texts: any iterable of texts, or a table as in `predict`.
          batch_size: maximum number of texts computed at once. Memory is reserved for this many
            texts at each exit, even if there are fewer.
          mode: with "throughput", texts of similar length wait for each other at each stage until
            a batch is full (or until 16 more batches of texts have been read). With "latency", each
            batch_size texts are classified before more are read.

        """
        yield from cast("Iterator[Prediction]", self.stream_rows(texts, batch_size, mode))

    def stream_rows(
        self,
        texts: Iterable[Text | InvalidRow] | TextTable,
        batch_size: int = 32,
        mode: str = "throughput",
    ) -> Iterator[Prediction | InvalidRow]:
        """Yields what `stream` does; an InvalidRow among the texts is yielded in its place."""
        check_choice("mode", mode, MODES)
        _check_batch_size(batch_size)
        texts = rows_of(texts, self.model.text_columns)
        latency = mode == "latency"
        wait = None if latency else 16 * batch_size
        idle = self._idle.setdefault((batch_size, wait), [])
        scheduler = idle.pop() if idle else self.make_scheduler(batch_size, wait)
        encode = functools.partial(self.encode, same_length=latency)
        for item in stream_in_order(scheduler, texts, encode, drain=latency):
            yield item if isinstance(item, InvalidRow) else make_prediction(self.model, item)
        idle.append(scheduler)

    def push_to_hub(self, name: str, *, private: bool = False) -> str:
        """Uploads the folder of the model to the Hugging Face hub; returns its URL.

        Args:
          name: repository, as "owner/name"; it is created if it does not exist.
          private: whether a repository that is created is private.

        Raises UserError if the upload fails.

        """
        return upload_model(self.model.folder, name, private=private)

    def make_scheduler(
        self, batch_size: int, wait: int | None = None, *, full: bool | None = None
    ) -> Scheduler:
        """Returns a new `Scheduler`.

        Args:
          batch_size: maximum number of texts computed at once.
          wait: see `Scheduler`.
          full: whether to compute only the last exit; by default, only if the threshold is
            infinite.

        Raises UserError for a batch_size that is not a positive integer.

        """
        _check_batch_size(batch_size)
        full = self.full if full is None else full
        stages = self.engine.stages(full=full, exit_rates=self._exit_rates)
        return Scheduler(self.engine, stages, batch_size, wait)

    def encode(
        self,
        texts: Sequence[Text | InvalidRow],
        first: int = 0,
        *,
        same_length: bool = False,
        truncation: str | None = None,
    ) -> list[Request]:
        """Returns the requests of texts, see `encode_requests`."""
        return encode_requests(
            self.model, texts, self.rule, first, same_length=same_length, truncation=truncation
        )


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, numbers.Integral) or isinstance(batch_size, bool):
        raise UserError(f"batch_size must be an integer; got {batch_size!r}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {batch_size}")


def _given(target: Target) -> dict[str, Any]:
    return {name: value for name, value in target.items() if value is not None}
