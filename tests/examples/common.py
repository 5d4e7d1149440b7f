"""What the examples share: a made-up task, and an ordinary training loop with pruning added."""
import torch
from torch.nn.utils import parametrize

import blockprune

MARKS = 4           # tokens 0 to 3, the labels
WORDS = 40          # all tokens, marks among them
LENGTH = 16         # tokens in a sentence


def sentences(n):
    """n random sentences, (n, LENGTH), with one mark each, and the marks, (n,)."""
    tokens = torch.randint(MARKS, WORDS, (n, LENGTH))
    label = torch.randint(MARKS, (n,))
    place = torch.randint(LENGTH, (n,))
    tokens[torch.arange(n), place] = label
    return tokens, label


def fine_prune(model, batch_loss, steps, lr, lambdas):
    """Train a model with masks. What pruning adds is numbered.

    batch_loss: draws a batch and returns its loss.
    lambdas: λ by the kind of weight. The higher, the less is kept.
    """
    model.train()
    # 1. Scores get a learning rate of their own, higher than that of the weights: 1e-2 in the
    #    paper, more in runs as short as these.
    groups = blockprune.parameter_groups(model, lr, score_lr=5e-2)
    optimizer = torch.optim.Adam(groups)
    for step in range(steps):
        # 2. The threshold: 0 for the first 5 % of the steps, 0.1 for the last 50 %.
        tau = blockprune.threshold_schedule(step, steps, flat_start=0.05 * steps,
                                            flat_end=0.5 * steps)
        blockprune.set_threshold(model, tau)
        # Some modules read a weight several times. Cached, one mask serves all of them.
        with parametrize.cached():
            loss = batch_loss()
        # 3. The penalty pushes scores down. All λ follow the threshold.
        loss = loss + tau / 0.1 * blockprune.penalty(model, lambdas)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
