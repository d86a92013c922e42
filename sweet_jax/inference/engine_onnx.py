"""The ONNX Runtime engine, which does not compile for each length and batch size.

Each segment of a network (`onnx_segments.py`) is one session of ONNX Runtime. For an exported
model, its graph is read from a file; otherwise, it is traced with JAX, which is not used after
that. A batch is split into parts that fit into the cache, of texts of similar length, and each part
is padded only to its longest text.

Shape letters: B batch, N requests, L length, Q first tokens, H hidden, C classes, P slots.
"""

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from sweet_jax.errors import UserError, missing_package, one_line
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.batch_split import split_by_length, tokens_of_part
from sweet_jax.inference.engine import Stage, StageBatch, StageOutput, plan_stages
from sweet_jax.inference.onnx_files import SavedGraphs, has_graphs, read_graphs
from sweet_jax.inference.onnx_segments import LOW_EXIT_RATE, Segment


def load_engine(
    model: ModelArtifact,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    float32_layers: Sequence[int] | None = None,
) -> "OnnxEngine":
    """Starts a session of ONNX Runtime for each segment of a saved model.

    Args:
      model: the saved model.
      dtype: "float32", or "int8" for integer matrix products.
      cache_dir: not used, since nothing is compiled.
      threads: number of threads that compute a batch; defaults to the physical cores that this
        process may use.
      float32_layers: layers, counted from 1, that stay in float32 with int8; defaults to those
        listed in int8.json. Not used for an exported model, whose graphs are already written.

    Raises UserError for fewer than 1 thread, and if the model is not exported and JAX or onnx is
    not installed; see also `onnx_files.read_graphs` and `onnx_build.build_graphs`.

    """
    threads = physical_cores() if threads is None else threads
    if threads < 1:
        raise UserError(f"threads must be at least 1; got {threads}")
    if has_graphs(model.folder):
        graphs = read_graphs(model.folder, dtype)
    else:
        graphs = _trace(model, dtype, float32_layers)
    networks = [
        [SegmentSession(segment, graph, threads) for segment, graph in network]
        for network in graphs.networks
    ]
    return OnnxEngine(model, networks, Sizes(graphs.vocabulary, graphs.hidden, threads, dtype))


def _trace(model: ModelArtifact, dtype: str, float32_layers: Sequence[int] | None) -> SavedGraphs:
    """Returns the graphs of a model that is not exported."""
    try:
        from sweet_jax.inference.onnx_build import build_graphs  # imports JAX and onnx
    except ImportError as error:
        package = missing_package(error)
        raise UserError(
            f"{str(model.folder)!r} is not exported to ONNX, and running it without an export "
            f'needs {package}: pip install -e ".[onnx]", or run sweet-jax export --format=onnx '
            "where JAX is installed"
        ) from error
    return build_graphs(model, dtype, float32_layers)


def physical_cores() -> int:
    """Returns the number of physical cores that this process may use; if unknown, of all cores."""
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
    """Returns a session that runs a graph, or the graph in a file, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    _share_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Threads that spin while they wait for work take the cores from everything else that runs on
    # them: the server's other thread, its clients, other sessions. By default, they spin for tens
    # of milliseconds; 20 microseconds are enough to get from one operation to the next.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between runs
    source = str(graph)
    if not isinstance(graph, Path):
        values = [OrtValue.ortvalue_from_numpy(value) for value in graph.weights.values()]
        options.add_external_initializers(list(graph.weights), values)
        source = graph.model
    try:
        return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exception types are not public
        raise UserError(
            f"ONNX Runtime cannot read a graph of the model ({one_line(error)}): export it again"
        ) from error


@functools.cache
def _share_memory() -> None:
    """Registers one memory pool for all sessions of this process.

    Segments that run one after the other then use the same memory, which is still in the cache. For
    int8 at batch size 1, this saves a tenth of a model's time; for MiniLM with batches of 64 texts
    of 128 tokens, it saves two thirds of the memory.
    """
    name, kind = "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    info = onnxruntime.OrtMemoryInfo(name, kind, 0, onnxruntime.OrtMemType.DEFAULT)
    with contextlib.suppress(RuntimeError):  # another part of the process has registered one
        onnxruntime.create_and_register_allocator(info, None)


class Sizes(NamedTuple):
    """Holds the sizes and settings of an engine."""

    vocabulary: int  # number of token ids
    hidden: int  # H
    threads: int
    dtype: str


class SegmentSession:
    """Runs one segment.

    Attributes:
      segment: the segment.

    """

    def __init__(self, segment: Segment, graph: Any, threads: int):
        self.segment = segment
        self._session = start_session(graph, threads)
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the outputs by name; `values` may hold more than the segment reads.

        Inputs and outputs are plain NumPy arrays. ONNX Runtime's own values (OrtValue, IOBinding)
        would not avoid a copy, and creating them takes longer than they save.
        """
        inputs = {name: values[name] for name in self._inputs}
        outputs = self._session.run(self._outputs, inputs)
        return dict(zip(self._outputs, outputs, strict=True))


class OnnxEngine:
    """Implements `Engine`; hidden states are a NumPy array, float32 [P, L, H].

    Args:
      model: the saved model.
      networks: sessions of each network, in order.
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
        # Only exits that read the first token alone have segments with an input `count`.
        self._first_only = any(run.segment.counts for network in networks for run in network)

    @property
    def threads(self) -> int:
        """Returns the number of threads that compute a batch."""
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
            low_exit_rate=LOW_EXIT_RATE,
        )

    def new_states(self, slots: int, length: int) -> np.ndarray:
        """Returns zeros for the hidden states of P requests of L tokens, [P, L, H]."""
        return np.zeros((slots, length, self._sizes.hidden), np.float32)

    def run(self, stage: Stage, batch: StageBatch, states: np.ndarray | None) -> StageOutput:
        """Runs a stage on a batch, in parts; changes `states` in place if it writes states."""
        rows = batch.rows  # [2, N]
        parts = split_by_length(rows[1], tokens_of_part(self._sizes.threads))
        if len(parts) == 1:
            values = self._run_part(stage, rows, batch.texts, states, batch.second_starts)
            return StageOutput(values["logits"], values.get("exit_scores"), states)
        outputs = []
        for part in parts:
            texts = None if batch.texts is None else batch.texts[:, part]
            starts = None if batch.second_starts is None else batch.second_starts[part]
            outputs.append(self._run_part(stage, rows[:, part], texts, states, starts))
        back = np.argsort(np.concatenate(parts))  # [N], to the order of the batch
        logits = np.concatenate([values["logits"] for values in outputs])[back]  # [N, C]
        scores = None
        if "exit_scores" in outputs[0]:
            scores = np.concatenate([values["exit_scores"] for values in outputs])[back]  # [N]
        return StageOutput(logits, scores, states)

    def _run_part(
        self,
        stage: Stage,
        rows: np.ndarray,
        texts: np.ndarray | None,
        states: np.ndarray | None,
        starts: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        """Runs a stage on some requests, padded to the longest of them; returns values by name.

        Args:
          stage: the stage to run.
          rows: slots and numbers of tokens, int32 [2, N].
          texts: int32 [2, N, L], if the stage embeds, else None.
          states: all hidden states, changed in place if the stage writes states.
          starts: indices of the tokens at which the second text of each pair begins, int32 [N];
            None = at the end.

        """
        slots, tokens = rows  # [N] each
        length = max(int(tokens.max()), 1)
        values: dict[str, np.ndarray] = {"tokens": tokens}
        values["second_start"] = tokens if starts is None else starts
        if texts is not None:
            texts = texts[:, :, :length]
            values |= dict(zip(("input_ids", "token_type_ids"), texts, strict=True))
        elif states is not None:
            # Copying rows out of the buffer and back takes 1% of a layer's time, also at batch
            # size 64.
            values["states"] = states[slots, :length]
        for run in self.networks[stage.network]:
            segment = run.segment
            if stage.start <= segment.start and segment.end <= stage.end:
                if segment.counts:
                    first_alone = segment.end == stage.end and not stage.whole
                    values["count"] = np.asarray([1 if first_alone else length])
                if "next_states" in values:
                    values["states"] = values.pop("next_states")
                values |= run(values)
        if stage.writes_states and states is not None:
            states[slots, :length] = values["next_states" if stage.whole else "states"]
            states[slots, length:] = 0  # values that another text left might not be finite
        return values

    def compile(self, stage: Stage, batch_size: int, length: int, slots: int) -> None:
        """Does nothing: a session runs any batch size and length."""
