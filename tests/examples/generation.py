"""Fine-prune an encoder-decoder, torch.nn.Transformer with greedy decoding (the paper's CNN/DailyMail case), Hybrid.

The task is to write six symbols backwards. Encoder, self-attention and cross-attention of the decoder and the
feed-forward layers are kinds of their own, each with its λ; at least half of the weights go.
"""
import torch
from torch import nn
from torch.nn.utils import parametrize

from blockprune import (bake, cut_dimensions, density, mask_dimensions, mask_weight, parameter_groups, penalty, set_threshold,
                        threshold_schedule)

T, START, WORDS = 6, 10, 11                 # symbols 0 to 9, and a sign to start with
LAMBDAS = {"encoder": 0.3, "decoder": 0.3, "cross": 0.1, "ffn": 0.5}


class Writer(nn.Module):
    def __init__(self, E=64):
        super().__init__()
        self.embed, self.position = nn.Embedding(WORDS, E), nn.Parameter(torch.randn(2, T, E))
        self.transformer = nn.Transformer(E, nhead=4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=128,
                                          dropout=0.0, batch_first=True)
        self.head = nn.Linear(E, WORDS)

    def forward(self, read, written):       # (B, 6), (B, n) → (B, n, words)
        n = written.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(n)
        return self.head(self.transformer(self.embed(read) + self.position[0], self.embed(written) + self.position[1, :n],
                                          tgt_mask=causal, tgt_is_causal=True))

    @torch.no_grad()
    def greedy(self, read):
        written = torch.full((len(read), 1), START)
        for _ in range(T):
            written = torch.cat([written, self(read, written)[:, -1:].argmax(-1)], 1)
        return written[:, 1:]


def train(model, steps, prune=False):
    optimizer = torch.optim.Adam(parameter_groups(model, lr=2e-3, score_lr=5e-2))
    for step in range(steps):
        read = torch.randint(10, (64, T))
        target = read.flip(1)
        written = torch.cat([torch.full((64, 1), START), target[:, :-1]], 1)
        if prune:
            tau = threshold_schedule(step, steps, flat_start=steps // 20, flat_end=steps // 2)
            set_threshold(model, tau)
        with parametrize.cached():          # MultiheadAttention reads its weight several times: one mask serves all
            loss = nn.functional.cross_entropy(model(read, written).flatten(0, 1), target.flatten())
        if prune:
            loss = loss + tau / 0.1 * penalty(model, LAMBDAS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model):
    """The share of unseen sequences that are written without a mistake."""
    read = torch.randint(10, (500, T), generator=torch.Generator().manual_seed(1))
    return (model.eval().greedy(read) == read.flip(1)).all(1).float().mean().item()


def mask_attention(attention, kind):
    mask_weight(attention, (16, 16), weight="in_proj_weight", bias="in_proj_bias", kind=kind)
    mask_weight(attention.out_proj, (16, 16), kind=kind)


def main():
    torch.manual_seed(0)
    model = Writer()
    train(model, 160)
    dense, encoder, decoder = accuracy(model), model.transformer.encoder.layers, model.transformer.decoder.layers
    for layer in [*encoder, *decoder]:
        mask_attention(layer.self_attn, "encoder" if layer in encoder else "decoder")
        mask_dimensions(layer.linear1, layer.linear2)
    for layer in decoder:
        mask_attention(layer.multihead_attn, "cross")
    train(model.train(), 200, prune=True)
    kept = density(model)
    bake(model)
    widths = [cut_dimensions(layer.linear1, layer.linear2, layer.activation) for layer in [*encoder, *decoder]]
    pruned = accuracy(model)
    print(f"right {dense:.3f} dense, {pruned:.3f} pruned; kept " + ", ".join(f"{k} {d:.2f}" for k, d in kept.items())
          + f"; FFN widths {widths} of 128")
    return dense, pruned, kept, widths


if __name__ == "__main__":
    main()
