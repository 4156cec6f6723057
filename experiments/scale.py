"""What calibrating a model takes that fits on no device: the real programs in the real shapes, compiled and not run.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 qjax run configs/scale.toml

Of Llama 3 70B on eight devices of one host: the walk's and the survey's own programs, as each device runs them on its
step of windows or its rows of a weight (`qjax.models.devices`, `qjax.pipeline.parts`), with abstract arrays; the
compiler says what a device holds. Of a mixture of 671 B weights on eight hosts (DeepSeek-V3's shapes,
arXiv:2412.19437): its expert layer as it would run, each host with an eighth of the experts and of the windows. What is
read and how long it takes is arithmetic: bytes over the disk's rate, products over the device's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block
from qjax.models.parts import run as forward
from qjax.models.stages import stages_of
from qjax.pipeline.inputs import observe_step
from qjax.pipeline.output_curvature import heights_of
from qjax.pipeline.passes import block_step, groups_of
from qjax.pipeline.survey import _head_step
from qjax.rounding import round_weight
from qjax.stats import Stats

LLAMA = DecoderConfig(
    vocab=128_256, dim=8192, hidden=28_672, layers=80, heads=64, kv_heads=8, head_dim=128, context=8192
)


ROWS = P("windows")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A layer of experts and the model around it."""

    vocab: int = 129_280
    dim: int = 7168
    expert: int = 2048  # width of one
    experts: int = 256
    chosen: int = 8
    layers: int = 61
    dense_layers: int = 3
    hidden: int = 18_432  # of those
    attention: int = 187_107_328  # weights of a layer's latent attention


@dataclasses.dataclass(frozen=True)
class Config:
    """How the text is cut, and what machines there are."""

    devices: int = 8  # virtual ones stand for devices, or for hosts
    windows: int = 512
    context: int = 2048
    batch: int = 2  # windows a step of a device
    disk: float = 3e9  # bytes a second of a host
    rate: float = 3e13  # float32 products a second of a device, half of them


def run(config: Config, out: Path) -> dict[str, Any]:
    """A row a program, and one a model."""
    if jax.device_count() != config.devices:
        raise UserError(f"{config.devices} devices are asked for, there are {jax.device_count()}: set XLA_FLAGS")
    programs = [*llama_programs(config), *mixture_programs(config)]
    return {"programs": programs, "models": [llama_row(config), mixture_row(config, Mixture())]}


def llama_programs(config: Config) -> list[dict[str, Any]]:
    """The programs that a block, and the head, of Llama 3 70B go through."""
    stages, tokens = stages_of(LLAMA), (config.batch, config.context)
    block, x = stages.blocks[0], _f32(*tokens, LLAMA.dim)
    params = jax.eval_shape(Block(LLAMA, 0).init, jax.random.key(0), jnp.zeros((1, 4, LLAMA.dim)), jnp.arange(4))
    weights = params["params"]
    groups = groups_of(block, weights, jax.ShapeDtypeStruct((1, config.context, LLAMA.dim), jnp.float32))
    keys = tuple(tuple(use.key for use in group) for group in groups)
    heights = heights_of((use for group in groups for use in group), LLAMA.head_dim)
    head = {"final_norm": {"scale": _f32(LLAMA.dim)}, "head": {"kernel": _f32(LLAMA.dim, LLAMA.vocab)}}
    seed, numbers = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct(tokens[:1], jnp.int32)
    made: list[tuple[str, Any, tuple[Any, ...]]] = [("a block forwards", forward, (block, weights, x))]
    for what, group in (("H of q, k and v", groups[0]), ("H of down", groups[-1])):
        static = (block, ((group[0].source, group[0].batch),), ("H",), 1)
        made.append((what, observe_step, (*static, weights, None, x, None, None)))
    made.append(("a block backwards", block_step, (block, keys, heights, (), weights, x, x)))
    made.append(("the head and its gradient", jax.jit(_head_step, static_argnums=0), (stages, head, seed, x, numbers)))
    rows = [_held("Llama 3 70B", what, program, *args) for what, program, args in made]
    recipe = qjax.recipe("gptq:Q4_K")
    assert recipe.format is not None

    def rounded(w: Any, H: Any) -> Any:
        return round_weight(w, recipe.format, recipe.roundings, Stats(H=H), recipe.damping)

    w, H = _f32(LLAMA.dim // config.devices, LLAMA.hidden), _f32(LLAMA.hidden, LLAMA.hidden)
    return [*rows, _held("Llama 3 70B", "down rounded by gptq to Q4_K", jax.jit(rounded), w, H)]


def mixture_programs(config: Config) -> list[dict[str, Any]]:
    """An expert layer of the mixture, and the statistics of its experts."""
    m, x = Mixture(), _rows(config.devices * config.batch, config.context, Mixture.dim)
    where = NamedSharding(mesh(), ROWS)
    shapes = {"gate": (m.experts, m.dim, m.expert), "up": (m.experts, m.dim, m.expert)}
    experts = {k: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where) for k, s in shapes.items()}
    experts["down"] = jax.ShapeDtypeStruct((m.experts, m.expert, m.dim), jnp.bfloat16, sharding=where)
    router = _everywhere(_f32(m.dim, m.experts))
    rows = []
    for what, fn, outs in (
        ("experts forwards", expert_layer, ROWS),
        ("H of its gates, and of down", expert_stats, ROWS),
    ):
        program = jax.jit(jax.shard_map(fn, mesh=mesh(), in_specs=(ROWS, P(), ROWS), out_specs=outs, check_vma=False))
        rows.append(_held("DeepSeek-V3", what, program, experts, router, x))
    return rows


def expert_layer(experts: Any, router: Any, x: Any) -> Any:
    """y = sum over the chosen experts; a host's own, one after the other, for the tokens of all hosts."""
    b, t, d = x.shape
    every = lax.all_gather(x.reshape(b * t, d), "windows", tiled=True)
    share = _shares(router, every)

    def one(y: Any, part: Any) -> tuple[Any, None]:
        (gate, up, down), mine = part
        h = jax.nn.silu(every @ gate.astype(jnp.float32)) * (every @ up.astype(jnp.float32))
        return y + mine[:, None] * (h @ down.astype(jnp.float32)), None

    y, _ = lax.scan(one, jnp.zeros_like(every), ((experts["gate"], experts["up"], experts["down"]), share))
    return lax.psum_scatter(y, "windows", tiled=True).reshape(b, t, d)


def expert_stats(experts: Any, router: Any, x: Any) -> Any:
    """E[x x^T] over the tokens of each expert of a host, at its gates and at down, and how many they are."""
    b, t, d = x.shape
    every = lax.all_gather(x.reshape(b * t, d), "windows", tiled=True)
    share = _shares(router, every)

    def one(part: Any) -> Any:
        (gate, up), mine = part
        seen = jnp.where(mine[:, None] > 0, every, 0.0)
        h = jax.nn.silu(seen @ gate.astype(jnp.float32)) * (seen @ up.astype(jnp.float32))
        return seen.T @ seen, h.T @ h, jnp.sum(mine > 0)

    return lax.map(one, ((experts["gate"], experts["up"]), share))


def _shares(router: Any, x: Any) -> Any:
    """f32[experts of this host, tokens]: what each adds to a token, 0 where it is not chosen."""
    score = jax.nn.sigmoid(x @ router)
    top = lax.top_k(score, Mixture.chosen)[0][:, -1:]
    share = jnp.where(score >= top, score, 0.0)
    share = (share / jnp.sum(share, axis=-1, keepdims=True)).T
    own = Mixture.experts // lax.axis_size("windows")
    return lax.dynamic_slice_in_dim(share, lax.axis_index("windows") * own, own)


def llama_row(config: Config) -> dict[str, Any]:
    """The whole of Llama 3 70B."""
    c = LLAMA
    attention = 2 * c.dim * c.dim + 2 * c.dim * c.kv_heads * c.head_dim
    block = attention + 3 * c.dim * c.hidden
    weights = c.layers * block + 2 * c.vocab * c.dim
    return _row("Llama 3 70B", config, weights, weights, 4 * block, c.layers, c.dim, c.hidden, 1, config.devices)


def mixture_row(config: Config, m: Mixture) -> dict[str, Any]:
    """The whole of the mixture; of a layer's experts a host has its part in memory."""
    one = 3 * m.dim * m.expert
    layer = m.attention + (m.experts + 1) * one + m.dim * m.experts
    dense = m.attention + 3 * m.dim * m.hidden
    moe = m.layers - m.dense_layers
    weights = moe * layer + m.dense_layers * dense + 2 * m.vocab * m.dim
    active = moe * (m.attention + (m.chosen + 1) * one) + m.dense_layers * dense + 2 * m.vocab * m.dim
    held = 2 * (m.experts // config.devices) * one + 4 * (m.attention + one)
    return _row(
        "DeepSeek-V3", config, weights, active, held, m.layers, m.dim, m.dim, m.experts // config.devices, 8 * 8
    )


def _row(
    model: str, config: Config, weights: int, active: int, block: int, layers: int, dim: int, widest: int,
    matrices: int, chips: int,
) -> dict[str, Any]:  # fmt: skip
    """By arithmetic: bytes read once and with a survey, resident on a host, seconds.

    A survey keeps the inputs of all blocks. Forward, backward and again forward for the rounded weights and the floats:
    2 + 4 + 2 + 2 products a weight and token; rounding: about n products a weight, n the widest input.
    """
    tokens = config.windows * config.context
    stream = 4 * tokens * dim
    reads = 2 * weights
    products = 10 * active * tokens + 2 * weights * widest / 2
    hosts = 1 if chips == config.devices else config.devices
    return {
        "model": model, "weights": weights, "tokens": tokens, "devices": chips, "hosts": hosts,
        "read_gb": reads / 1e9, "read_with_survey_gb": 3 * reads / 1e9, "block_gb": block / 1e9,
        "stream_gb": stream / 1e9, "host_gb": (block + 2 * stream / hosts) / 1e9, "H_gb": 4e-9 * widest**2 * matrices,
        "widest": widest, "survey_gb": (layers + 1) * stream / 1e9,
        "read_seconds": 3 * reads / (config.disk * hosts), "compute_seconds": products / (config.rate * chips),
    }  # fmt: skip


def _held(model: str, what: str, program: Any, *args: Any) -> dict[str, Any]:
    """What a device holds while a program runs, as its compiler says."""
    m = program.lower(*args).compile().memory_analysis()
    held = {"arguments": m.argument_size_in_bytes, "results": m.output_size_in_bytes, "temporary": m.temp_size_in_bytes}
    sizes = {f"{name}_gb": nbytes / 1e9 for name, nbytes in held.items()}
    return {"model": model, "program": what, **sizes, "all_gb": sum(sizes.values())}


def mesh() -> Mesh:
    """The hosts of the mixture in a row."""
    return Mesh(jax.devices(), ("windows",))


def _f32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _rows(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), ROWS))


def _everywhere(tree: Any) -> Any:
    where = NamedSharding(mesh(), P())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)
