"""Sub-byte packing against numpy's own bit packer."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.formats.bits import pack_bits, unpack_bits


@pytest.mark.sampled(4)
@pytest.mark.parametrize("bits", range(1, 9))
def test_equals_the_little_endian_bit_stream(bits, rng):
    codes = rng.integers(0, 2**bits, (3, 40)).astype(np.uint8)
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    expected = np.packbits(stream.reshape(3, -1), axis=-1, bitorder="little")
    packed = pack_bits(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(unpack_bits(packed, bits), codes)


def test_a_row_must_end_on_a_byte():
    with pytest.raises(UserError, match="does not end on a byte"):
        pack_bits(jnp.zeros((2, 5), jnp.uint8), 3)
