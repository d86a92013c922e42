"""The same model in torch: transformers' encoder with exits, and its training step.

Imports no jax, because `job` times `torch_job` from its start.

Shape letters: B batch, L length, H hidden, C classes.
"""

from collections.abc import Sequence

import torch
import transformers

_ACTIVATIONS = {"tanh": torch.nn.Tanh, "gelu": torch.nn.GELU}


class EarlyExitInTorch(torch.nn.Module):
    """Adds a pooler, dropout and a classifier at each of `exits` to a BertModel or DebertaModel.

    With the method "sweet", hidden states (and the table of DeBERTa's relative positions) are
    detached after every exit, so that each parameter gets the gradient of one exit; with
    "early_exit" they are not.

    Heads start as in this project: with a copy of the encoder's pooler, if it has one, and
    otherwise with BERT's initialization.
    """

    def __init__(
        self,
        encoder: transformers.PreTrainedModel,
        exits: Sequence[int],
        classes: int,
        method: str,
        pooler_act: str = "tanh",
    ):
        super().__init__()
        config, hidden = encoder.config, encoder.config.hidden_size
        self.encoder, self.exits, self.method = encoder, tuple(exits), method
        self.is_deberta = config.model_type == "deberta"  # the first version
        self.heads = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(hidden, hidden),
                _ACTIVATIONS[pooler_act](),
                torch.nn.Dropout(config.hidden_dropout_prob),
                torch.nn.Linear(hidden, classes),
            )
            for _ in exits
        )
        for module in self.heads.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=config.initializer_range)
                torch.nn.init.zeros_(module.bias)
        if getattr(encoder, "pooler", None) is not None:
            for head in self.heads:
                head[0].load_state_dict(encoder.pooler.dense.state_dict())
            encoder.pooler = None

    def embed(
        self, ids: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the hidden states [B, L, H] before layer 1, and the mask that layers take.

        ids: int64 [B, L].
        mask: bool [B, L], or None if there is no padding.
        """
        if self.is_deberta:
            mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            return self.encoder.embeddings(ids, mask=mask), mask[:, None, None, :]
        return self.encoder.embeddings(ids), None if mask is None else mask[:, None, None, :]

    def layer(
        self, number: int, h: torch.Tensor, mask: torch.Tensor | None, table: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the hidden states [B, L, H] after a layer.

        number: number of the layer, from 1.
        h: hidden states [B, L, H] before it.
        mask: mask from `embed`.
        table: embeddings of DeBERTa's relative positions.
        """
        layer, arguments = self.encoder.encoder.layer[number - 1], {}
        if self.is_deberta:
            position = torch.arange(h.shape[1], device=h.device)
            distances = (position[:, None] - position)[None]
            arguments = {"relative_pos": distances, "rel_embeddings": table}
        h = layer(h, mask, **arguments)
        return h[0] if isinstance(h, tuple) else h

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Returns the logits [B, C] of every exit; arguments as for `embed`."""
        h, mask = self.embed(ids, mask)
        logits = []
        table = self.encoder.encoder.rel_embeddings.weight if self.is_deberta else None
        for number in range(1, self.exits[-1] + 1):
            h = self.layer(number, h, mask, table)
            if number in self.exits:
                logits.append(self.heads[self.exits.index(number)](h[:, 0]))
                if self.method == "sweet":
                    h, table = h.detach(), None if table is None else table.detach()
        return logits

    def owned_parameters(self) -> list[list[torch.nn.Parameter]]:
        """Returns the parameters of each exit: its head, and the layers after the exit before.

        The first exit also owns the embeddings and DeBERTa's table.
        """
        layers, starts = self.encoder.encoder.layer, (0, *self.exits[:-1])
        owned = [
            [*head.parameters(), *layers[start:end].parameters()]
            for head, start, end in zip(self.heads, starts, self.exits, strict=True)
        ]
        owned[0] += self.encoder.embeddings.parameters()
        if self.is_deberta:
            owned[0] += self.encoder.encoder.rel_embeddings.parameters()
        return owned


def make_optimizer(
    owned: Sequence[Sequence[torch.nn.Parameter]], learning_rate: float
) -> torch.optim.AdamW:
    """Returns AdamW without weight decay, in its fused form, which is the fastest."""
    parameters = [p for group in owned for p in group]
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)


def summed_loss(logits: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Returns the sum over exits of the mean cross-entropy; logits are [B, C] for each exit."""
    losses = [torch.nn.functional.cross_entropy(own, labels) for own in logits]
    return torch.stack(losses).sum()


def update(
    owned: Sequence[Sequence[torch.nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
) -> None:
    """Updates the parameters by AdamW, with gradients clipped to norm 1 for each owner."""
    optimizer.zero_grad()
    loss.backward()
    for group in owned:
        torch.nn.utils.clip_grad_norm_(group, 1.0)
    optimizer.step()


def device() -> str:
    """Returns the device on which torch computes: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Waits until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
