"""The words that messages share, and how the package answers a name that it lacks."""

import subprocess
import sys

import pytest

import loft_rs
from loft_rs._words import count, did_you_mean, how_to_install, some


def test_counts_and_lists():
    assert [count(n, "pass") for n in (0, 1, 2)] == ["0 passes", "1 pass", "2 passes"]
    assert [count(n, "support") for n in (1, 3)] == ["1 support", "3 supports"] and count(2, "batch") == "2 batches"
    assert some(["a", "b", "c", "d"]) == "a, b, c, d" and some(list("abcde")) == "a, b, c and 2 more"
    assert did_you_mean("lora_facotrs", ["lora_factors", "narrow"]) == "; did you mean lora_factors?"
    assert did_you_mean("qqq", ["lora_factors"]) == ""


def test_a_slip_in_a_public_name_is_answered():
    with pytest.raises(AttributeError, match=r"no attribute 'lora_facotrs'; did you mean lora_factors\?"):
        loft_rs.lora_facotrs  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute '__wrapped__'$"):
        loft_rs.__wrapped__  # noqa: B018


@pytest.mark.parametrize(
    ("line", "needs"),
    [
        ("import loft_rs.nn", "loft_rs.nn needs torch"),
        ("from loft_rs import nn", "loft_rs.nn needs torch"),
        ("from loft_rs import export_lora", "loft_rs.export_lora needs torch"),
    ],
)
def test_without_torch_the_way_to_install_it_is_named(line, needs):
    source = f"import sys\nsys.modules['torch'] = None\n{line}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ") and needs in last and last.endswith(how_to_install("train"))
    assert how_to_install("train") == 'pip install ".[train]" in a clone of loft_rs'
