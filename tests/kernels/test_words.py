"""Decodes: what their instructions compute, and how many they are."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from counted import Counted
from jax import lax

from qjax.formats import format
from qjax.kernels.layouts.coding import coding
from qjax.kernels.layouts.planar import block_of
from qjax.kernels.layouts.planes import SPLIT, WORD, pack_plane
from qjax.kernels.mosaic_gpu.product import decoder
from qjax.kernels.mosaic_gpu.words import AND_OR, CHOOSE, Arrays, pair

RUN = 16
CODED = ["Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q5_K", "Q6_K", "Q8_0", "uint8_g128", "IQ4_NL", "NF4", "MXFP4", "TQ2_0"]


@pytest.mark.parametrize("name", CODED)
def test_every_code_in_every_run_is_its_level(name, rng):
    code = coding(format(name))
    u = jnp.asarray(rng.integers(0, 2**code.bits, (64, block_of(code.bits, RUN)), np.uint8))
    planes = [pack_plane((u >> shift) & (2**bits - 1), bits, RUN) for bits, shift in SPLIT[code.bits]]
    expected = np.asarray(code.values(u).astype(jnp.bfloat16).astype(jnp.float32))
    assert len(np.unique(u)) == 2**code.bits
    for run in range(u.shape[1] // RUN):
        blocks = [run // (WORD // bits) for bits, _ in SPLIT[code.bits]]
        words = [p[:, RUN * at : RUN * at + RUN].reshape(64, -1, 2) for p, at in zip(planes, blocks, strict=True)]
        out = decoder(code)(Arrays(), [lax.bitcast_convert_type(w, jnp.uint32) for w in words], run)
        made = lax.bitcast_convert_type(out, jnp.bfloat16).reshape(64, RUN).astype(jnp.float32)
        np.testing.assert_array_equal(made, expected[:, RUN * run : RUN * run + RUN], err_msg=f"run {run}")


@pytest.mark.parametrize(
    "name, most",
    [("Q2_K", 1.125), ("Q4_0", 1.375), ("Q3_K", 2.1), ("Q5_K", 2.4), ("Q6_K", 2.4), ("Q8_0", 1.75), ("NF4", 3.5)],
)
def test_instructions_a_weight_are_those_of_the_budget(name, most):
    code, ops = coding(format(name)), Counted()
    runs = block_of(code.bits, RUN) // RUN
    for run in range(runs):
        decoder(code)(ops, [("w", p, run // (WORD // bits)) for p, (bits, _) in enumerate(SPLIT[code.bits])], run)
    a_weight = len(ops.made) / (2 * runs)
    assert most - 0.2 < a_weight <= most


def test_lop3_and_prmt_are_ptx(rng):
    a, b, c = (rng.integers(0, 2**32, 64, np.uint32) for _ in range(3))
    ops = Arrays()
    for truth in (AND_OR, CHOOSE, 0x96):
        expected = np.zeros_like(a)
        for i, j, k in itertools.product((0, 1), repeat=3):
            bit = truth >> (4 * i + 2 * j + k) & 1
            expected |= bit * ((a if i else ~a) & (b if j else ~b) & (c if k else ~c))
        np.testing.assert_array_equal(ops.lop3(*map(jnp.asarray, (a, b, c)), truth), expected)
    np.testing.assert_array_equal(expected, a ^ b ^ c)
    eight = np.concatenate([x.view(np.uint8).reshape(-1, 4) for x in (a, b)], axis=1)
    select = c & 0x7777
    at = (select[:, None] >> np.arange(0, 16, 4)) & 7
    expected = np.take_along_axis(eight, at.astype(np.int64), axis=1).copy().view(np.uint32)[:, 0]
    np.testing.assert_array_equal(ops.prmt(*map(jnp.asarray, (a, b, select))), expected)


def test_pairs_are_bfloat16():
    assert pair(1.0) == 0x3F803F80 and pair(-136.0) == 0xC308C308
    with pytest.raises(AssertionError, match="no bfloat16"):
        pair(257.0)
