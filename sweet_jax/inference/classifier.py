"""AdaptiveClassifier: a saved model that classifies each text at the first exit that is confident.

Shape letters: E exit, N texts, C classes.
"""

import functools
import itertools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from sweet_jax.config import UserError, check_choice
from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.policies import PolicyFunction, policy_name, policy_rule
from sweet_jax.exits.targets import Target, check_targets
from sweet_jax.inference import artifact
from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.encoding import encode_requests
from sweet_jax.inference.engine import (
    Engine,
    load_engine,
    padded_length,
    padded_lengths,
)
from sweet_jax.inference.engine_choice import default_engine
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

MODES = ("throughput", "latency")


class AdaptiveClassifier:
    """Classifies texts with a saved model; easy ones exit early.

    Predictions are those of the one-pass evaluation followed by the threshold: they do not depend
    on the mode, the batch size, or the texts beside (probabilities to 1e-5). Threads may share one:
    each call has queues of its own. A process that is forked after JAX has computed would hang:
    start processes by multiprocessing's "spawn", and read the model in each.

    Args:
      model: from `open_model`.
      policy: name of an exit policy; or a function of (outputs, temperatures), of the outputs of
        the exits so far, or its name "module:function": any target is resolved for it too, by the
        run's calibration rows beside the model. Default the run's.
      target: see `Target`.
      engine: with the model's weights; default `default_engine` in float32.

    Attributes:
      classes: names [C] of the classes or labels, in the order of the probabilities.
      layers: of the exits [E].
      text_columns: names of the one or two text columns that it was trained on.
      threshold: that the target stands for.
      full: whether it is infinite: then the last exit alone is computed.
      calibrator: the temperatures and reliability curves that the policy reads.
      rule: by which a text leaves: policy, threshold and calibrator.

    Raises:
      UserError: an unknown policy, or a target that is out of range or infeasible.

    """

    def __init__(
        self,
        model: ModelArtifact,
        policy: str | PolicyFunction | None = None,
        target: Mapping[str, float] = types.MappingProxyType({}),
        engine: Engine | None = None,
    ):
        self.model, self.classes, self.layers = model, model.classes, model.layers
        self._saved = model  # before operating points of a policy of the user's own were added
        self.text_columns = model.text_columns
        self.policy = model.policy if policy is None else policy
        policy_rule(self.policy)  # an unknown name is an error before weights are read
        self.engine = engine or load_engine(default_engine(model), model)
        self._exit_rates: list[float] = []
        self.threshold, self.calibrator = self._resolve(target)
        if front := self.model.resolver.fronts.get(self.policy_name):
            self._exit_rates = front.leaving(self.threshold)
        about = (self.threshold, self.calibrator, model.layers, model.objective)
        self.rule = ExitRule(self.policy, *about)
        self.full = self.threshold == math.inf
        self._idle: dict[tuple[int, int | None], list[Scheduler]] = {}  # by batch size and wait

    def _resolve(self, target: Mapping[str, float]) -> tuple[float, Calibrator]:
        """Returns the threshold that a target stands for, and the calibrator it was fitted with."""
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

    @property
    def policy_name(self) -> str:
        """Returns the policy's name; of a function of the user's own "module:function"."""
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
          name: folder model/ of a run, or the hub id it was pushed to.
          policy: see the class.
          engine: what runs the model, one of ENGINES; default `default_engine`.
          precision: of the layers: "float32" (default); "bfloat16" with engine jax; "int8" with
            onnxruntime, after `sweet-jax quantize`.
          dtype: the older name of `precision`.
          cache_dir: where compiled programs are kept between processes; default
            ~/.cache/sweet_jax/xla. It is JAX's own cache: a directory that JAX was configured with
            before stays.
          threads: that compute a batch, of the onnxruntime engine; default all physical cores.
          **target: see `Target`.

        Raises UserError, see `open_model`, `load_engine` and `ThresholdResolver.threshold`.

        """
        given = _given(target)
        check_targets(given)  # before anything is read
        dtype = precision or dtype
        model = open_model(name, dtype)
        engine = engine or default_engine(model, dtype)
        return cls(model, policy, given, load_engine(engine, model, dtype, cache_dir, threads))

    def at(
        self, policy: str | PolicyFunction | None = None, **target: Unpack[Target]
    ) -> "AdaptiveClassifier":
        """Returns the same model with another policy or target; the engine is shared.

        Without a target the default one applies, as in `from_pretrained`, and not the target of
        this classifier: a threshold of one policy means nothing to another. Raises UserError
        likewise.
        """
        # Another function may have the same name, as those of one factory do.
        model = self.model if policy is None else self._saved
        found = AdaptiveClassifier(model, policy or self.policy, _given(target), self.engine)
        found._saved = self._saved
        return found

    def warm_up(
        self,
        batch_size: int = 32,
        lengths: Iterable[int] | None = None,
        *,
        full: bool | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> int:
        """Compiles all that `predict` with this batch size can need; returns how many programs.

        Args:
          batch_size: of the calls to come.
          lengths: in tokens, of the texts to come; default all up to the model's longest.
          full: whether for the last exit alone; default: for an infinite threshold.
          progress: shows how far it is: given a list, yields its items, as `tqdm.tqdm` does.

        """
        longest = self.model.max_length
        padded = padded_lengths(longest)
        if lengths is not None:
            padded = tuple(sorted({padded_length(n, longest) for n in lengths}))
        before, scheduler = self.engine.compilations, self.make_scheduler(batch_size, full=full)
        for stage, length in progress(list(itertools.product(scheduler.stages, padded))):
            self.engine.compile(stage, batch_size, length, scheduler.slots)
        for length in padded:
            self.engine.new_states(scheduler.slots, length)  # compiled too
        return self.engine.compilations - before

    def predict(
        self, texts: Iterable[Text], batch_size: int = 32, mode: str = "throughput"
    ) -> Predictions:
        """Returns the predictions of texts, or of pairs of texts as tuples, in their order.

        Args:
          texts: any iterable, or a table with the model's text columns: a pandas DataFrame, a
            `datasets.Dataset`, a PyArrow table; for an endless one there is `stream`.
          batch_size: texts computed at once, at most.
          mode: "throughput" or "latency", see `stream`.

        Raises UserError for something that is not a text (or a pair, where the model takes pairs),
        such as a dict or one text by itself.

        """
        predictions = list(self.stream(texts, batch_size, mode))
        return collect_predictions(predictions, self.model)

    def stream(
        self, texts: Iterable[Text], batch_size: int = 32, mode: str = "throughput"
    ) -> Iterator[Prediction]:
        """Yields the predictions in order, as `texts` are read; memory does not grow with them.

        Args:
          texts: any iterable.
          batch_size: texts computed at once, at most.
          mode: "throughput": texts of similar length wait for each other, and those that continue
            for others that do, until a batch is full (or 16 batches more have been read).
            "latency": each batch_size texts are classified before more are read.

        """
        yield from cast("Iterator[Prediction]", self.stream_rows(texts, batch_size, mode))

    def stream_rows(
        self, texts: Iterable[Text | InvalidRow], batch_size: int = 32, mode: str = "throughput"
    ) -> Iterator[Prediction | InvalidRow]:
        """Yields as `stream` does; an InvalidRow among the texts is yielded in its place."""
        check_choice("mode", mode, MODES)
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
        """Uploads the folder it was read from to the Hugging Face hub; returns its address.

        `name` is "owner/name"; the repository is made if there is none. Raises UserError where the
        hub refuses.
        """
        return artifact.push_to_hub(self.model.folder, name, private=private)

    def make_scheduler(
        self, batch_size: int, wait: int | None = None, *, full: bool | None = None
    ) -> Scheduler:
        """Returns a new `Scheduler`. Raises UserError for a batch_size below 1.

        `full` is whether for the last exit alone; default: for an infinite threshold.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1; got {batch_size}")
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


def _given(target: Target) -> dict[str, Any]:
    return {name: value for name, value in target.items() if value is not None}
