"""docs/api.md names every public name, and no other."""

import re
from pathlib import Path

import pytest

import loft_rs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"


def test_every_public_name_is_on_the_page():
    if not PAGE.is_file():
        pytest.skip("needs the checkout's docs")
    cells = re.findall(r"^\| (`[^|]*`) \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(loft_rs.__all__)
