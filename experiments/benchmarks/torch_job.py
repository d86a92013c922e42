"""The torch side of `experiments.benchmarks.job`: a plain loop, from command to every exit's score.

    pip install -e ".[torch]"
    python -m experiments.benchmarks.torch_job --checkpoint=DIR --data_dir=DIR --padding=longest

Trains transformers' BertModel (SDPA attention) with exits on SST-2's rows: summed cross-entropy,
clipping per owner, fused AdamW without decay, linear decay to zero, float32, and evaluates all
exits on the validation rows in one batched pass. Rows are padded to 256 tokens
("max_length", as the authors' release does) or to the longest of their batch ("longest"); rows are
evaluated in the order of their lengths. The last line it prints is JSON. Imports no jax.

--share takes only that share of the steps, at least two. --release_rows then also times the
release's evaluation on so many rows: batch 1, padded to 256, once for each of 11 thresholds,
stopped at the exit; the time of this is reported apart, and is no part of the job.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import torch
import transformers

from experiments.benchmarks import torch_model
from experiments.benchmarks.torch_model import ExitsInTorch

THRESHOLDS = 11


class Rows(NamedTuple):
    """Tokens of every row, and its label."""

    ids: list[list[int]]
    labels: np.ndarray  # int64 [N]


def read(path: Path, tokenizer: Any, length: int, pick: np.ndarray | None = None) -> Rows:
    """Reads the rows of a file, or those picked."""
    table = pyarrow.parquet.read_table(path)
    table = table if pick is None else table.take(pick)
    ids = tokenizer(table["sentence"].to_pylist(), truncation=True, max_length=length)["input_ids"]
    return Rows(ids, table["label"].to_numpy())


def batches(
    rows: Rows, order: np.ndarray, size: int, length: int | None, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields (ids, mask, labels) of `size` rows, the last ones fewer, on the device.

    Padded to `length`, None for the longest of them.
    """
    where = torch_model.device()
    for start in range(0, len(order), size):
        picked = order[start : start + size]
        texts = [rows.ids[n] for n in picked]
        width = length or max(map(len, texts))
        ids = torch.tensor([text + [pad_id] * (width - len(text)) for text in texts])
        sizes = torch.tensor([len(text) for text in texts])
        mask = torch.arange(width) < sizes[:, None]
        yield ids.to(where), mask.to(where), torch.tensor(rows.labels[picked]).to(where)


def train(
    model: ExitsInTorch, rows: Rows, options: argparse.Namespace, length: int | None, pad_id: int
) -> dict[str, Any]:
    """Trains; returns how many steps there are and were, their losses and seconds."""
    steps = -(-len(rows.ids) // options.batch) * options.epochs
    stop = min(steps, max(2, round(options.share * steps)))
    owned = model.owned()
    optimizer = torch_model.make_optimizer(owned, options.learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    rng, losses, seconds = np.random.default_rng(options.seed), [], []
    orders = (rng.permutation(len(rows.ids)) for _ in range(options.epochs))
    every = (b for o in orders for b in batches(rows, o, options.batch, length, pad_id))
    model.train()
    examples = 0
    for _ in range(stop):
        began = time.perf_counter()
        ids, mask, labels = next(every)
        loss = torch_model.summed_loss(model(ids, mask), labels)
        torch_model.update(owned, optimizer, loss)
        decay.step()
        losses.append(float(loss.detach()))  # waits for the step
        examples += len(labels)
        seconds.append(time.perf_counter() - began)
    tenth = max(1, stop // 10)
    return {
        "steps": steps,
        "steps_taken": stop,
        "examples": examples,
        "first_step_seconds": seconds[0],
        "later_step_seconds": float(np.mean(seconds[1:])),
        "first_loss": float(np.mean(losses[:tenth])),
        "last_loss": float(np.mean(losses[-tenth:])),
    }


@torch.inference_mode()
def scores(model: ExitsInTorch, rows: Rows, length: int | None, pad_id: int) -> list[float]:
    """Returns the accuracy of every exit, in one batched pass."""
    order = np.argsort([len(text) for text in rows.ids], kind="stable")
    right = torch.zeros(len(model.exits), dtype=torch.int64)
    model.eval()
    for ids, mask, labels in batches(rows, order, 32, length, pad_id):
        answers = torch.stack(model(ids, mask)).argmax(-1)  # [E, B]
        right += (answers == labels).sum(-1).cpu()
    return (right / len(order)).tolist()


@torch.inference_mode()
def release_seconds(model: ExitsInTorch, rows: Rows, count: int, length: int, pad_id: int) -> float:
    """Seconds of the release's evaluation over `count` rows, evenly among all."""
    model.eval()
    picked = np.linspace(0, len(rows.ids) - 1, count).astype(int)
    began = time.perf_counter()
    for threshold in np.linspace(0.5, 1, THRESHOLDS):
        for ids, mask, _ in batches(rows, picked, 1, length, pad_id):
            h, layer_mask = model.embed(ids, mask)
            for number in range(1, model.exits[-1] + 1):
                h = model.layer(number, h, layer_mask, None)
                if number in model.exits:
                    logits = model.heads[model.exits.index(number)](h[:, 0])
                    if float(logits.softmax(-1).max()) >= threshold:
                        break
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    """Trains, evaluates and prints what there is to know as one line of JSON."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--checkpoint", required=True, help="directory of a BERT checkpoint")
    options.add_argument("--data_dir", required=True, help="sst2/{train,validation}.parquet")
    options.add_argument("--padding", default="longest", choices=("max_length", "longest"))
    options.add_argument("--max_length", type=int, default=256)
    options.add_argument("--exits", default="1,2,4,6")
    options.add_argument("--method", default="sweet", choices=("sweet", "early_exit"))
    options.add_argument("--rows", type=int, default=5400)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--learning_rate", type=float, default=3e-4)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--share", type=float, default=1.0)
    options.add_argument("--release_rows", type=int, default=0)
    chosen = options.parse_args(argv)
    torch.manual_seed(chosen.seed)
    folder, exits = Path(chosen.data_dir) / "sst2", [int(e) for e in chosen.exits.split(",")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.checkpoint)
    total = pyarrow.parquet.read_metadata(folder / "train.parquet").num_rows
    pick = np.random.default_rng(chosen.seed).permutation(total)[: chosen.rows]
    rows = read(folder / "train.parquet", tokenizer, chosen.max_length, pick)
    validation = read(folder / "validation.parquet", tokenizer, chosen.max_length)
    encoder = transformers.BertModel.from_pretrained(chosen.checkpoint, attn_implementation="sdpa")
    model = ExitsInTorch(encoder, exits, 2, chosen.method).to(torch_model.device())
    pad = tokenizer.pad_token_id
    length = chosen.max_length if chosen.padding == "max_length" else None
    found = {"rows": len(rows.ids), "exits": exits, "validation": len(validation.ids)}
    found |= train(model, rows, chosen, length, pad)
    found["scores"] = scores(model, validation, length, pad)
    found["release_seconds"] = 0.0
    if chosen.release_rows:
        found["release_seconds"] = release_seconds(
            model, validation, chosen.release_rows, chosen.max_length, pad
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
