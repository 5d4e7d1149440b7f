"""Prune an encoder-decoder, torch.nn.Transformer with greedy decoding. Needs torch alone.

The paper's case of CNN/DailyMail, in small: read six symbols and write them backwards. The method
is Hybrid. Four kinds of matrices have a λ each: attention of the encoder, self-attention of the
decoder, cross-attention, and the feed-forward layers.
"""
import sys
sys.path.append(sys.path[0] + "/../..")     # the folder of blockprune.py

import torch
from torch import nn

import blockprune
from common import fine_prune

SYMBOLS = 10        # symbols 0 to 9
START = 10          # the token that every output begins with
T = 6               # symbols in a sequence
E = 64              # hidden size
INNER = 128         # inner dimensions of a feed-forward layer


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 1, E)
        self.position = nn.Parameter(torch.randn(2, T, E))      # 0: in the input, 1: in the output
        self.transformer = nn.Transformer(E, nhead=4, num_encoder_layers=1, num_decoder_layers=1,
                                          dim_feedforward=INNER, dropout=0.0, batch_first=True)
        self.head = nn.Linear(E, SYMBOLS)

    def forward(self, read, written):                           # (B, T), (B, n)
        n = written.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(n)
        source = self.embed(read) + self.position[0]            # (B, T, E)
        target = self.embed(written) + self.position[1, :n]     # (B, n, E)
        x = self.transformer(source, target, tgt_mask=causal, tgt_is_causal=True)
        return self.head(x)                                     # (B, n, SYMBOLS)

    @torch.no_grad()
    def greedy(self, read):
        """Write T symbols, always the likeliest."""
        written = torch.full((len(read), 1), START)
        for _ in range(T):
            last_logits = self(read, written)[:, -1:]           # (B, 1, SYMBOLS)
            written = torch.cat([written, last_logits.argmax(dim=-1)], dim=1)
        return written[:, 1:]


def mask_attention(attention, kind):
    # Query, key and value are one matrix, and neither it nor its bias has the usual name.
    blockprune.mask_weight(attention, (16, 16), weight="in_proj_weight", bias="in_proj_bias",
                           kind=kind)
    blockprune.mask_weight(attention.out_proj, (16, 16), kind=kind)


def main():
    torch.manual_seed(0)
    model = Writer()
    encoder = model.transformer.encoder.layers[0]
    decoder = model.transformer.decoder.layers[0]
    mask_attention(encoder.self_attn, "encoder")
    mask_attention(decoder.self_attn, "decoder")
    mask_attention(decoder.multihead_attn, "cross")
    for layer in (encoder, decoder):
        # One score for each inner dimension: a row of linear1 and a column of linear2.
        blockprune.mask_dimensions(layer.linear1, layer.linear2, kind="ffn")

    def batch_loss():
        read = torch.randint(SYMBOLS, (64, T))
        target = read.flip(1)
        # The decoder is shown what it should have written so far.
        start = torch.full((64, 1), START)
        written = torch.cat([start, target[:, :-1]], dim=1)
        logits = model(read, written)
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    lambdas = {"encoder": 1.0, "decoder": 1.0, "cross": 2.0, "ffn": 2.0}
    fine_prune(model, batch_loss, steps=250, lr=2e-3, lambdas=lambdas)
    kept = blockprune.density(model)
    # Masked weights become zeros; then empty inner dimensions are removed.
    blockprune.bake(model)
    widths = []
    for layer in (encoder, decoder):
        left = blockprune.cut_dimensions(layer.linear1, layer.linear2, layer.activation)
        widths.append(len(left))

    read = torch.randint(SYMBOLS, (500, T))
    right = (model.greedy(read) == read.flip(1)).all(dim=1)
    print(f"written without a mistake: {right.float().mean():.3f}")
    print(f"kept: {kept['encoder']:.2f} of attention in the encoder, "
          f"{kept['decoder']:.2f} in the decoder, {kept['cross']:.2f} across")
    print(f"left: {widths} of {INNER} inner dimensions")


if __name__ == "__main__":
    main()
