"""advice.py: a rate to start from, an error where no run speaks, a warning where training starts
far below.
"""

import warnings

import pytest
import torch

from loft_rs import Budget, LoftConfig, Pilot, suggest_lr
from loft_rs.advice import COSTS, rate_of, warn_of_low_rate


@pytest.mark.parametrize(
    "options, rate",
    [
        ({}, 0.001),
        ({"r": 32}, 0.002),
        ({"support": "gradsvd"}, 0.001),
        ({"support": "skewgrad"}, 0.00041),
        ({"support": Pilot(halves=True)}, 0.0025),
        ({"support": "pilot", "transform": "exp"}, 0.005),
        ({"transform": "cayley+magnitudes"}, 0.001),
    ],
)
def test_c_over_r(options, rate):
    assert suggest_lr(LoftConfig(**{"r": 64, **options})) == rate


@pytest.mark.parametrize(
    "config",
    [
        lambda: LoftConfig(support="random"),
        lambda: LoftConfig(support="activation"),
        lambda: LoftConfig(support="mine.safetensors"),
        lambda: LoftConfig(transform="free"),
        lambda: LoftConfig(r=Budget(params=1000), support="gradsvd"),
        LoftConfig.oft,
        LoftConfig.boft,
        LoftConfig.hra,
    ],
)
def test_where_no_run_speaks(config):
    with pytest.raises(ValueError, match="suggest_lr"):
        suggest_lr(config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_low_rate(config(), 1e-9)


def test_a_rate_far_below_is_warned_of():
    with pytest.warns(UserWarning, match=r"suggest_lr\(config\) gives 0\.001"):
        warn_of_low_rate(LoftConfig(r=64), 5e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_low_rate(LoftConfig(r=64), 4e-4)


def test_the_docstring_says_what_each_costs():
    for support, cost in COSTS.items():
        assert f"{support} .{round(1000 * cost):03d}" in suggest_lr.__doc__
    assert "suggest_lr" in LoftConfig.__doc__


def test_the_rate_is_that_of_an_adam_after_its_warm_up():
    mine, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [{"params": [other], "lr": 1.0}, {"params": [mine], "lr": 0.01}]
    adam = torch.optim.AdamW(groups)
    assert rate_of(adam, mine) == 0.01
    torch.optim.lr_scheduler.LambdaLR(adam, lambda step: step / 10)
    assert adam.param_groups[1]["lr"] == 0 and rate_of(adam, mine) == 0.01
    assert rate_of(adam, torch.nn.Parameter(torch.zeros(2))) is None
    assert rate_of(torch.optim.SGD([mine], lr=1e-9), mine) is None
