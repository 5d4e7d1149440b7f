"""Fine-prune a convolutional net: whole channels in one layer, single filters in the next.

The weight of a convolution is (out, in, kh, kw). Pruning sees it as the matrix weight.flatten(1),
which is (out, in · kh · kw). There a block of 1 × (in · kh · kw) is an output channel, and a block
of 1 × (kh · kw) is the filter between one input and one output.

The task is to tell upright stripes from level ones. Few of the twelve channels of the first layer
are needed for that.
"""
import torch
from torch import nn

import blockprune


def stripes(n):
    """n noisy images, (n, 1, 8, 8), and their labels: 0 for upright stripes, 1 for level ones."""
    label = torch.randint(2, (n,))
    # One row of upright stripes is 1, −1, 1, −1 …, or the same with the other sign.
    row = torch.tensor([1.0, -1.0]).repeat(4)           # (8,)
    sign = torch.randn(n, 1, 1).sign()
    upright = row.expand(n, 8, 8) * sign                # (n, 8, 8)
    level = upright.transpose(1, 2)
    is_level = label.view(n, 1, 1) == 1
    image = torch.where(is_level, level, upright)
    image = image + 0.5 * torch.randn(n, 8, 8)
    return image.unsqueeze(1), label


def fine_prune(model, steps):
    """An ordinary training loop; comments stand at what pruning adds."""
    # Scores get a learning rate of their own, higher than that of the weights.
    groups = blockprune.parameter_groups(model, lr=5e-3, score_lr=5e-2)
    optimizer = torch.optim.Adam(groups)
    for step in range(steps):
        image, label = stripes(64)

        # The threshold: 0 for the first 5 % of the steps, 0.1 for the last 50 %.
        tau = blockprune.threshold_schedule(step, steps, flat_start=steps // 20,
                                            flat_end=steps // 2)
        blockprune.set_threshold(model, tau)

        loss = nn.functional.cross_entropy(model(image), label)

        # The penalty pushes scores down. Its weight λ follows the threshold, up to 0.5.
        loss = loss + 5 * tau * blockprune.penalty(model)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    torch.manual_seed(0)
    conv1 = nn.Conv2d(1, 12, 3)
    conv2 = nn.Conv2d(12, 8, 3)
    head = nn.Linear(8, 2)
    model = nn.Sequential(
        conv1,                          # (n, 12, 6, 6)
        nn.ReLU(),
        conv2,                          # (n, 8, 4, 4)
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),        # (n, 8, 1, 1)
        nn.Flatten(),
        head,                           # (n, 2)
    )

    # In a layer with one input, a block of 1 × 9 is a channel: 12 scores.
    channels = blockprune.mask_weight(conv1, (1, 9), kind="channels")
    # In a layer with twelve, it is one filter of 3 × 3: 8 · 12 scores.
    blockprune.mask_weight(conv2, (1, 9), kind="filters")
    fine_prune(model, 400)
    kept = blockprune.density(model)
    channels_left = int(channels.block_mask().sum())
    # Masked weights become zeros, in ordinary convolutions.
    blockprune.bake(model)

    image, label = stripes(1000)
    predicted = model(image).argmax(dim=1)
    right = (predicted == label).float().mean().item()
    print(f"right: {right:.3f}")
    print(f"left: {channels_left} of 12 channels, {kept['filters']:.2f} of the filters")
    return right, channels_left, kept


if __name__ == "__main__":
    main()
