"""Fine-prune a convolutional net by output channels: blocks of 1 x (in · kh · kw).

A convolution's weight (out, in, kh, kw) is seen as the matrix weight.flatten(1), (out, in · kh · kw): a block of
that width is one channel, and (1, kh · kw) is one filter of one input. Only two of the twelve channels of the
first layer are needed to tell upright from level stripes.
"""
import torch
from torch import nn

from blockprune import bake, density, mask_weight, parameter_groups, penalty, set_threshold, threshold_schedule


def stripes(n):
    """Noisy images (n, 1, 8, 8) with upright (0) or level (1) stripes."""
    label = torch.randint(2, (n,))
    wave = torch.tensor([1.0, -1.0]).repeat(4).expand(n, 8, 8) * torch.randn(n, 1, 1).sign()
    image = torch.where(label[:, None, None] == 1, wave.transpose(1, 2), wave)
    return (image + 0.5 * torch.randn(n, 8, 8))[:, None], label


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 2))
    first = mask_weight(model[0], (1, 9), kind="channels")                      # 12 channels of 1 · 3 · 3 weights
    mask_weight(model[2], (1, 9), kind="filters")                               # 8 · 12 filters of 3 · 3
    optimizer = torch.optim.Adam(parameter_groups(model, lr=5e-3, score_lr=5e-2))
    for step in range(400):
        image, label = stripes(64)
        tau = threshold_schedule(step, 400, flat_start=20, flat_end=200)
        set_threshold(model, tau)
        loss = nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        (loss + 5 * tau * penalty(model)).backward()
        optimizer.step()
    kept, channels = density(model), int(first.block_mask().sum())
    bake(model)
    image, label = stripes(1000)
    right = (model(image).argmax(1) == label).float().mean().item()
    print(f"right {right:.3f} with {channels} of 12 channels and {kept['filters']:.2f} of the filters")
    return right, channels, kept


if __name__ == "__main__":
    main()
