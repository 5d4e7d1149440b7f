"""Cuts a dense model to the shape of a compacted one: what is the learned choice of parts worth?

    python results/cut_to_shape.py DENSE COMPACT OUT random|magnitude

Each layer keeps as many heads and inner dimensions as COMPACT has there: drawn at random, or those
with the largest weights. Train OUT as a compacted model: python train_squad.py --init OUT --fill.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bert import BertConfig, BertForQuestionAnswering, load_model, save_model   # noqa: E402
from compact import compact                                                     # noqa: E402


def squares(layer, heads: int) -> tuple[Tensor, Tensor]:
    """The sum of the squared weights of each head, and of each inner dimension."""
    a = layer.attention
    # A head is D rows of query, key and value, and D columns of out.
    rows = torch.cat([a.query.weight, a.key.weight, a.value.weight, a.out.weight.T], dim=1)
    of_heads = rows.pow(2).view(heads, -1).sum(1)       # (H · D, 4 · E) to (H, D · 4 · E) to (H,)
    # An inner dimension is a row of fc1 and a column of fc2.
    of_dimensions = layer.ffn.fc1.weight.pow(2).sum(1) + layer.ffn.fc2.weight.pow(2).sum(0)
    return of_heads, of_dimensions


@torch.no_grad()
def cut_to_shape(dense: BertForQuestionAnswering, shape: BertConfig,
                 by: str) -> BertForQuestionAnswering:
    """The dense model with shape.heads and shape.ffn left in its layers."""
    generator = torch.Generator().manual_seed(17)
    D = dense.config.head_size
    for i, layer in enumerate(dense.bert.layers):
        # The order in which parts stay.
        if by == "magnitude":
            heads, dimensions = squares(layer, dense.config.heads[i])
            heads = heads.argsort(descending=True)
            dimensions = dimensions.argsort(descending=True)
        else:
            heads = torch.randperm(dense.config.heads[i], generator=generator)
            dimensions = torch.randperm(dense.config.ffn[i], generator=generator)
        # What adds nothing is cut by compact(): a head with zero columns in out, an inner dimension
        # with a zero column in fc2.
        for head in heads[shape.heads[i]:].tolist():
            layer.attention.out.weight[:, head * D:(head + 1) * D] = 0
        layer.ffn.fc2.weight[:, dimensions[shape.ffn[i]:]] = 0
    return compact(dense)


if __name__ == "__main__":
    dense_folder, compact_folder, out, by = sys.argv[1:]
    small = cut_to_shape(load_model(dense_folder), load_model(compact_folder).config, by)
    save_model(small, out, tokenizer_from=dense_folder)
    print(f"{out}: heads {small.config.heads}, inner dimensions {small.config.ffn}")
