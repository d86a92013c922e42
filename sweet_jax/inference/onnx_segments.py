"""The segments of a saved model's networks: ONNX graphs that together hold every weight once.

A stage (`engine.py`) runs several segments in a row. Where exits read the first token alone, the
layer of an exit is a segment of its own: it computes the first token for the exit, and all tokens
for the requests that continue, by an input `count`.

Shape letters: B batch, L length, Q first tokens, H hidden, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

# The share of a layer's time that its first token alone takes at MiniLM's shape: 0.2 in batches of
# 64, and 0.35 to 0.55 in those of one, whose time is that of reading the weights.
LOW_EXIT_RATE = 0.4


class Segment(NamedTuple):
    """Describes one graph: some layers of a network, and the head of an exit."""

    start: int  # the first layer, from 1
    end: int  # the last layer; start - 1 where there is none
    embeds: bool = False  # whether it begins with token ids
    exits: bool = False  # whether it ends with the head of the exit at layer `end`
    counts: bool = False  # whether its layer computes as many first tokens as it is asked to
    returns_states: bool = True  # whether the hidden states [B, Q, H] after `end` are an output


def plan_segments(layers: Sequence[int], *, first_only: bool) -> list[Segment]:
    """Returns the segments of a network in order.

    Args:
      layers: of its exits, ascending.
      first_only: whether exits read the first token alone.

    """
    segments: list[Segment] = []
    start = 1
    for layer in layers:
        embeds, last = start == 1, layer == layers[-1]
        if first_only and not last:
            alone = start == layer  # what resumes at layer 1 embeds again
            if not alone:
                segments.append(Segment(start, layer - 1, embeds))
            segments.append(Segment(layer, layer, embeds and alone, exits=True, counts=True))
        else:
            segments.append(Segment(start, layer, embeds, exits=True, returns_states=not last))
        start = layer + 1
    return segments
