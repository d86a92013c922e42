"""How rows flow through the stages: in batches that fill up again as rows leave.

Shape letters: E exit, B batch, L length, C classes, N rows.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np

from sweet_jax.exits.calibration import Calibrator, softmax_with_temperature
from sweet_jax.exits.policies import PolicyFunction, UnlabeledOutputs, exit_confidences
from sweet_jax.inference.jax_engine import Inputs, JaxEngine, Stage, batch_sizes, uses_pool


@dataclasses.dataclass(frozen=True, eq=False)
class ExitRule:
    """Decides which rows leave: those whose exit confidence reaches the threshold.

    Attributes:
      policy: a name, or a function of (outputs of the exits so far, temperatures), see
        `UnlabeledOutputs`.
      threshold: leave at the first exit confidence of at least this.
      calibrator: of all exits.
      layers: of all exits [E].

    """

    policy: str | PolicyFunction
    threshold: float
    calibrator: Calibrator
    layers: tuple[int, ...]

    def leaves(self, rows: Sequence["Request"]) -> np.ndarray:
        """Returns whether each of some rows leaves at the exit that all have reached, bool [N]."""
        count = len(rows[0].logits)
        logits = np.stack([row.logits for row in rows], axis=1)[None]  # [1, E', N, C]
        learned = None
        if rows[0].exit_scores:
            scores = [row.exit_scores for row in rows]
            learned = np.asarray(scores, np.float32).T[None]  # [1, E', N]
        outputs = UnlabeledOutputs(logits, np.asarray(self.layers[:count]), learned)
        calibrators = [self.calibrator.first_exits(count)]
        return exit_confidences(outputs, self.policy, calibrators)[0, -1] >= self.threshold

    def probabilities(self, logits: np.ndarray, exits: np.ndarray) -> np.ndarray:
        """Computes the softmax after the temperature of each row's exit, float64 [N, C].

        Args:
          logits: [N, C].
          exits: index of each row's, int [N].

        """
        found = self.calibrator.temperatures[exits]  # [N], NaN where an exit diverged
        return softmax_with_temperature(logits, np.where(np.isfinite(found), found, 1)[:, None])


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One text on its way."""

    number: int  # in the order of the input
    input_ids: np.ndarray  # int32 [tokens]
    token_type_ids: np.ndarray  # int32 [tokens]
    length: int  # it is padded to
    rule: ExitRule
    since: int = 0  # how many rows had been admitted when it was
    slot: int = -1  # that holds its hidden state
    exit: int = -1  # index of the exit it left at, -1 while on its way
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)  # [C] of every exit so far
    exit_scores: list[float] = dataclasses.field(default_factory=list)


class Scheduler:
    """Queues of rows, one for each stage and length; a full one is run.

    Args:
      programs: of the model.
      stages: that rows go through.
      batch_size: B at most.
      wait: how many rows may be admitted while a row waits in a queue; the queue is run after that
        though it is not full. None: as long as it takes.

    Attributes:
      runs: how many batches each stage has run.

    """

    def __init__(
        self, programs: JaxEngine, stages: Sequence[Stage], batch_size: int, wait: int | None = None
    ):
        self.programs, self.stages = programs, stages
        self.batch_size, self.wait = batch_size, wait
        self.runs = [0] * len(stages)
        self._sizes = batch_sizes(batch_size)
        self._queues: dict[tuple[int, int], deque[Request]] = {}  # by (stage, length)
        self._pools: dict[int, jax.Array] = {}  # by length
        self._free: dict[int, list[int]] = {}  # slots by length
        self._admitted = 0

    @property
    def slots(self) -> int:
        """P: enough for a batch of each stage, since deeper queues that are full run first."""
        return self.batch_size * len(self.stages)

    def __len__(self) -> int:
        """How many rows are on their way."""
        return sum(map(len, self._queues.values()))

    def admit(self, row: Request) -> None:
        """Takes a row in; nothing is computed yet."""
        self._admitted += 1
        self._wait_at(0, row)

    def pass_by(self) -> None:
        """Counts as a row admitted, to those that wait."""
        self._admitted += 1

    def advance(self) -> list[Request]:
        """Runs what is full, and what has waited for too long; returns the rows that left."""
        left: list[Request] = []
        while ready := [key for key in self._queues if self._full(key) or self._late(key)]:
            left += self._run(*max(ready))  # the deepest: it frees slots
        return left

    def step(self) -> list[Request]:
        """Runs one batch: a full one if there is one, else of the row that has waited longest.

        For a caller that would idle otherwise. A row that has waited for too long goes before full
        batches of other lengths. Returns the rows that left.
        """
        waiting = [key for key, queue in self._queues.items() if queue]
        if not waiting:
            return []
        oldest = min(waiting, key=lambda key: self._queues[key][0].since)
        full = [key for key in waiting if self._full(key)]
        if self._late(oldest):
            # Deeper rows of that length first: they hold its slots.
            return self._run(*max([key for key in full if key[1] == oldest[1]] + [oldest]))
        return self._run(*(max(full) if full else oldest))

    def finish(self) -> list[Request]:
        """Runs all that waits, to its end; returns the rows that left."""
        left = self.advance()
        while waiting := [key for key, queue in self._queues.items() if queue]:
            left += self._run(*min(waiting))  # the shallowest: what goes on fills the next
            left += self.advance()
        return left

    def _wait_at(self, stage: int, row: Request) -> None:
        row.since = self._admitted
        self._queues.setdefault((stage, row.length), deque()).append(row)

    def _full(self, key: tuple[int, int]) -> bool:
        return len(self._queues[key]) >= self.batch_size

    def _late(self, key: tuple[int, int]) -> bool:
        queue = self._queues[key]
        if not queue or self.wait is None:
            return False
        return self._admitted - queue[0].since > self.wait

    def _run(self, number: int, length: int) -> list[Request]:
        queue, stage = self._queues[number, length], self.stages[number]
        rows = [queue.popleft() for _ in range(min(len(queue), self.batch_size))]
        self.runs[number] += 1
        free = self._free.setdefault(length, list(range(self.slots)))
        if stage.embeds and stage.carries:
            for row in rows:
                row.slot = free.pop()
        answers = self._compute(stage, rows, length)
        classes = self.programs.classes
        for row, answer in zip(rows, answers, strict=False):
            row.logits.append(answer[:classes])
            row.exit_scores += answer[classes:].tolist()
        last = number + 1 == len(self.stages)
        leaves = np.full(len(rows), True) if last else _leaves(rows)
        left = []
        for row, done in zip(rows, leaves.tolist(), strict=True):
            if done:
                row.exit = stage.exit
                left.append(row)
            else:
                self._wait_at(number + 1, row)
            if row.slot >= 0 and (done or not stage.carries):
                free.append(row.slot)
                row.slot = -1
        return left

    def _compute(self, stage: Stage, rows: list[Request], length: int) -> np.ndarray:
        """The answers of a stage, on the host: [B, C or C + 1]."""
        inputs = self._inputs(rows, length, embeds=stage.embeds)
        pool = None
        if uses_pool(stage):
            # Taken out: a call that is interrupted leaves none rather than one that was consumed.
            pool = self._pools.pop(length, None)
            pool = self.programs.new_pool(self.slots, length) if pool is None else pool
        answers, written = self.programs(stage, inputs, length, pool)
        kept = pool if written is None else written
        if kept is not None:
            self._pools[length] = kept
        return np.asarray(answers)

    def _inputs(self, rows: list[Request], length: int, *, embeds: bool) -> Inputs:
        size = next(size for size in self._sizes if size >= len(rows))
        none = self.slots
        places = np.full((2, size), none, np.int32)
        places[1] = 0
        places[0, : len(rows)] = [row.slot if row.slot >= 0 else none for row in rows]
        places[1, : len(rows)] = [len(row.input_ids) for row in rows]
        if not embeds:
            return Inputs(places)
        texts = np.zeros((2, size, length), np.int32)
        texts[0] = self.programs.pad_id
        for place, row in enumerate(rows):
            texts[0, place, : len(row.input_ids)] = row.input_ids
            texts[1, place, : len(row.input_ids)] = row.token_type_ids
        return Inputs(places, texts)


def _leaves(rows: Sequence[Request]) -> np.ndarray:
    """Whether each row leaves, each by its own rule: bool [N]."""
    found = np.empty(len(rows), bool)
    of = np.asarray([id(row.rule) for row in rows])
    for rule in {id(row.rule): row.rule for row in rows}.values():
        own = np.flatnonzero(of == id(rule))
        found[own] = rule.leaves([rows[place] for place in own.tolist()])
    return found
