"""The segments of a saved model's networks: ONNX graphs that together hold each weight once.

A stage (`engine.py`) runs one or more segments in order. If exits read only the first token, the
layer of an exit is a separate segment with an input `count`: with 1, it computes only the first
token, for the exit; with L, it computes all tokens, for the requests that continue.

Shape letters: B batch, L length, Q first tokens, H hidden, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Computing only a layer's first token takes about this share of the time of the whole layer, for
# MiniLM's shape: 0.2 at batch size 64, and 0.35 to 0.55 at batch size 1, where reading the weights
# takes most of the time.
LOW_EXIT_RATE = 0.4


class Segment(NamedTuple):
    """Describes one graph: some layers of a network, and the head of an exit."""

    start: int  # the first layer, from 1
    end: int  # the last layer; start - 1 if it has no layer
    embeds: bool = False  # whether it begins with token ids
    exits: bool = False  # whether it ends with the head of the exit at layer `end`
    counts: bool = False  # whether an input `count` is the number of first tokens to compute
    returns_states: bool = True  # whether the hidden states [B, Q, H] after `end` are an output


def plan_segments(layers: Sequence[int], *, first_only: bool) -> list[Segment]:
    """Returns the segments of a network in order.

    Args:
      layers: layers of its exits, ascending.
      first_only: whether exits read only the first token.

    """
    segments: list[Segment] = []
    start = 1
    for layer in layers:
        embeds, last = start == 1, layer == layers[-1]
        if first_only and not last:
            alone = start == layer  # at layer 1, this segment embeds too
            if not alone:
                segments.append(Segment(start, layer - 1, embeds))
            segments.append(Segment(layer, layer, embeds and alone, exits=True, counts=True))
        else:
            segments.append(Segment(start, layer, embeds, exits=True, returns_states=not last))
        start = layer + 1
    return segments
