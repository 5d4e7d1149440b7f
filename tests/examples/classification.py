"""Prune a text classifier that is made of torch.nn.TransformerEncoder. Needs torch alone.

The paper's case of MNLI, QQP and SST-2, in small: which of four marks is in a sentence? The method
is Hybrid. The feed-forward layers really get smaller. Attention keeps its size, with zeros in it:
nn.MultiheadAttention cuts one matrix evenly among all heads, and so cannot lose one.
"""
import sys
sys.path.append(sys.path[0] + "/../..")     # the folder of blockprune.py

import torch
from torch import nn

import blockprune
from common import LENGTH, MARKS, WORDS, fine_prune, sentences

E = 64              # hidden size
INNER = 128         # inner dimensions of a feed-forward layer


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, E)
        layer = nn.TransformerEncoderLayer(E, nhead=4, dim_feedforward=INNER, dropout=0.0,
                                           batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(E, MARKS)

    def forward(self, tokens):                      # (B, LENGTH)
        x = self.encoder(self.embed(tokens))        # (B, LENGTH, E)
        return self.head(x.mean(dim=1))             # (B, MARKS)


def main():
    torch.manual_seed(0)
    model = Classifier()
    layers = model.encoder.layers
    for layer in layers:
        # Query, key and value are one matrix, and neither it nor its bias has the usual name.
        blockprune.mask_weight(layer.self_attn, (16, 16), weight="in_proj_weight",
                               bias="in_proj_bias", kind="attention")
        blockprune.mask_weight(layer.self_attn.out_proj, (16, 16), kind="attention")
        # One score for each inner dimension: a row of linear1 and a column of linear2.
        blockprune.mask_dimensions(layer.linear1, layer.linear2, kind="ffn")

    def batch_loss():
        tokens, label = sentences(32)
        return nn.functional.cross_entropy(model(tokens), label)

    fine_prune(model, batch_loss, steps=150, lr=2e-3, lambdas={"attention": 4.0, "ffn": 4.0})
    kept = blockprune.density(model)
    # Masked weights become zeros; then empty inner dimensions are removed.
    blockprune.bake(model)
    widths = []
    for layer in layers:
        left = blockprune.cut_dimensions(layer.linear1, layer.linear2, layer.activation)
        widths.append(len(left))

    tokens, label = sentences(1000)
    accuracy = (model(tokens).argmax(dim=1) == label).float().mean()
    print(f"accuracy: {accuracy:.3f}")
    print(f"kept: {kept['attention']:.2f} of attention, {kept['ffn']:.2f} of the FFN")
    print(f"left: {widths} of {INNER} inner dimensions")


if __name__ == "__main__":
    main()
