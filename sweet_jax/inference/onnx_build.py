"""Builds the ONNX graphs of a saved model from the JAX program of each segment of its networks.

No encoder family is named here, since the computation of a segment is traced (`onnx_trace.py`).

Shape letters: B batch, L length, Q first tokens, H hidden, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
from flax import nnx

from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import ModelArtifact, read_float32_layers
from sweet_jax.inference.network import Network, load_networks
from sweet_jax.inference.onnx_files import SavedGraphs
from sweet_jax.inference.onnx_fusions import Fuser
from sweet_jax.inference.onnx_graph import Graph, GraphBuilder
from sweet_jax.inference.onnx_operators import OPERATORS
from sweet_jax.inference.onnx_segments import Segment, plan_segments
from sweet_jax.inference.onnx_trace import Program, trace
from sweet_jax.inference.onnx_writer import GraphWriter, UnsupportedOperationError
from sweet_jax.poolings import POOLINGS

# Constraints on the sizes: there is at least one token, and Q is at most L.
_SIZES = ("q <= l", "l*q >= q", "l*l >= l")
# Raised if a function needs the value of a symbolic size, for example np.arange(length).
_NEEDS_SIZES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.InconclusiveDimensionOperation,
)


def build_graphs(
    model: ModelArtifact, precision: str = "float32", float32_layers: Sequence[int] | None = None
) -> SavedGraphs:
    """Returns the graphs of a saved model.

    Args:
      model: the saved model.
      precision: "float32" or "int8".
      float32_layers: layers, counted from 1, that stay in float32 with "int8"; defaults to those
        listed in int8.json. Layers that share their parameters, as in ALBERT, stay all or none.

    Raises:
      UserError: see `load_networks` and `build_segment`.
      ValueError: some, but not all, of several layers that share their parameters.


    """
    if float32_layers is None:
        float32_layers = read_float32_layers(model.folder) if precision == "int8" else ()
    networks = load_networks(model)
    exact = _kernel_prefixes(networks[0].params, float32_layers, model.layers[-1])
    first_only = POOLINGS[model.pooling].first_only
    graphs = [
        [
            (segment, build_segment(network, segment, precision, exact))
            for segment in plan_segments(network.exits, first_only=first_only)
        ]
        for network in networks
    ]
    words = networks[0].params["encoder"]["embeddings"]["word"]["embedding"]  # [vocabulary, H]
    return SavedGraphs(graphs, len(words), networks[0].hidden_size)


def _kernel_prefixes(params: Any, layers: Sequence[int], depth: int) -> tuple[str, ...]:
    """Returns how the paths of some layers' kernels begin. Raises ValueError, see `build_graphs`.

    Args:
      params: parameters of the encoder with its exits.
      layers: layer numbers, from 1.
      depth: layers of the encoder.

    """
    if "shared_layer" not in params["encoder"]:
        return tuple(f"encoder/layers/{layer - 1}/" for layer in layers)
    if len(set(layers)) not in (0, depth):
        raise ValueError(f"layers share their parameters: all {depth} or none; got {layers}")
    return ("encoder/shared_layer/",) if layers else ()


def build_segment(
    network: Network, segment: Segment, precision: str = "float32", exact: Sequence[str] = ()
) -> Graph:
    """Returns a segment's graph.

    The graph has these inputs: input_ids and token_type_ids, int32 [B, L], or states, float32
    [B, L, H]; tokens, int32 [B], the number of tokens of each row; count, int64 [1], the number of
    first tokens to compute, if the segment has `counts`; second_start, int32 [B], the index of the
    token where the second text of a pair begins, if the exit compares two texts. Its outputs,
    if the segment computes them, are next_states [B, Q, H], logits [B, C] and exit_scores [B].

    Args:
      network: the network.
      segment: the segment of the network.
      precision: "float32", or "int8" for integer matrix products everywhere but in the heads.
      exact: prefixes of the paths of other kernels that stay in float32 with "int8".

    Raises UserError if the segment computes something that has no ONNX operator here.

    """
    size = dict(zip("blq", jax.export.symbolic_shape("b, l, q", constraints=_SIZES), strict=True))
    tokens = (size["b"], size["l"])
    mask = jax.ShapeDtypeStruct(tokens, np.bool_)
    if segment.embeds:
        ids = jax.ShapeDtypeStruct(tokens, np.int32)
        inputs = {"input_ids": ids, "token_type_ids": ids, "mask": mask}
    else:
        states = jax.ShapeDtypeStruct((*tokens, network.hidden_size), np.float32)
        inputs = {"states": states, "mask": mask}
    if segment.exits and POOLINGS[network.pooling].pairs:
        inputs["second"] = mask
    count = size["q"] if segment.counts else None
    names: list[str] = []
    function = segment_function(network, segment, count, names)
    leaves = jax.tree_util.tree_leaves_with_path(network.params)
    try:
        program = trace(function, {_path(path): leaf for path, leaf in leaves}, inputs)
        return _write(program, names, count, GraphBuilder(precision, exact))
    except UnsupportedOperationError as error:
        raise _refusal(network, f"the primitive {error}") from error
    except _NEEDS_SIZES as error:
        raise _refusal(network, "an array whose size must be known in advance") from error


def _refusal(network: Network, feature: str) -> UserError:
    own = not POOLINGS.is_own(network.pooling)
    pooling = f" or the pooling {network.pooling!r}" if own else ""
    return UserError(
        f"the onnxruntime engine does not support {feature}, which an encoder of model_type "
        f"{network.model_type!r}{pooling} needs: use engine=jax"
    )


def segment_function(
    network: Network, segment: Segment, count: Any, names: list[str]
) -> Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array]], list[jax.Array]]:
    """Returns a function from (parameters by path, inputs by name) to the outputs of a segment.

    Args:
      network: the network.
      segment: the segment of the network.
      count: number of first tokens that the last layer computes, if the segment has `counts`.
      names: list that a call fills with the names of the outputs.

    """

    def run(params: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array]) -> list[jax.Array]:
        tree = jax.tree.map_with_path(lambda path, _: params[_path(path)], network.params)
        model = nnx.merge(network.graphdef, tree)
        encoder, mask = model.encoder, inputs["mask"]
        relative = encoder.relative_table()
        h = inputs.get("states")
        if segment.embeds:
            h = encoder.embed(inputs["input_ids"], inputs["token_type_ids"], mask)
        first_only = model.config.reads.first_only and not segment.returns_states
        last = count if segment.counts else 1 if first_only else None
        for number in range(segment.start, segment.end + 1):
            only = last if number == segment.end and segment.exits else None
            h = encoder.layer(number, h, mask, relative=relative, count=only)
        outputs: dict[str, Any] = {}
        if segment.returns_states:
            outputs["next_states"] = h
        if segment.exits:
            head, second = model.heads[str(segment.end)], inputs.get("second")
            output = head(h, mask, model.pooler, None, second=second)
            outputs["logits"] = output.logits
            if output.exit_scores is not None:
                outputs["exit_scores"] = output.exit_scores
        names[:] = outputs
        return list(outputs.values())

    return run


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(part.key) for part in path)


def _write(program: Program, names: list[str], count: Any, graph: GraphBuilder) -> Graph:
    """Returns the graph of a program; `names` are the names of its outputs."""
    inputs = dict(program.inputs)
    mask, second = inputs.pop("mask"), inputs.pop("second", None)
    input_names = {name: graph.input(name, x.dtype, x.shape) for name, x in inputs.items()}
    tokens = graph.input("tokens", np.int32, mask.shape[:1])
    if count is not None:
        graph.size_input("count", count)
    writer = GraphWriter(graph, tokens, OPERATORS)
    for name, value in inputs.items():
        writer.give(value, input_names[name])
    length = graph.op("Squeeze", graph.size(mask.shape[1]))
    positions = graph.op("Range", graph.constant(0), length, graph.constant(1))  # [L]
    ends = graph.op("Unsqueeze", graph.cast(tokens, np.int64), graph.constant([1]))  # [B, 1]
    writer.give(mask, graph.op("Less", positions, ends))
    if second is not None:
        start = graph.input("second_start", np.int32, mask.shape[:1])
        starts = graph.op("Unsqueeze", graph.cast(start, np.int64), graph.constant([1]))  # [B, 1]
        writer.give(second, graph.op("Not", graph.op("Less", positions, starts)))
    fused = Fuser(program, mask).run()
    writer.write(fused)
    for name, value in zip(names, fused.outputs, strict=True):
        graph.output(name, writer.full(value), value.shape)
    return graph.build()
