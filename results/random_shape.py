"""Cuts a dense model at random to the shape of a compacted one: what is the learned choice worth?

    python results/random_shape.py DENSE COMPACT OUT [SEED]

Each layer keeps as many heads and inner dimensions as COMPACT has there, drawn at random from those
of DENSE. Train OUT as a compacted model: python train_squad.py --init OUT --fill.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bert import BertConfig, BertForQuestionAnswering, load_model, save_model   # noqa: E402
from compact import compact                                                     # noqa: E402


@torch.no_grad()
def random_shape(dense: BertForQuestionAnswering, shape: BertConfig,
                 seed: int) -> BertForQuestionAnswering:
    """The dense model with shape.heads and shape.ffn left in its layers."""
    generator = torch.Generator().manual_seed(seed)
    D = dense.config.head_size
    for i, layer in enumerate(dense.bert.layers):
        # What adds nothing is cut by compact(): a head with zero columns in out,
        order = torch.randperm(dense.config.heads[i], generator=generator)
        gone = order[shape.heads[i]:]
        for head in gone.tolist():
            columns = slice(head * D, (head + 1) * D)
            layer.attention.out.weight[:, columns] = 0
        # and an inner dimension with a zero column in fc2.
        order = torch.randperm(dense.config.ffn[i], generator=generator)
        gone = order[shape.ffn[i]:]
        layer.ffn.fc2.weight[:, gone] = 0
    return compact(dense)


if __name__ == "__main__":
    dense_folder, compact_folder, out = sys.argv[1:4]
    seed = 17
    if len(sys.argv) > 4:
        seed = int(sys.argv[4])
    shape = load_model(compact_folder).config
    small = random_shape(load_model(dense_folder), shape, seed)
    save_model(small, out, tokenizer_from=dense_folder)
    print(f"{out}: heads {small.config.heads}, inner dimensions {small.config.ffn}")
