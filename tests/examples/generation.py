"""Fine-prune an encoder-decoder, torch.nn.Transformer with greedy decoding.

The paper's case of CNN/DailyMail, in small: read six symbols and write them backwards. The method
is Hybrid, and more than half of the weights go. Four kinds of matrices have a λ each: attention of
the encoder, self-attention of the decoder, cross-attention, and the feed-forward layers.
"""
import torch
from torch import nn
from torch.nn.utils import parametrize

import blockprune

SYMBOLS = 10        # symbols 0 to 9
START = 10          # the token that every output begins with
TOKENS = 11         # all tokens, START among them
T = 6               # symbols in a sequence
E = 64              # hidden size
INNER = 128         # inner dimensions of a feed-forward layer

# λ at the final threshold, by kind: the higher, the less is kept.
LAMBDAS = {"encoder": 0.3, "decoder": 0.3, "cross": 0.1, "ffn": 0.5}
FINAL_TAU = 0.1


# ------------------------------------------------------------------------ an ordinary fine-tuning


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, E)
        self.position = nn.Parameter(torch.randn(2, T, E))      # 0: in the input, 1: in the output
        self.transformer = nn.Transformer(E, nhead=4, num_encoder_layers=1, num_decoder_layers=1,
                                          dim_feedforward=INNER, dropout=0.0, batch_first=True)
        self.head = nn.Linear(E, TOKENS)

    def forward(self, read, written):                           # (B, T), (B, n)
        n = written.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(n)
        source = self.embed(read) + self.position[0]            # (B, T, E)
        target = self.embed(written) + self.position[1, :n]     # (B, n, E)
        x = self.transformer(source, target, tgt_mask=causal, tgt_is_causal=True)
        return self.head(x)                                     # (B, n, TOKENS)

    @torch.no_grad()
    def greedy(self, read):
        """Write T symbols, always the likeliest."""
        written = torch.full((len(read), 1), START)
        for _ in range(T):
            last_logits = self(read, written)[:, -1:]           # (B, 1, TOKENS)
            following = last_logits.argmax(dim=-1)              # (B, 1)
            written = torch.cat([written, following], dim=1)
        return written[:, 1:]


def sequences(n):
    """n random sequences, what the decoder is shown, and what it should say next."""
    read = torch.randint(SYMBOLS, (n, T))
    target = read.flip(1)
    start = torch.full((n, 1), START)
    written = torch.cat([start, target[:, :-1]], dim=1)
    return read, written, target


def cross_entropy(logits, target):
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def fine_tune(model, steps):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        read, written, target = sequences(64)
        loss = cross_entropy(model(read, written), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model):
    """The share of unseen sequences that are written without a mistake."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    read = torch.randint(SYMBOLS, (500, T), generator=generator)
    right = model.greedy(read) == read.flip(1)                  # (500, T)
    return right.all(dim=1).float().mean().item()


# ------------------------------------------------------------------------------ what pruning adds


def mask_attention(attention, kind):
    # Query, key and value are one matrix, and neither it nor its bias has the usual name.
    blockprune.mask_weight(attention, (16, 16), weight="in_proj_weight", bias="in_proj_bias",
                           kind=kind)
    blockprune.mask_weight(attention.out_proj, (16, 16), kind=kind)


def add_masks(model):
    for layer in model.transformer.encoder.layers:
        mask_attention(layer.self_attn, "encoder")
        # One score for each inner dimension: a row of linear1 and a column of linear2.
        blockprune.mask_dimensions(layer.linear1, layer.linear2, kind="ffn")
    for layer in model.transformer.decoder.layers:
        mask_attention(layer.self_attn, "decoder")
        mask_attention(layer.multihead_attn, "cross")
        blockprune.mask_dimensions(layer.linear1, layer.linear2, kind="ffn")


def fine_prune(model, steps):
    """fine_tune() with masks; comments stand at what is new."""
    model.train()
    # Scores get a learning rate of their own, higher than that of the weights.
    groups = blockprune.parameter_groups(model, lr=2e-3, score_lr=5e-2)
    optimizer = torch.optim.Adam(groups)
    for step in range(steps):
        read, written, target = sequences(64)

        # The threshold: 0 for the first 5 % of the steps, final for the last 50 %.
        tau = blockprune.threshold_schedule(step, steps, flat_start=steps // 20,
                                            flat_end=steps // 2, final=FINAL_TAU)
        blockprune.set_threshold(model, tau)

        # MultiheadAttention reads its weight several times: cached, one mask serves all of them.
        with parametrize.cached():
            loss = cross_entropy(model(read, written), target)

        # The penalty pushes scores down, each kind's by its λ. All λ follow the threshold.
        loss = loss + tau / FINAL_TAU * blockprune.penalty(model, LAMBDAS)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    torch.manual_seed(0)
    model = Writer()
    fine_tune(model, 160)
    dense = accuracy(model)

    add_masks(model)
    fine_prune(model, 200)
    kept = blockprune.density(model)

    # Masked weights become zeros; then empty inner dimensions are removed.
    blockprune.bake(model)
    widths = []
    for stack in (model.transformer.encoder, model.transformer.decoder):
        for layer in stack.layers:
            left = blockprune.cut_dimensions(layer.linear1, layer.linear2, layer.activation)
            widths.append(len(left))
    pruned = accuracy(model)

    print(f"written without a mistake: {dense:.3f} dense, {pruned:.3f} pruned")
    print("weights kept:")
    for kind, fraction in kept.items():
        print(f"    {kind:8} {fraction:.2f}")
    print(f"inner dimensions left: {widths} of {INNER}")
    return dense, pruned, kept, widths


if __name__ == "__main__":
    main()
