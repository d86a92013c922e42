"""The ONNX Runtime engine: no JAX, no compilation for a length or a batch size.

Each segment of a network (`onnx_segments.py`) is one session of ONNX Runtime. Its graph is a file
of an exported model; else it is traced here, for which JAX is imported and then no longer used. A
batch is run without the rows that fill it up and at the length of its longest text.

Shape letters: B batch, L length, Q first tokens, H hidden, C classes, P slots.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from sweet_jax.config import UserError
from sweet_jax.files import one_line
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine import Stage, StageBatch, StageOutput, plan_stages
from sweet_jax.inference.onnx_files import SavedGraphs, has_graphs, read_graphs
from sweet_jax.inference.onnx_segments import Segment

DTYPES = ("float32", "int8")
# The share of a layer's time that its first token alone takes: 0.3 in batches of 64, and above 0.5
# in those of one, whose time is that of reading the weights (experiments/benchmarks/engines.py).
_LOW_EXIT_RATE = 0.5


def load_engine(
    model: ModelArtifact,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
) -> "OnnxEngine":
    """Starts a session of ONNX Runtime for each segment of a saved model.

    Args:
      model: the saved model.
      dtype: "float32", or "int8" for matrix products of integers.
      cache_dir: not used, since nothing is compiled.
      threads: that compute one batch; default the physical cores that this process may use.

    Raises UserError for another dtype, fewer than 1 thread, a model that is not exported where JAX
    or onnx is not installed, and see `onnx_files.read_graphs` and `onnx_build.build_graphs`.

    """
    if dtype not in DTYPES:
        raise UserError(
            f"the onnxruntime engine has {' and '.join(DTYPES)}, not {dtype!r}: use engine=jax"
        )
    threads = physical_cores() if threads is None else threads
    if threads < 1:
        raise UserError(f"threads must be at least 1; got {threads}")
    graphs = read_graphs(model.folder, dtype) if has_graphs(model.folder) else _trace(model, dtype)
    networks = [
        [SegmentSession(segment, graph, threads) for segment, graph in network]
        for network in graphs.networks
    ]
    return OnnxEngine(model, networks, Sizes(graphs.vocabulary, graphs.hidden, threads, dtype))


def _trace(model: ModelArtifact, dtype: str) -> SavedGraphs:
    """Returns the graphs of a model that is not exported."""
    try:
        from sweet_jax.inference.onnx_build import build_graphs  # imports JAX and onnx
    except ImportError as error:
        raise UserError(
            f"the graphs of {str(model.folder)!r} are not written, and writing them needs "
            f'{error.name}: pip install -e ".[onnx]", or run sweet-jax export --format=onnx where '
            "JAX is installed"
        ) from error
    return build_graphs(model, dtype)


def physical_cores() -> int:
    """Returns how many physical cores this process may use; where that is not known, all cores."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if usable is None:
        return os.cpu_count() or 1
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def start_session(graph: Any, threads: int) -> onnxruntime.InferenceSession:
    """Returns a session on the CPU of a graph, or of the file of one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Segments run in turn: threads that wait for more work would take cores from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = str(graph)
    if not isinstance(graph, Path):
        values = [OrtValue.ortvalue_from_numpy(value) for value in graph.weights.values()]
        options.add_external_initializers(list(graph.weights), values)
        source = graph.model
    try:
        return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    except Exception as error:  # its kinds are not public
        raise UserError(f"ONNX Runtime cannot read a graph: {one_line(error)}") from error


class Sizes(NamedTuple):
    """Holds what an engine says of itself."""

    vocabulary: int
    hidden: int  # H
    threads: int
    dtype: str


class SegmentSession:
    """Runs one segment.

    Attributes:
      segment: what it computes.

    """

    def __init__(self, segment: Segment, graph: Any, threads: int):
        self.segment = segment
        self._session = start_session(graph, threads)
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, values: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        """Returns the outputs by name, of those of some values that the segment reads."""
        inputs = {name: values[name] for name in self._inputs}
        outputs = self._session.run_with_ort_values(self._outputs, inputs)
        return dict(zip(self._outputs, outputs, strict=True))


class OnnxEngine:
    """Implements `Engine`; hidden states are a NumPy array, float32 [P, L, H].

    Args:
      model: the saved model.
      networks: the sessions of each network, in order.
      sizes: see `Sizes`.

    """

    compilations = 0

    def __init__(
        self,
        model: ModelArtifact,
        networks: Sequence[Sequence[SegmentSession]],
        sizes: Sizes,
    ):
        self.networks, self.pad_id = networks, model.tokenizer.pad_token_id
        self.vocabulary_size, self._sizes = sizes.vocabulary, sizes
        self._exits = [network.exits for network in model.networks]
        # A segment that counts is for exits that read the first token alone.
        self._first_only = any(run.segment.counts for network in networks for run in network)
        self._one = _to_runtime(np.ones(1, np.int64))

    @property
    def threads(self) -> int:
        """Returns how many threads compute a batch."""
        return self._sizes.threads

    @property
    def description(self) -> str:
        """Returns the device, ONNX Runtime's version, the number of threads and the dtype."""
        version = onnxruntime.__version__
        threads = f"{self._sizes.threads} thread{'s' if self._sizes.threads > 1 else ''}"
        return f"cpu, onnxruntime {version}, {threads}, {self._sizes.dtype}"

    def stages(self, *, full: bool = False, exit_rates: Sequence[float] = ()) -> list[Stage]:
        """Returns the stages in order, see `plan_stages`."""
        return plan_stages(
            self._exits,
            first_only=self._first_only,
            full=full,
            exit_rates=exit_rates,
            low_exit_rate=_LOW_EXIT_RATE,
        )

    def new_states(self, slots: int, length: int) -> np.ndarray:
        """Returns zeros for the hidden states of P requests of L tokens, [P, L, H]."""
        return np.zeros((slots, length, self._sizes.hidden), np.float32)

    def run(self, stage: Stage, batch: StageBatch, states: np.ndarray | None) -> StageOutput:
        """Runs a stage on a batch; one that writes states changes those it is given."""
        slots, tokens = batch.rows[:, : batch.requests]  # [N] each, without the rows that fill up
        length = max(int(tokens.max()), 1)
        inputs = {"tokens": tokens}
        if batch.texts is not None:
            texts = batch.texts[:, : batch.requests, :length]
            inputs |= dict(zip(("input_ids", "token_type_ids"), texts, strict=True))
        elif states is not None:
            inputs["states"] = states[slots, :length]
        values = {name: _to_runtime(value) for name, value in inputs.items()}
        for run in self.networks[stage.network]:
            segment = run.segment
            if stage.start <= segment.start and segment.end <= stage.end:
                if segment.counts:
                    first_alone = segment.end == stage.end and not stage.whole
                    values["count"] = (
                        self._one if first_alone else _to_runtime(np.asarray([length]))
                    )
                if "next_states" in values:
                    values["states"] = values.pop("next_states")
                values |= run(values)
        if stage.writes_states and states is not None:
            states[slots, :length] = values["next_states" if stage.whole else "states"].numpy()
            states[slots, length:] = 0  # what another text left there might not be finite
        scores = values.get("exit_scores")
        return StageOutput(
            values["logits"].numpy(), None if scores is None else scores.numpy(), states
        )

    def compile(self, stage: Stage, batch_size: int, length: int, slots: int) -> None:
        """Does nothing: a session computes any batch size and length."""


def _to_runtime(array: np.ndarray) -> OrtValue:
    """Returns an array for a session, without a copy where it is contiguous."""
    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
