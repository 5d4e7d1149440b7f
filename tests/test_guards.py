"""blockprune.py in other people's training code: it does what they expect, or says in a sentence why not.

In order: torch.func; the precision of scores; what is refused while training and in bake; shared scores in
checkpoints; layers with a gate, and heads cut by hand. Letters as in blockprune.py.
"""
import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import blockprune
from blockprune import (BlockMask, bake, cut_dimensions, cut_heads, density, mask_dimensions,
                        mask_weight, masks, parameter_groups, penalty, set_threshold)

DEAD = -9.0     # a score far below every τ


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scatter(model, threshold=0.4):
    """Spread each mask's scores over −2 … 2 in random order, so that some are dead and some alive."""
    for S in {id(mask.scores): mask.scores for mask in masks(model)}.values():
        order = torch.randperm(S.numel())
        S.data.copy_(torch.linspace(-2, 2, S.numel())[order].view_as(S))
    set_threshold(model, threshold)
    return model


# --------------------------------------------------------------------------------------- torch.func


def masked_net():
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 3))
    mask_weight(net[0], (2, 3), kind="attention")
    mask_dimensions(net[2], net[4])
    return scatter(net)


def loss_of(net, parameters, x):
    return torch.func.functional_call(net, parameters, (x,)).pow(2).sum()


def test_func_grad_is_backward():
    net = masked_net()
    x = torch.randn(4, 5)
    net(x).pow(2).sum().backward()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    grads = torch.func.grad(lambda p: loss_of(net, p, x))(parameters)
    for name, p in net.named_parameters():
        assert_close(grads[name], p.grad)


def test_vmap_of_grad_gives_each_sample_its_own_gradient():
    net = masked_net()
    x = torch.randn(4, 5)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    grad = torch.func.grad(lambda p, row: loss_of(net, p, row))
    each = torch.func.vmap(grad, in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        alone = grad(parameters, x[i])
        for name in parameters:
            assert_close(each[name][i], alone[name])


def test_vmap_over_scores_is_a_loop_over_masks():
    mask = BlockMask((5, 7), (2, 3))
    set_threshold(mask, 0.4)
    many = torch.randn(6, 3, 3)
    weight = torch.randn(5, 7)
    run = lambda S: torch.func.functional_call(mask, {"scores": S}, (weight,))
    expected = torch.stack([run(S) for S in many])
    assert torch.equal(torch.func.vmap(run)(many), expected)
