"""Fine-prune a classifier made of torch.nn.TransformerEncoder (the paper's MNLI, QQP and SST-2 case), Hybrid.

Which of four marks is in a sentence of 16 tokens? At least half of the weights go, and the feed-forward layers
really get smaller. nn.MultiheadAttention cannot lose heads: its projections are one matrix, cut evenly among all
heads, so that emptied heads stay as zeros. A model that is to get faster there needs attention of its own, as in bert.py.
"""
import torch
from torch import nn
from torch.nn.utils import parametrize

from blockprune import (bake, cut_dimensions, density, mask_dimensions, mask_weight, parameter_groups, penalty, set_threshold,
                        threshold_schedule)


class Classifier(nn.Module):
    def __init__(self, words=40, E=64, classes=4):
        super().__init__()
        self.embed, self.position = nn.Embedding(words, E), nn.Parameter(0.1 * torch.randn(16, E))
        layer = nn.TransformerEncoderLayer(E, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False), nn.Linear(E, classes)

    def forward(self, tokens):                                                  # (B, 16) → (B, classes)
        return self.head(self.encoder(self.embed(tokens) + self.position).mean(1))


def sentences(n):
    """Tokens 4 to 39, and a mark 0 to 3 somewhere: the label."""
    tokens, label = torch.randint(4, 40, (n, 16)), torch.randint(4, (n,))
    tokens[torch.arange(n), torch.randint(16, (n,))] = label
    return tokens, label


def train(model, steps, prune=False):
    optimizer = torch.optim.Adam(parameter_groups(model, lr=2e-3, score_lr=5e-2))
    for step in range(steps):
        tokens, label = sentences(32)
        if prune:
            tau = threshold_schedule(step, steps, flat_start=steps // 20, flat_end=steps // 2)
            set_threshold(model, tau)
        with parametrize.cached():          # MultiheadAttention reads its weight several times: one mask serves all
            loss = nn.functional.cross_entropy(model(tokens), label)
        if prune:
            loss = loss + 5 * tau * penalty(model)                              # λ = 0.5 at the final τ of 0.1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model):
    torch.manual_seed(1)
    tokens, label = sentences(1000)
    return (model.eval()(tokens).argmax(1) == label).float().mean().item()


def main():
    torch.manual_seed(0)
    model = Classifier()
    train(model, 60)
    dense = accuracy(model)
    for layer in model.train().encoder.layers:
        mask_weight(layer.self_attn, (16, 16), weight="in_proj_weight", bias="in_proj_bias", kind="attention")
        mask_weight(layer.self_attn.out_proj, (16, 16), kind="attention")
        mask_dimensions(layer.linear1, layer.linear2)
    train(model, 150, prune=True)
    kept, masked = density(model), accuracy(model)
    bake(model)
    widths = [cut_dimensions(layer.linear1, layer.linear2, layer.activation) for layer in model.encoder.layers]
    print(f"accuracy {dense:.3f} dense, {masked:.3f} pruned, {accuracy(model):.3f} cut; kept of attention "
          f"{kept['attention']:.2f}, of FFN {kept['ffn']:.2f}; FFN widths {widths} of 128")
    return dense, masked, accuracy(model), kept, widths


if __name__ == "__main__":
    main()
