"""`loft-rs doctor`: what it names, and its status."""

import pytest

from loft_rs.cli import doctor, main


def test_it_names_versions_and_extras_and_everything_computes(capsys):
    pytest.importorskip("peft")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    said = {line[:22].strip(): line[22:].strip() for line in out.splitlines()}
    for name in (
        "python",
        "loft_rs",
        "torch",
        "peft",
        "transformers",
        "triton",
        "CUDA",
        "extra [train]",
        "extra [plot]",
    ):
        assert said[name]
    assert said["extra [train]"] == "complete" and out.endswith("all is well\n")
    for test in ("core, SVD", "layer on the CPU"):
        assert said[test].startswith("ok, relative error ")
    assert said["PEFT knows LOFT"].startswith("ok")


def test_what_fails_is_named_and_the_status_is_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "TOLERANCE", 0.0)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: ValueError: relative error " in out and out.rstrip().splitlines()[-1].endswith(
        ("failure", "failures")
    )


def test_an_old_package_fails_and_a_missing_one_does_not(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_tests", dict)
    monkeypatch.setattr(doctor, "_asked", lambda: {"numpy": ">=99", "torch": ">=2.4"})
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda package: None if package == "torch" else real(package))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: this loft_rs needs numpy>=99" in out and out.endswith("1 failure\n")
    assert 'extra [train]          without torch: pip install ".[train]" in a clone of loft_rs' in out
    monkeypatch.setattr(doctor, "_asked", dict)
    assert main(["doctor"]) == 0
