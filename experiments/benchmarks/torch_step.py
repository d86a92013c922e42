"""The training step in torch that `train_step` compares with this project's."""

import dataclasses
import functools
from collections.abc import Callable

import torch
import transformers

from experiments.benchmarks import torch_model
from experiments.benchmarks.shapes import CLASSES, LEARNING_RATE, Shape, Size
from experiments.benchmarks.torch_model import EarlyExitInTorch
from sweet_jax.models.deberta import DebertaConfig


def make_torch_model(shape: Shape, method: str, dtype: str = "float32") -> EarlyExitInTorch:
    """Returns the model of a shape in torch, in training mode.

    dtype: of DeBERTa's parameters; BERT's are float32.
    """
    values = dataclasses.asdict(shape.config)
    if isinstance(shape.config, DebertaConfig):
        del values["embedding_size"]  # a field of this project, where 0 means the hidden size
        values["pos_att_type"] = list(values["pos_att_type"])
        encoder = transformers.DebertaModel(transformers.DebertaConfig(**values))
    else:
        config = transformers.BertConfig(**values, attn_implementation="sdpa")
        encoder = transformers.BertModel(config, add_pooling_layer=False)
    model = EarlyExitInTorch(encoder, shape.exits, CLASSES, method, shape.config.pooler_act)
    if model.is_deberta:
        model.to(getattr(torch, dtype))
    return model.to(torch_model.device()).train()


def make_torch_steps(shape: Shape, method: str, size: Size, dtype: str) -> list[Callable[[], None]]:
    """Returns two functions that take one step in torch and wait for it: eager, and compiled.

    Both train the same parameters: two sets would not fit into the memory beside this project's.
    """
    model, device = make_torch_model(shape, method, dtype), torch_model.device()
    autocast = dtype == "bfloat16" and not model.is_deberta
    owned = model.owned_parameters()
    optimizer = torch_model.make_optimizer(owned, LEARNING_RATE)
    ids = torch.randint(1, shape.config.vocab_size, (size.batch, size.length), device=device)
    labels = torch.randint(0, CLASSES, (size.batch,), device=device)

    def loss() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return torch_model.summed_loss(model(ids), labels)

    torch.compiler.reset()  # drops what was compiled for another shape

    def take(loss: Callable[[], torch.Tensor]) -> None:
        torch_model.update(owned, optimizer, loss())
        torch_model.synchronize()

    compiled = torch.compile(loss, dynamic=False)
    return [functools.partial(take, loss), functools.partial(take, compiled)]
