"""pairs.py: partners against the pseudoinverse, and what a rotation makes of a change against dense least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import made_by_rotation

from loft_rs.pairs import ieee_products, paired_basis, preimages, rotation_makes


@given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    parts=st.integers(1, 3),
    columns=st.integers(1, 5),
    scale=st.sampled_from([1e-8, 1.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_preimages_are_the_pseudoinverse_s_of_a_weight_of_few_singular_values(m, n, parts, columns, scale, seed):
    draw = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(draw.normal(size=(m * parts, n)), full_matrices=False)
    # As many different singular values as CGLS takes steps, some of them zero: it ends at the pseudoinverse.
    w = scale * (u * draw.choice([0.0, 0.5, 1.0, 2.0, 3.0], len(vt))) @ vt
    images = draw.normal(size=(m * parts, columns))
    images[:, 0] -= w @ np.linalg.lstsq(w, images[:, 0], rcond=1e-9)[0]  # W0 does not reach it
    blocks = [[torch.from_numpy(block) for block in np.split(each, parts)] for each in (w, images)]
    found = preimages(*blocks).numpy()
    wanted = np.linalg.pinv(w, rcond=1e-9) @ images
    np.testing.assert_allclose(found, wanted, atol=1e-9 * np.abs(images).max() / scale)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_preimages_in_float32_of_any_scale_and_without_full_rank(scale):
    draw = np.random.default_rng(0)
    w = draw.normal(size=(96, 20)) @ draw.normal(size=(20, 96)) / 40
    images = draw.normal(size=(96, 5))
    found = preimages([torch.from_numpy(scale * w).float()], [torch.from_numpy(images).float()])
    wanted = np.linalg.pinv(w, rcond=1e-9) @ images
    # 16 steps on a spectrum of condition 10: what is left is as small as float32's own error.
    np.testing.assert_allclose(found.double().numpy() * scale, wanted, atol=1e-3 * np.abs(wanted).max())


def test_products_are_float32_s_own_for_a_while():
    settings = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"
    held = getattr(settings, name)
    with pytest.raises(OSError, match="disk"), ieee_products():
        assert getattr(settings, name) in ("ieee", False)
        raise OSError("disk")
    assert getattr(settings, name) == held


def test_a_pair_makes_a_change_that_its_right_singular_vectors_do_not():
    draw = np.random.default_rng(0)
    w, u, v = draw.normal(size=(40, 64)), draw.normal(size=(40, 2)), draw.normal(size=(64, 2))
    d = u @ v.T
    u, _, vt = np.linalg.svd(d)
    y = preimages([torch.from_numpy(w)], [torch.from_numpy(u[:, :2])]).numpy()
    paired = paired_basis(vt[:2].T, y, 4)
    alone = np.linalg.qr(vt[:4].T)[0]
    made = [rotation_makes(w @ p, d @ p) / np.sum(d**2) for p in (paired, alone)]
    assert made[0] == pytest.approx(made_by_rotation(w, paired, d), rel=1e-9)
    assert made[0] >= 0.3 and made[1] <= 0.06
