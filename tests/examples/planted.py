"""Only four of the sixteen blocks of an MLP's first layer matter; the learned mask finds them."""
import torch
from blockprune import bake, mask_weight, parameter_groups, penalty, set_threshold, threshold_schedule

torch.manual_seed(0)
planted = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
W = torch.randn(32, 32) * planted.repeat_interleave(8, 0).repeat_interleave(8, 1)
x, readout = torch.randn(512, 32), torch.nn.Linear(32, 16).requires_grad_(False)
y = readout(torch.relu(x @ W.T))
model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), readout)

mask = mask_weight(model[0], (8, 8))                                            # 1
optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2, score_lr=3e-2))   # 2
for step in range(400):
    tau = threshold_schedule(step, 400, flat_start=20, flat_end=200)
    set_threshold(model, tau)                                                   # 3
    loss = torch.nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    (loss + 10 * tau * penalty(model)).backward()                               # 4: λ = 1 at the final τ of 0.1
    optimizer.step()
found = mask.block_mask().int()
bake(model)                                                                     # 5: plain modules again
print(f"planted: {planted.tolist()}\nfound:   {found.tolist()}\nerror: {loss / y.var():.4f} of the variance")
