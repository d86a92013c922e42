"""The training and evaluation in torch that `torch_job` runs. Imports no jax.

Shape letters: E exit, N rows, B batch, L length.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import torch
import transformers

from experiments.benchmarks import torch_model
from experiments.benchmarks.torch_model import EarlyExitInTorch
from sweet_jax.errors import UserError

_THRESHOLDS = 11


class Rows(NamedTuple):
    """Holds the tokens and the label of every row."""

    ids: list[list[int]]
    labels: np.ndarray  # int64 [N]


def read_rows(path: Path, tokenizer: Any, length: int, chosen: np.ndarray | None = None) -> Rows:
    """Reads the rows of a file, or only those numbered in `chosen`, with at most `length` tokens.

    Raises UserError if the file does not exist.
    """
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist: set --data_dir to the folder of GLUE")
    table = pyarrow.parquet.read_table(path)
    table = table if chosen is None else table.take(chosen)
    ids = tokenizer(table["sentence"].to_pylist(), truncation=True, max_length=length)["input_ids"]
    return Rows(ids, table["label"].to_numpy())


def make_batches(
    rows: Rows, order: np.ndarray, size: int, length: int | None, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields batches of rows on the device: ids int64 [B, L], mask bool [B, L], labels int64 [B].

    Args:
      rows: all rows.
      order: numbers of the rows to take, in order.
      size: rows of a batch; the last one may have fewer.
      length: number of tokens L to pad to, or None for that of the longest row of the batch.
      pad_id: id of padding.

    """
    device = torch_model.device()
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        texts = [rows.ids[n] for n in numbers]
        width = length or max(map(len, texts))
        ids = torch.tensor([text + [pad_id] * (width - len(text)) for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        mask = torch.arange(width) < lengths[:, None]
        yield ids.to(device), mask.to(device), torch.tensor(rows.labels[numbers]).to(device)


def train(
    model: EarlyExitInTorch,
    rows: Rows,
    options: argparse.Namespace,
    length: int | None,
    pad_id: int,
) -> dict[str, Any]:
    """Trains the model; returns the steps of the job and those taken, their losses and seconds."""
    steps = -(-len(rows.ids) // options.batch) * options.epochs
    steps_taken = min(steps, max(2, round(options.share * steps)))
    owned = model.owned_parameters()
    optimizer = torch_model.make_optimizer(owned, options.learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    rng, losses, seconds = np.random.default_rng(options.seed), [], []
    orders = (rng.permutation(len(rows.ids)) for _ in range(options.epochs))
    batches = (b for o in orders for b in make_batches(rows, o, options.batch, length, pad_id))
    model.train()
    examples = 0
    for _ in range(steps_taken):
        start = time.perf_counter()
        ids, mask, labels = next(batches)
        loss = torch_model.summed_loss(model(ids, mask), labels)
        torch_model.update(owned, optimizer, loss)
        decay.step()
        losses.append(float(loss.detach()))  # waits for the step
        examples += len(labels)
        seconds.append(time.perf_counter() - start)
    tenth = max(1, steps_taken // 10)
    return {
        "steps": steps,
        "steps_taken": steps_taken,
        "examples": examples,
        "first_step_seconds": seconds[0],
        "later_step_seconds": float(np.mean(seconds[1:])),
        "first_loss": float(np.mean(losses[:tenth])),
        "last_loss": float(np.mean(losses[-tenth:])),
    }


@torch.inference_mode()
def evaluate(model: EarlyExitInTorch, rows: Rows, length: int | None, pad_id: int) -> list[float]:
    """Returns the accuracy of every exit, from one batched pass over the rows."""
    order = np.argsort([len(text) for text in rows.ids], kind="stable")
    correct = torch.zeros(len(model.exits), dtype=torch.int64)
    model.eval()
    for ids, mask, labels in make_batches(rows, order, 32, length, pad_id):
        predictions = torch.stack(model(ids, mask)).argmax(-1)  # [E, B]
        correct += (predictions == labels).sum(-1).cpu()
    return (correct / len(order)).tolist()


@torch.inference_mode()
def time_release(
    model: EarlyExitInTorch, rows: Rows, count: int, length: int, pad_id: int
) -> float:
    """Returns the seconds of the release's evaluation on `count` rows, spaced evenly."""
    model.eval()
    numbers = np.linspace(0, len(rows.ids) - 1, count).astype(int)
    start = time.perf_counter()
    for threshold in np.linspace(0.5, 1, _THRESHOLDS):
        for ids, mask, _ in make_batches(rows, numbers, 1, length, pad_id):
            h, layer_mask = model.embed(ids, mask)
            for number in range(1, model.exits[-1] + 1):
                h = model.layer(number, h, layer_mask, None)
                if number in model.exits:
                    logits = model.heads[model.exits.index(number)](h[:, 0])
                    if float(logits.softmax(-1).max()) >= threshold:
                        break
    return time.perf_counter() - start


def run_job(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates with the options of `torch_job`; returns the measurements by name."""
    torch.manual_seed(options.seed)
    folder, exits = Path(options.data_dir) / "sst2", [int(e) for e in options.exits.split(",")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.checkpoint)
    pad_id, max_length = tokenizer.pad_token_id, options.max_length
    validation = read_rows(folder / "validation.parquet", tokenizer, max_length)
    total = pyarrow.parquet.read_metadata(folder / "train.parquet").num_rows
    chosen = np.random.default_rng(options.seed).permutation(total)[: options.rows]
    rows = read_rows(folder / "train.parquet", tokenizer, max_length, chosen)
    encoder = transformers.BertModel.from_pretrained(options.checkpoint, attn_implementation="sdpa")
    model = EarlyExitInTorch(encoder, exits, 2, options.method).to(torch_model.device())
    length = max_length if options.padding == "max_length" else None
    results = {"rows": len(rows.ids), "exits": exits, "validation": len(validation.ids)}
    results |= train(model, rows, options, length, pad_id)
    results["accuracy"] = evaluate(model, validation, length, pad_id)
    results["release_seconds"] = 0.0
    if options.release_rows:
        results["release_seconds"] = time_release(
            model, validation, options.release_rows, max_length, pad_id
        )
    return results
