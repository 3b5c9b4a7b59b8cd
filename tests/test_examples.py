"""Every public name shows how it is used, and what its docstring shows runs and prints that."""

from __future__ import annotations

import doctest
import inspect
import warnings

import peft
import pytest
import torch
from page_setups import matrices
from reference import make_llama, token_batches

import loft_rs

# What is returned by others, raised, a module, or PEFT's own class to be found by it.
NOT_CALLED = {"CalibrationReport", "LoftModel", "NarrowReport", "NonFiniteError", "SplitHalf", "linalg", "nn"}
NAMES = sorted({*loft_rs.__all__} - NOT_CALLED)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {each: getattr(loft_rs, each) for each in loft_rs.__all__} | matrices()
    given |= {"loft_rs": loft_rs, "torch": torch, "get_peft_model": peft.get_peft_model, "OFTConfig": peft.OFTConfig}
    given |= {"load_base": make_llama, "batches": token_batches(4), "model": make_llama()}
    text = inspect.getdoc(getattr(loft_rs, name))
    test = doctest.DocTestParser().get_doctest(text, given, name, None, 0)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
