"""Compiling for an H100 on a machine that has none: it wants jax[cuda]'s plugin, no device and no driver."""

import importlib.util
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536
 registers_per_block_limit: 65536 } platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
 runtime_version { major: 13 minor: 0 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3" """


def compiled(fn: Any, *shapes: Any) -> Any:
    """fn compiled for CUDA; skips the test where the plugin is missing."""
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13)):
        pytest.skip("compiling for CUDA wants the plugin of jax[cuda]")
    try:
        chip = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    except NotImplementedError:  # the plugin found no driver, and was not told to leave it alone
        pytest.skip("compiling for CUDA without a GPU wants JAX_PLATFORMS=cpu")
    mesh = topologies.make_mesh(chip, (1,), ("x",))
    where = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s in shapes)).compile()
