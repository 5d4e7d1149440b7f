"""A layer has sixteen blocks of weights, but only four matter. The learned mask finds them.

Needs torch alone: python tests/examples/planted.py
"""
import sys
sys.path.append(sys.path[0] + "/../..")     # the folder of blockprune.py

import torch
from torch import nn
import blockprune

# The data: the output of a network whose first weight is 0 except in four blocks of 8 × 8.
torch.manual_seed(0)
planted = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
useful = planted.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)    # (32, 32)
W = torch.randn(32, 32) * useful
x = torch.randn(512, 32)
readout = nn.Linear(32, 16).requires_grad_(False)
y = readout(torch.relu(x @ W.T))
model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), readout)

# 1. Before the optimiser is made: a mask with one score for each block of the first weight.
mask = blockprune.mask_weight(model[0], (8, 8))
# 2. Scores get a learning rate of their own.
optimizer = torch.optim.Adam(blockprune.parameter_groups(model, lr=1e-2, score_lr=3e-2))
for step in range(400):
    # 3. The threshold τ rises from 0 to 0.1. A block is masked where σ(score) ≤ τ.
    tau = blockprune.threshold_schedule(step, 400, flat_start=20, flat_end=200)
    blockprune.set_threshold(model, tau)
    loss = nn.functional.mse_loss(model(x), y)
    # 4. A penalty, of weight 10 τ, pushes all scores down; the loss keeps useful ones up.
    objective = loss + 10 * tau * blockprune.penalty(model)
    optimizer.zero_grad()
    objective.backward()
    optimizer.step()
print("planted:", planted.tolist())
print("found:  ", mask.block_mask().int().tolist())
print(f"error: {loss / y.var():.4f} of the variance")
# 5. Masked blocks become zeros, and the layer is a plain nn.Linear again.
blockprune.bake(model)
