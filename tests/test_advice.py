"""advice.py: a rate to start from, an error where no run speaks, a warning where training starts far below."""

import warnings

import pytest

from loft_rs import Budget, LoftConfig, Pilot, suggest_lr
from loft_rs.advice import warn_of_low_rate


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
    with pytest.warns(UserWarning, match=r"suggest_lr gives 0\.001"):
        warn_of_low_rate(LoftConfig(r=64), 5e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_low_rate(LoftConfig(r=64), 4e-4)
