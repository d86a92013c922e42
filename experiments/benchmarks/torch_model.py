"""The same model in torch: transformers' encoder, an exit at several layers, and its training step.

Imports no jax: `torch_job` times this side from its first import.

Shape letters: B batch, L length, H hidden, C classes.
"""

from collections.abc import Sequence

import torch
import transformers

ACTIVATIONS = {"tanh": torch.nn.Tanh, "gelu": torch.nn.GELU}


class ExitsInTorch(torch.nn.Module):
    """BertModel or DebertaModel (v1) with pooler, dropout and classifier at each of `exits`.

    Under "sweet" hidden states (and DeBERTa's table of relative positions) are detached after every
    exit, so that each parameter gets one exit's gradient; under "early_exit" they are not.

    Heads begin as this project's do: a copy of the encoder's own pooler where it has one, and
    BERT's initialisation.
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
        self.relative = config.model_type == "deberta"
        self.heads = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(hidden, hidden),
                ACTIVATIONS[pooler_act](),
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
        """Returns (hidden state [B, L, H], the mask that a layer takes) from two [B, L]."""
        if self.relative:
            mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            return self.encoder.embeddings(ids, mask=mask), mask[:, None, None, :]
        return self.encoder.embeddings(ids), None if mask is None else mask[:, None, None, :]

    def layer(
        self, number: int, h: torch.Tensor, mask: torch.Tensor | None, table: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the hidden state [B, L, H] after layer `number`, from 1."""
        layer, more = self.encoder.encoder.layer[number - 1], {}
        if self.relative:
            place = torch.arange(h.shape[1], device=h.device)
            more = {"relative_pos": (place[:, None] - place)[None], "rel_embeddings": table}
        h = layer(h, mask, **more)
        return h[0] if isinstance(h, tuple) else h

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Logits [B, C] of every exit; mask bool [B, L], None where there is no padding."""
        (h, mask), answers = self.embed(ids, mask), []
        table = self.encoder.encoder.rel_embeddings.weight if self.relative else None
        for number in range(1, self.exits[-1] + 1):
            h = self.layer(number, h, mask, table)
            if number in self.exits:
                answers.append(self.heads[self.exits.index(number)](h[:, 0]))
                if self.method == "sweet":
                    h, table = h.detach(), None if table is None else table.detach()
        return answers

    def owned(self) -> list[list[torch.nn.Parameter]]:
        """Returns the parameters of each exit: its head, and the layers after the exit before.

        The embeddings (and the table) are the first's.
        """
        layers, starts = self.encoder.encoder.layer, (0, *self.exits[:-1])
        found = [
            [*head.parameters(), *layers[start:end].parameters()]
            for head, start, end in zip(self.heads, starts, self.exits, strict=True)
        ]
        found[0] += self.encoder.embeddings.parameters()
        if self.relative:
            found[0] += self.encoder.encoder.rel_embeddings.parameters()
        return found


def make_optimizer(owned: Sequence[Sequence[torch.nn.Parameter]], rate: float) -> torch.optim.AdamW:
    """Returns AdamW in its fused form, the fastest there is, without weight decay."""
    parameters = [p for group in owned for p in group]
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)


def summed_loss(answers: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Returns the sum over exits of mean cross-entropy."""
    each = [torch.nn.functional.cross_entropy(logits, labels) for logits in answers]
    return torch.stack(each).sum()


def update(
    owned: Sequence[Sequence[torch.nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
) -> None:
    """Updates parameters: gradients, clipped to norm 1 for each owner, and AdamW."""
    optimizer.zero_grad()
    loss.backward()
    for group in owned:
        torch.nn.utils.clip_grad_norm_(group, 1.0)
    optimizer.step()


def device() -> str:
    """Returns where torch computes: a GPU where it finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fence() -> None:
    """Waits for what was given to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
