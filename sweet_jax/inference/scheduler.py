"""Continuous batching: as requests exit, each stage's batches are filled with other requests.

The scheduler has an engine (`engine.py`) run each stage on a batch. It tracks the state of every
request: its queue, its slot in the hidden states, and the outputs of the exits so far.

Shape letters: E exit, B batch, L length, C classes, N requests, P slots.
"""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.policies import PolicyFunction, UnlabeledOutputs, exit_confidences
from sweet_jax.inference.engine import (
    PLAIN_POLICIES,
    Engine,
    HiddenStates,
    Stage,
    StageBatch,
)
from sweet_jax.inference.plain_confidences import plain_complement
from sweet_jax.objectives import SINGLE_LABEL, Objective


@dataclasses.dataclass(frozen=True, eq=False)
class ExitRule:
    """Decides which rows exit: those whose exit confidence reaches the threshold."""

    policy: str | PolicyFunction  # a name, or a function of (`UnlabeledOutputs`, temperatures)
    threshold: float
    calibrator: Calibrator  # calibrator of all exits
    layers: tuple[int, ...]  # layers of all exits [E]
    objective: Objective = SINGLE_LABEL  # objective of the model

    @functools.cached_property
    def plain(self) -> int | None:
        """Returns the index of the policy in PLAIN_POLICIES, or None for other policies.

        It is None for other outputs too: engines compute plain policies of one class per row only.
        """
        if self.objective.categorical is not SINGLE_LABEL.categorical:
            return None
        named = isinstance(self.policy, str) and self.policy in PLAIN_POLICIES
        return PLAIN_POLICIES.index(self.policy) if named else None

    @functools.cached_property
    def temperatures(self) -> list[float]:
        """Returns the temperatures of all exits [E]."""
        return self.calibrator.temperatures.tolist()

    def leaves(self, rows: Sequence["Request"]) -> np.ndarray:
        """Returns whether each of some rows exits, bool [N]; all have reached the same exit.

        This is computed from the logits, whatever the policy.
        """
        count = len(rows[0].logits)
        first = 0 if self.plain is None else count - 1  # a plain policy reads only this exit
        logits = np.stack([row.logits[first:] for row in rows], axis=1)[None]  # [1, E', N, C]
        learned = None
        if rows[0].exit_scores:
            scores = [row.exit_scores[first:] for row in rows]
            learned = np.asarray(scores, np.float32).T[None]  # [1, E', N]
        layers = np.asarray(self.layers[first:count])
        outputs = UnlabeledOutputs(logits, layers, learned, self.objective)
        if self.plain is None:
            calibrators = [self.calibrator.first_exits(count)]
        else:
            calibrators = [Calibrator(self.calibrator.temperatures[first:count])]
        return exit_confidences(outputs, self.policy, calibrators)[0, -1] >= self.threshold

    def probabilities(self, logits: np.ndarray, exits: Sequence[int]) -> np.ndarray:
        """Computes the objective's probabilities with the temperature of each row's exit.

        Args:
          logits: logits [N, C].
          exits: index of each row's exit [N].

        Returns:
          Probabilities float64 [N, C], or [N, 0] for an objective without probabilities.

        """
        fitted = [self.temperatures[exit] for exit in exits]  # [N], NaN where an exit diverged
        scales = np.asarray([t if math.isfinite(t) else 1.0 for t in fitted])[:, None]
        with np.errstate(invalid="ignore"):  # logits that diverged give NaN
            return self.objective.probabilities(logits.astype(np.float64) / scales)


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """Holds one text to classify, from its token ids to the exit that it takes."""

    number: int  # its position in the input
    input_ids: np.ndarray  # int32 [tokens]
    token_type_ids: np.ndarray  # int32 [tokens]
    length: int  # L, the length that it is padded to
    rule: ExitRule  # decides when it exits
    second_start: int | None = None  # index of the token where a pair's second text begins
    queued_at: int = 0  # number of requests that had been admitted when it joined its queue
    slot: int = -1  # slot of its hidden states; -1 if it has none
    exit: int = -1  # index of the exit it took; -1 before that
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)  # [C] of every exit so far
    # Learning-to-exit scores of every exit so far; empty for other methods.
    exit_scores: list[float] = dataclasses.field(default_factory=list)


class Scheduler:
    """Runs batches from queues of requests, one queue for each stage and length.

    Args:
      engine: engine that runs the stages.
      stages: stages that requests go through, from `Engine.stages`.
      batch_size: maximum B.
      wait: maximum number of requests admitted while one waits in a queue; after that, its queue
        runs even if it is not full. None for no limit.

    Attributes:
      runs: number of batches that each stage has run.

    """

    def __init__(
        self, engine: Engine, stages: Sequence[Stage], batch_size: int, wait: int | None = None
    ):
        self.engine, self.stages = engine, stages
        self.batch_size, self.wait = batch_size, wait
        self.runs = [0] * len(stages)
        # By (stage, length); empty queues are removed.
        self._queues: dict[tuple[int, int], deque[Request]] = {}
        self._states: dict[int, HiddenStates] = {}  # by length
        self._free: dict[int, list[int]] = {}  # slots by length
        self._admitted = 0

    @property
    def slots(self) -> int:
        """Returns P: one batch per stage, which is enough since deeper full queues run first."""
        return self.batch_size * len(self.stages)

    def __len__(self) -> int:
        """Returns the number of admitted requests that have not exited."""
        return sum(map(len, self._queues.values()))

    def admit(self, request: Request) -> None:
        """Queues a request at the first stage; nothing is computed yet."""
        self._admitted += 1
        self._enqueue(0, request)

    def count_skipped(self) -> None:
        """Counts an input without a valid text toward the `wait` of queued requests."""
        self._admitted += 1

    def run_ready(self) -> list[Request]:
        """Runs all queues that are full or overdue; returns the requests that exited."""
        exited: list[Request] = []
        while ready := [key for key in self._queues if self._full(key) or self._overdue(key)]:
            exited += self._run(*max(ready))  # the deepest, which frees slots
        return exited

    def step(self) -> list[Request]:
        """Runs one batch, from a full queue or else from the one that has waited longest.

        Callers use this when they would otherwise be idle. An overdue request runs before full
        batches of other lengths. Returns the requests that exited.
        """
        if not self._queues:
            return []
        oldest = min(self._queues, key=lambda key: self._queues[key][0].queued_at)
        full = [key for key in self._queues if self._full(key)]
        if self._overdue(oldest):
            # Full queues of that length run first if they are deeper, since they hold its slots.
            return self._run(*max([key for key in full if key[1] == oldest[1]] + [oldest]))
        return self._run(*(max(full) if full else oldest))

    def drain(self) -> list[Request]:
        """Runs every request to its exit; returns them."""
        exited = self.run_ready()
        while self._queues:
            # The shallowest, whose requests that continue fill the next stage's batch.
            exited += self._run(*min(self._queues))
            exited += self.run_ready()
        return exited

    def _enqueue(self, stage: int, request: Request) -> None:
        request.queued_at = self._admitted
        self._queues.setdefault((stage, request.length), deque()).append(request)

    def _full(self, key: tuple[int, int]) -> bool:
        return len(self._queues[key]) >= self.batch_size

    def _overdue(self, key: tuple[int, int]) -> bool:
        if self.wait is None:
            return False
        return self._admitted - self._queues[key][0].queued_at > self.wait

    def _run(self, number: int, length: int) -> list[Request]:
        """Runs one batch of a queue; returns the requests that exited and queues the others."""
        stage, requests = self.stages[number], self._take(number, length)
        self.runs[number] += 1
        free = self._free.setdefault(length, list(range(self.slots)))
        if stage.embeds and stage.writes_states:
            for request in requests:
                request.slot = free.pop()
        complements = self._compute(stage, requests, length)
        last = number + 1 == len(self.stages)
        exits = [True] * len(requests) if last else _leaves(requests, stage.exit, complements)
        exited = []
        for request, done in zip(requests, exits, strict=True):
            if done:
                request.exit = stage.exit
                exited.append(request)
            else:
                self._enqueue(number + 1, request)
            if request.slot >= 0 and (done or not stage.writes_states):
                free.append(request.slot)
                request.slot = -1
        return exited

    def _take(self, number: int, length: int) -> list[Request]:
        """Removes the requests of the next batch from a queue, and returns them."""
        queue = self._queues[number, length]
        if len(queue) <= self.batch_size:
            return list(self._queues.pop((number, length)))
        return [queue.popleft() for _ in range(self.batch_size)]

    def _compute(self, stage: Stage, requests: list[Request], length: int) -> np.ndarray | None:
        """Runs a stage and appends its outputs to each request; returns the complements."""
        batch = self._batch(stage, requests, length)
        states = None
        if stage.uses_states:
            # Removed first: if the run is interrupted, a consumed buffer must not stay here.
            states = self._states.pop(length, None)
            states = self.engine.new_states(self.slots, length) if states is None else states
        output = self.engine.run(stage, batch, states)
        if output.states is not None:
            self._states[length] = output.states
        for row, request in enumerate(requests):
            request.logits.append(output.logits[row])
            if output.exit_scores is not None:
                request.exit_scores.append(float(output.exit_scores[row]))
        return output.complements

    def _batch(self, stage: Stage, requests: list[Request], length: int) -> StageBatch:
        slots = [r.slot if r.slot >= 0 else self.slots for r in requests]
        rows = np.asarray([slots, [len(r.input_ids) for r in requests]], np.int32)  # [2, B]
        fitted = np.asarray([r.rule.temperatures[stage.exit] for r in requests], np.float32)  # [B]
        texts = None
        if stage.embeds:
            texts = np.zeros((2, len(requests), length), np.int32)
            texts[0] = self.engine.pad_id
            for row, request in enumerate(requests):
                texts[0, row, : len(request.input_ids)] = request.input_ids
                texts[1, row, : len(request.input_ids)] = request.token_type_ids
        starts = None
        if requests[0].second_start is not None:  # all requests of a model are pairs, or none are
            starts = np.asarray([r.second_start for r in requests], np.int32)  # [B]
        return StageBatch(
            length,
            rows,
            texts,
            temperatures=fitted,
            largest=self.batch_size,
            second_starts=starts,
        )


def _leaves(rows: Sequence[Request], exit: int, complements: np.ndarray | None) -> list[bool]:
    """Returns whether each row exits by its own rule [N].

    Args:
      rows: the requests of one batch.
      exit: index of the exit that they have reached.
      complements: complements of their confidences, see `StageOutput`.

    """
    exiting = [False] * len(rows)
    for rule in {id(row.rule): row.rule for row in rows}.values():
        indices = [index for index, row in enumerate(rows) if row.rule is rule]
        if rule.plain is None:
            leaves = rule.leaves([rows[index] for index in indices]).tolist()
        else:
            # Python floats, which are float64, are faster than NumPy for few rows.
            if complements is None:
                policy, fitted = PLAIN_POLICIES[rule.plain], rule.temperatures[exit]
                logits = [rows[index].logits[-1].tolist() for index in indices]
                values = [plain_complement(policy, each, fitted) for each in logits]
            else:
                values = complements[indices, rule.plain].tolist()
            leaves = [1 - value >= rule.threshold for value in values]
        for index, leaf in zip(indices, leaves, strict=True):
            exiting[index] = leaf
    return exiting
