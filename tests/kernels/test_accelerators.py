"""`dot` of a program for a GPU or a TPU is their kernel, from packed weights and from prepacked ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import qjax


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="this JAX lowers no custom partitioning for a device that is not there"
)
@pytest.mark.parametrize(
    "name, platform, kind, target, call",
    [
        ("Q4_0", "gpu", "NVIDIA H100", "cuda", "mosaic_gpu"),
        ("Q4_0", "tpu", "TPU v5e", "tpu", "tpu_custom_call"),
        ("E8P_2", "gpu", "NVIDIA H100", "cuda", "mosaic_gpu"),
    ],
)
def test_dot_is_lowered_to_the_kernel(rng, name, platform, kind, target, call):
    q = qjax.quantize(jnp.asarray(rng.standard_normal((64, 256)), jnp.float32), name)
    chip = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    ready, inputs = qjax.prepack(q, platform=target), (jnp.ones((4, 256), jnp.bfloat16), jnp.ones((4, 256)))
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        for weights in (q, ready):
            for x in inputs:
                program = jax.jit(lambda x, q: qjax.dot(x, q, "pallas")).trace(x, weights)
                assert call in program.lower(lowering_platforms=(target,)).as_text()
        for weights, there in ((q, False), (ready, True)):  # laid out at each call only where it is asked for
            program = jax.jit(qjax.dot).trace(inputs[0], weights)
            assert (call in program.lower(lowering_platforms=(target,)).as_text()) == there
        backward = jax.jit(jax.grad(lambda x, q: qjax.dot(x, q).sum())).trace(inputs[1], ready)
        assert "dot_general" in backward.lower(lowering_platforms=(target,)).as_text()
    np.testing.assert_array_equal(qjax.dequantize(ready), qjax.dequantize(q))


def test_a_gpu_that_is_no_hopper_has_no_kernel():
    chip = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
    q, x = qjax.quantize(jnp.ones((64, 256)), "Q4_0"), jnp.ones((1, 256))
    with (
        use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)),
        pytest.raises(qjax.errors.UserError, match="A100-SXM4-80GB is no Hopper"),
    ):
        jax.jit(lambda x, q: qjax.dot(x, q, "pallas")).trace(x, q)
