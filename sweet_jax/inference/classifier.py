"""A saved model that answers texts, each at the first exit that is sure.

Shape letters: E exit, N texts, C classes.
"""

import itertools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.config import UserError, check_choice
from sweet_jax.data.batches import encode
from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.policies import POLICIES, PolicyFunction
from sweet_jax.files import one_line
from sweet_jax.inference.artifact import SavedModel, open_model
from sweet_jax.inference.jax_engine import JaxEngine, batch_sizes, make_stages, row_lengths
from sweet_jax.inference.latency import read_latency
from sweet_jax.inference.predictions import (
    InvalidRow,
    Prediction,
    Predictions,
    Text,
    collect_predictions,
    validate_text,
)
from sweet_jax.inference.scheduler import ExitRule, Request, Scheduler

MODES = ("throughput", "latency")


class AdaptiveClassifier:
    """Answers texts with a saved model; easy ones leave early.

    Answers are those of the one-pass evaluation followed by the dial's threshold: they do not
    depend on the mode, the batch size, or the texts beside (probabilities to 1e-5).

    Args:
      model: what `open_model` read.
      policy: name of an exit policy, or a function of (outputs of the exits so far, temperatures),
        see `UnlabeledOutputs`.
      dial: at most one of threshold, cost, accuracy, risk, agreement, milliseconds; and level.
      programs: compiled ones of the same model, to be shared.

    Attributes:
      classes: names [C], in the order of the probabilities.
      layers: of the exits [E].
      threshold: that the dial stands for.
      full: whether it is infinite: then the last exit alone is computed.

    Raises:
      UserError: an unknown policy, or a dial that is out of range or cannot be kept.

    """

    def __init__(
        self,
        model: SavedModel,
        policy: str | PolicyFunction | None = None,
        dial: Mapping[str, float] = types.MappingProxyType({}),
        programs: JaxEngine | None = None,
    ):
        self.model, self.classes, self.layers = model, model.classes, model.layers
        self.policy = model.about["policy"] if policy is None else policy
        if isinstance(self.policy, str):
            check_choice("policy", self.policy, POLICIES)
            clock = None
            if "milliseconds" in dial and (measured := read_latency(model)) is not None:
                clock = measured.alone(int(model.about["median_tokens"]))
            self.threshold, fitted = model.resolver.threshold(self.policy, **dial, clock=clock)
        elif set(dial) - {"level"} == {"threshold"}:
            self.threshold, fitted = dial["threshold"], model.resolver.calibrator
        else:
            raise UserError("a policy of your own needs threshold=; the other dials know names")
        self._leaving: list[float] = []
        if isinstance(self.policy, str):
            self._leaving = model.resolver.fronts[self.policy].leaving(self.threshold)
        self._rule = ExitRule(self.policy, self.threshold, fitted, model.layers)
        self.full = self.threshold == math.inf
        self._lengths = row_lengths(model.max_length)
        self._programs = programs or JaxEngine(model)
        self._idle: dict[tuple[int, int | None], list[Scheduler]] = {}  # by batch size and wait

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        policy: str | PolicyFunction | None = None,
        threshold: float | None = None,
        cost: float | None = None,
        accuracy: float | None = None,
        risk: float | None = None,
        agreement: float | None = None,
        milliseconds: float | None = None,
        level: float = 0.95,
        dtype: str = "float32",
        cache_dir: str | Path | None = None,
    ) -> "AdaptiveClassifier":
        """Reads a saved model and sets its dial.

        Without a dial, the cheapest threshold that keeps the last exit's score on calibration rows.

        Args:
          name: folder model/ of a run, or the hub id it was pushed to.
          policy: exit policy; default the run's.
          threshold: leave at the first score of at least this; infinity runs the full model alone.
          cost: largest mean share of the full model's layers.
          accuracy: least score on calibration rows, in the run's metric; under PCEE the accuracy
            that calibration rows like a text must have had.
          risk: largest share of texts lost against the last exit, certified.
          agreement: least share of texts answered as the last exit would, certified.
          milliseconds: largest mean time in the stages, tokenising and looking at the scores not
            counted, of a text that comes by itself; once measured on this machine (python -m
            sweet_jax.predict --measure).
          level: confidence of a certificate.
          dtype: of parameters and activations, "float32" or "bfloat16".
          cache_dir: where compiled programs are kept between processes; default
            ~/.cache/sweet_jax/xla. It is JAX's own cache: a directory that JAX was already told
            stays.

        Raises UserError, see `open_model` and `ThresholdResolver.threshold`.

        """
        enable_compilation_cache(cache_dir)
        every = {"threshold": threshold, "cost": cost, "accuracy": accuracy, "risk": risk}
        every |= {"agreement": agreement, "milliseconds": milliseconds, "level": level}
        dial = {k: v for k, v in every.items() if v is not None}
        return cls(open_model(name, dtype), policy, dial)

    def at(self, policy: str | PolicyFunction | None = None, **dial: float) -> "AdaptiveClassifier":
        """The same model with another policy or dial; what is compiled is shared.

        Raises UserError likewise.
        """
        return AdaptiveClassifier(self.model, policy or self.policy, dial, self._programs)

    @property
    def fitted(self) -> Calibrator:
        """What the policy reads: temperatures, and curves."""
        return self._rule.calibrator

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Names of the one or two text columns that it was trained on."""
        return self.model.text_columns

    @property
    def compilations(self) -> int:
        """How many programs have been compiled or read from the cache."""
        return len(self._programs.compiled)

    def warm_up(
        self,
        batch_size: int = 32,
        lengths: Iterable[int] | None = None,
        *,
        full: bool | None = None,
        done: Callable[[], object] = lambda: None,
    ) -> int:
        """Compiles all that `predict` with this batch size can need; returns how many programs.

        Args:
          batch_size: of the calls to come.
          lengths: in tokens, of the texts to come; default all up to the model's longest.
          full: for the last exit alone; default as the dial says.
          done: called after each program.

        """
        wanted = self._lengths if lengths is None else sorted({self._length(n) for n in lengths})
        before, flow = self.compilations, self.flow(batch_size, full=full)
        for key in itertools.product(flow.stages, batch_sizes(batch_size), wanted):
            self._programs.compile(*key, flow.slots)
            done()
        for length in wanted:
            self._programs.new_pool(flow.slots, length)  # compiled too
        return self.compilations - before

    def predict(
        self, texts: Iterable[Text], batch_size: int = 32, mode: str = "throughput"
    ) -> Predictions:
        """The answers to texts, or to pairs of texts as tuples, in their order.

        Args:
          texts: any iterable; `stream` gives the answers of an endless one.
          batch_size: texts computed at once, at most.
          mode: "throughput" or "latency", see `stream`.

        Raises UserError for something that is not a text (or a pair, where the model takes pairs).

        """
        found = list(self.stream(texts, batch_size, mode))
        return collect_predictions(found, len(self.classes))

    def stream(
        self, texts: Iterable[Text], batch_size: int = 32, mode: str = "throughput"
    ) -> Iterator[Prediction]:
        """The answers one by one, in order, as `texts` are read; memory does not grow with them.

        Args:
          texts: any iterable of texts, or of pairs as tuples.
          batch_size: texts computed at once, at most.
          mode: "throughput": texts of like length wait for each other, and those that go on for
            others that do, until a batch is full (or 16 batches more have been read). "latency":
            each batch_size texts are answered before more are read.

        """
        yield from self.stream_rows(texts, batch_size, mode)

    def stream_rows(
        self, texts: Iterable[Text | InvalidRow], batch_size: int = 32, mode: str = "throughput"
    ) -> Iterator[Any]:
        """`stream` of rows of which some have no text: each NoText is given back in its place."""
        check_choice("mode", mode, MODES)
        if isinstance(texts, str):
            raise UserError("texts must be a list of texts, not one text")
        wait = 16 * batch_size if mode == "throughput" else None
        idle = self._idle.setdefault((batch_size, wait), [])
        flow = idle.pop() if idle else self.flow(batch_size, wait)
        ready: dict[int, Request | InvalidRow] = {}
        given = read = 0
        for chunk in _chunks(texts, batch_size):
            for number, none in enumerate(chunk, start=read):
                if isinstance(none, InvalidRow):
                    ready[number] = none
                    flow.pass_by()
            for row in self.encode(chunk, read, alike=mode == "latency"):
                flow.admit(row)
            read += len(chunk)
            left = flow.finish() if mode == "latency" else flow.advance()
            ready |= {row.number: row for row in left}
            while given in ready:
                yield self._given(ready.pop(given))
                given += 1
        ready |= {row.number: row for row in flow.finish()}
        idle.append(flow)
        for number in range(given, read):
            yield self._given(ready.pop(number))

    def _given(self, row: Request | InvalidRow) -> Prediction | InvalidRow:
        return row if isinstance(row, InvalidRow) else self.answer(row)

    def push_to_hub(self, name: str, *, private: bool = False) -> str:
        """Uploads the folder it was read from to the Hugging Face hub; returns its address.

        `name` is "owner/name"; the repository is made if there is none. Raises UserError where the
        hub refuses.
        """
        import huggingface_hub  # heavy, and not needed for local files

        folder = self.model.folder
        try:
            huggingface_hub.create_repo(name, private=private, exist_ok=True)
            return str(huggingface_hub.upload_folder(repo_id=name, folder_path=folder))
        except Exception as error:  # the client raises many kinds; each means the same to a user
            raise UserError(
                f"could not push {str(folder)!r} to {name!r}: {one_line(error)}"
            ) from error

    def flow(
        self, batch_size: int, wait: int | None = None, *, full: bool | None = None
    ) -> Scheduler:
        """Returns a new `Scheduler`. Raises UserError for batch_size below 1.

        `full`: of the last exit alone; default as the dial says.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1; got {batch_size}")
        full = self.full if full is None else full
        stages = make_stages(self.model.networks, full=full, leaving=self._leaving)
        return Scheduler(self._programs, stages, batch_size, wait)

    def encode(
        self, texts: Sequence[Text | InvalidRow], first: int = 0, *, alike: bool = False
    ) -> list[Request]:
        """Texts as rows numbered by place from `first`; `alike` pads all of them to one length.

        NoText has no row.
        """
        pairs = len(self.model.text_columns) == 2
        given = {
            number: validate_text(text, pairs, number)
            for number, text in enumerate(texts, start=first)
            if not isinstance(text, InvalidRow)
        }
        if not given:
            return []
        ids, kinds = encode(self.model.tokenizer, list(given.values()), self.model.max_length)
        longest = max(len(row) for row in ids)
        return [
            Request(number, i, t, self._length(longest if alike else len(i)), self._rule)
            for number, i, t in zip(given, ids, kinds, strict=True)
        ]

    def answer(self, row: Request) -> Prediction:
        """What a row that left says."""
        exits = np.asarray([row.exit])
        (probabilities,) = row.rule.probabilities(row.logits[-1][None], exits)
        label = self.classes[int(probabilities.argmax())]
        # The full model alone does not pay for Multi-Model's shallower ones.
        alone = len(row.logits) == 1 and row.exit > 0
        cost = 1.0 if alone else float(self.model.cost[row.exit])
        return Prediction(label, probabilities, self.layers[row.exit], cost)

    def passed(self, row: Request) -> list[tuple[int, str, float]]:
        """(layer, label, its probability) at every exit that a row came by."""
        first = row.exit + 1 - len(row.logits)  # of the full model alone, the last
        exits = np.arange(first, row.exit + 1)
        every = row.rule.probabilities(np.stack(row.logits), exits)  # [E, C]
        return [
            (self.layers[e], self.classes[int(p.argmax())], float(p.max()))
            for e, p in zip(exits, every, strict=True)
        ]

    def _length(self, tokens: int) -> int:
        return next((n for n in self._lengths if n >= tokens), self._lengths[-1])


def _chunks(texts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk
