"""Fine-prune a text classifier that is made of torch.nn.TransformerEncoder.

The paper's case of MNLI, QQP and SST-2, in small: which of four marks is in a sentence of 16
tokens? The method is Hybrid: blocks in attention, inner dimensions in the feed-forward layers. More
than half of the weights go, and the accuracy stays.

The feed-forward layers really get smaller. Attention keeps its size and has zeros instead:
nn.MultiheadAttention cuts one matrix evenly among all heads, and so cannot lose one. To be faster
there too, a model needs attention of its own, as in bert.py.
"""
import torch
from torch import nn
from torch.nn.utils import parametrize

import blockprune

MARKS = 4           # tokens 0 to 3, the labels
WORDS = 40          # all tokens, marks among them
LENGTH = 16         # tokens in a sentence
E = 64              # hidden size
INNER = 128         # inner dimensions of a feed-forward layer


# ------------------------------------------------------------------------ an ordinary fine-tuning


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, E)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, E))
        layer = nn.TransformerEncoderLayer(E, nhead=4, dim_feedforward=INNER, dropout=0.0,
                                           batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(E, MARKS)

    def forward(self, tokens):                      # (B, LENGTH)
        x = self.embed(tokens) + self.position      # (B, LENGTH, E)
        x = self.encoder(x)
        return self.head(x.mean(dim=1))             # (B, MARKS)


def sentences(n):
    """n random sentences with one mark each, and the marks."""
    tokens = torch.randint(MARKS, WORDS, (n, LENGTH))
    label = torch.randint(MARKS, (n,))
    place = torch.randint(LENGTH, (n,))
    tokens[torch.arange(n), place] = label
    return tokens, label


def fine_tune(model, steps):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        tokens, label = sentences(32)
        loss = nn.functional.cross_entropy(model(tokens), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model):
    model.eval()
    torch.manual_seed(1)
    tokens, label = sentences(1000)
    predicted = model(tokens).argmax(dim=1)
    return (predicted == label).float().mean().item()


# ------------------------------------------------------------------------------ what pruning adds


def add_masks(model):
    for layer in model.encoder.layers:
        attention = layer.self_attn
        # Query, key and value are one matrix, and neither it nor its bias has the usual name.
        blockprune.mask_weight(attention, (16, 16), weight="in_proj_weight", bias="in_proj_bias",
                               kind="attention")
        blockprune.mask_weight(attention.out_proj, (16, 16), kind="attention")
        # One score for each inner dimension: a row of linear1 and a column of linear2.
        blockprune.mask_dimensions(layer.linear1, layer.linear2, kind="ffn")


def fine_prune(model, steps):
    """fine_tune() with masks; comments stand at what is new."""
    model.train()
    # Scores get a learning rate of their own, higher than that of the weights.
    groups = blockprune.parameter_groups(model, lr=2e-3, score_lr=5e-2)
    optimizer = torch.optim.Adam(groups)
    for step in range(steps):
        tokens, label = sentences(32)

        # The threshold: 0 for the first 5 % of the steps, 0.1 for the last 50 %.
        tau = blockprune.threshold_schedule(step, steps, flat_start=steps // 20,
                                            flat_end=steps // 2)
        blockprune.set_threshold(model, tau)

        # MultiheadAttention reads its weight several times: cached, one mask serves all of them.
        with parametrize.cached():
            loss = nn.functional.cross_entropy(model(tokens), label)

        # The penalty pushes scores down. Its weight λ follows the threshold, up to 0.5.
        loss = loss + 5 * tau * blockprune.penalty(model)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    torch.manual_seed(0)
    model = Classifier()
    fine_tune(model, 60)
    dense = accuracy(model)

    add_masks(model)
    fine_prune(model, 150)
    kept = blockprune.density(model)
    masked = accuracy(model)

    # Masked weights become zeros; then empty inner dimensions are removed.
    blockprune.bake(model)
    widths = []
    for layer in model.encoder.layers:
        left = blockprune.cut_dimensions(layer.linear1, layer.linear2, layer.activation)
        widths.append(len(left))
    cut = accuracy(model)

    print(f"accuracy: {dense:.3f} dense, {masked:.3f} with masks, {cut:.3f} cut")
    print(f"weights kept: {kept['attention']:.2f} of attention, {kept['ffn']:.2f} of FFN")
    print(f"inner dimensions left: {widths} of {INNER}")
    return dense, masked, cut, kept, widths


if __name__ == "__main__":
    main()
