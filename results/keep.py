"""Keeps the small files of a run here: this is how runs get into results/.

    python results/keep.py RUN results/NAME

results.json (with sizes, where they were not counted), masks.json, and of a training its run.json.
f1.json becomes a list, in the order of the dev file. Of a fine-pruning also the log, in about 200
lines; in results.json the heads that the authors' rule would leave; and in moments.json six moments
of RUN-moments.
"""
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import torch

from moments import six                 # puts the four files on the path
from bert import BertForQuestionAnswering, load_model
from compact import flops, size_of


@torch.no_grad()
def heads_authors_rule(model: BertForQuestionAnswering) -> list[int]:
    """How many heads the reference would leave in each layer: those with none of Q, K and V empty.

    At least one stays in a layer that has any. Not exact: see cut_heads() of blockprune.py.
    Source: nn_pruning/inference_model_patcher.py.
    """
    D = model.config.head_size
    left = []
    for layer, heads in zip(model.bert.layers, model.config.heads):
        attention = layer.attention
        # A head is kept where it has something in its rows of query, of key, and of value.
        kept = torch.ones(heads, dtype=torch.bool)
        for linear in (attention.query, attention.key, attention.value):
            rows_of_head = linear.weight.view(heads, D * linear.weight.shape[1])
            kept &= (rows_of_head != 0).any(dim=1).cpu()
        at_least = min(1, heads)
        left.append(max(at_least, int(kept.sum())))
    return left


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def number_list(values: list[float]) -> str:
    """A list in JSON, fifty numbers a line, each as short as it can be."""
    words = [f"{value:g}" for value in values]
    lines = [",".join(words[first:first + 50]) for first in range(0, len(words), 50)]
    return "[" + ",\n".join(lines) + "]"


def four_digits(number: str) -> float:
    return float(f"{float(number):.4g}")


def keep(run: Path, kept: Path) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    model = load_model(run)
    results = read(run / "results.json")
    # Sizes, of a model that compact.py --compare has not counted and timed.
    if "flops_ratio" not in results:
        dense = dataclasses.replace(model.config, heads=None, ffn=None)
        results |= size_of(model)
        results["flops_ratio"] = flops(dense, 128) / flops(model.config, 128)
    masked = (run / "pruning.safetensors").exists()
    if masked:
        results["heads_authors_rule"] = heads_authors_rule(model)
    (kept / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if (run / "f1.json").exists():
        text = number_list(read(run / "f1.json").values()) + "\n"
        (kept / "f1.json").write_text(text, encoding="utf-8")
    if (run / "masks.json").exists():
        shutil.copy(run / "masks.json", kept)
    if (run / "log.jsonl").exists():
        shutil.copy(run / "run.json", kept)
    if not masked:
        return

    # The log is thinned from its end, so that the last line stays.
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line, parse_float=four_digits) for line in lines]
    every = math.ceil(len(log) / 200)
    thinned = log[::-every][::-1]
    text = "".join(json.dumps(line) + "\n" for line in thinned)
    (kept / "log.jsonl").write_text(text, encoding="utf-8")
    moments = [read(path) for path in run.parent.glob(f"{run.name}-moments/*.json")]
    if moments:
        text = json.dumps(six(moments, log)) + "\n"
        (kept / "moments.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
