"""Learning rate, moving average and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from raysynth.core.evidence import Classifier
from raysynth.core.experiment import Generator
from raysynth.models.optim import ema_decay, learning_rate, make_ema, make_optimizer


def test_warm_up_then_constant() -> None:
    generator = Generator(lr=1.0, warmup_steps=4, steps=10)
    assert [learning_rate(generator, s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warm_up_then_half_a_cosine_to_zero() -> None:
    generator = Generator(lr=1.0, warmup_steps=2, steps=10, lr_schedule="cosine")
    rates = [learning_rate(generator, s) for s in range(10)]
    assert rates[1] == rates[2] == 1.0
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(generator, 10) == pytest.approx(0.0)


def test_moving_average_follows_its_recursion() -> None:
    model = torch.nn.Linear(3, 2)
    ema = make_ema(model, 0.5)
    expected = None
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(1.0 + step)
        ema.update_parameters(model)
        now = model.weight.detach().clone()
        # The first update copies; later ones decay by min(decay, (1 + n) / (10 + n)).
        decay = min(0.5, (1 + step) / (10 + step))
        expected = now if expected is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(ema.module.weight.detach(), expected)


def test_decay_warms_up() -> None:
    assert ema_decay(0.999, 0) == 0.1
    assert ema_decay(0.999, 10**6) == 0.999


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_optimizers_lower_a_quadratic(name: str) -> None:
    generator = Generator(optimizer=name, lr=0.05)  # type: ignore[arg-type]
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = make_optimizer(generator, [x])
    assert type(optimizer).__name__.lower() == name
    for _ in range(200):
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
    assert float(x.detach().abs().max()) < 0.2


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_is_torchs_with_nesterov_momentum_and_weight_decay(momentum: float) -> None:
    def steps(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> torch.Tensor:
        x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = make([x])
        for _ in range(3):
            optimizer.zero_grad()
            x.square().sum().backward()
            optimizer.step()
        return x.detach()

    section = Classifier(optimizer="sgd", lr=0.05, momentum=momentum, weight_decay=0.1)
    theirs = steps(lambda x: torch.optim.SGD(x, 0.05, momentum, weight_decay=0.1, nesterov=momentum > 0))
    assert torch.equal(steps(lambda x: make_optimizer(section, x)), theirs)


@pytest.mark.parametrize("buffers", [True, False])
def test_moving_average_is_torchs_bit_for_bit(buffers: bool) -> None:
    def average(kept: Any, new: Any, updates: Any) -> None:
        if kept[0].is_floating_point():
            torch._foreach_lerp_(kept, new, 1.0 - ema_decay(0.9, int(updates)))
        else:
            torch._foreach_copy_(kept, new)

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 3).double())
    theirs = AveragedModel(model, multi_avg_fn=torch.no_grad()(average), use_buffers=buffers)
    ours = make_ema(model, 0.9, buffers)
    for _ in range(5):
        with torch.no_grad():
            model[1](model[0](torch.randn(2, 1, 6, 6)))
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update_parameters(model)
        theirs.update_parameters(model)
    first, second = ours.state_dict(), theirs.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_moving_average_reads_nothing_from_the_device() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to("meta")  # nothing to be read there
    ema = make_ema(model, 0.5, buffers=True)
    for _ in range(3):
        ema.update_parameters(model)
    assert int(ema.n_averaged) == 3
