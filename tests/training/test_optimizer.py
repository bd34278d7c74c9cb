import itertools

import torch
from torch import nn

from smolseek.config import TrainSettings
from smolseek.training.optimizer import build_optimizer, learning_rate


def test_warm_up_then_cosine_to_the_final_share():
    settings = TrainSettings(steps=101, warmup_steps=10, learning_rate=1.0, final_learning_rate_share=0.1)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 <= rates[-1] < 0.101


def test_only_matrices_decay():
    optimizer = build_optimizer(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), TrainSettings())
    decayed, free = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 3)] and decayed["weight_decay"] > 0
    assert all(p.dim() == 1 for p in free["params"]) and free["weight_decay"] == 0
    assert torch.is_tensor(decayed["params"][0])
