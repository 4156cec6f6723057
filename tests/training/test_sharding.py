"""Leaves live where the table says, moments where their parameters do, and training does not notice."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import two_process_step as tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from several_processes import free_port, run_together

import qjax
from qjax.errors import UserError
from qjax.processes import start_processes
from qjax.training.optim.groups import Group, partitioned
from qjax.training.run.data import Batches, Tokens, write_tokens
from qjax.training.run.sharding import DECODER, distribute, global_batch, mesh, shardings
from qjax.training.run.state import init_state, make_step

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax's bias correction mixes floats and integer step counts."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def specs(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shape(*n):
    return jax.ShapeDtypeStruct(n, jnp.float32)


def cyclic_text(rng, count=2000):
    """A text with something to learn in it: mostly the next number."""
    return np.cumsum(rng.choice([1, 1, 1, 5], count)) % tiny.CONFIG.vocab


def test_mesh_is_the_devices_in_order():
    m = mesh(data=2, fsdp=4)
    assert m.axis_names == ("data", "fsdp") and m.shape == {"data": 2, "fsdp": 4}
    assert [d.id for d in m.devices.ravel()] == [d.id for d in jax.devices()[:8]]
    assert mesh(data=-1, fsdp=2).shape == {"data": 4, "fsdp": 2}
    assert mesh(data=1, fsdp=-1).shape == {"data": 1, "fsdp": 8}
    assert mesh().shape == {"data": 8, "fsdp": 1}
    assert mesh(1, 2, jax.devices()[3:1:-1]).devices.ravel().tolist() == jax.devices()[2:4]


@pytest.mark.parametrize(("data", "fsdp"), [(2, 2), (3, -1), (-1, -1), (0, 8), (-1, 0), (-2, -4), (16, -1)])
def test_mesh_must_fit_the_devices(data, fsdp):
    with pytest.raises(UserError, match=rf"data={data} times fsdp={fsdp} does not make the 8 devices"):
        mesh(data, fsdp)


def test_every_leaf_of_a_decoder_and_its_moments():
    state = jax.eval_shape(tiny.fresh_state)
    found = specs(shardings(state, mesh(2, 4), small=0))
    weights = {path.removeprefix("weights/"): s for path, s in found.items() if path.startswith("weights/")}
    assert len(weights) == len(jax.tree.leaves(state["weights"])) == 21
    for path, spec in weights.items():
        if path.endswith("kernel"):
            assert spec == P(None, "fsdp")
        elif path == "embed/embedding":
            assert spec == P("fsdp", None)
        else:
            assert path.endswith("norm/scale") and spec == P()
    moments = {path: s for path, s in found.items() if "/mu/" in path or "/nu/" in path}
    assert len(moments) == 2 * len(weights)
    for path, spec in moments.items():
        assert spec == weights[path.split("/mu/" if "/mu/" in path else "/nu/")[1]], path
    rest = found.keys() - moments.keys() - {f"weights/{path}" for path in weights}
    assert {found[path] for path in rest} == {P()} and any("count" in path for path in rest) and "step" in rest


def test_moments_behind_masks_and_partitions_follow_too():
    weights = jax.eval_shape(tiny.fresh_state)["weights"]
    optimizer = optax.MultiSteps(
        optax.partition(
            {"matrix": optax.chain(optax.clip(1.0), optax.adam(1e-3)), "vector": optax.sgd(1e-3, momentum=0.9)},
            lambda tree: jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", tree),
        ),
        every_k_schedule=2,
    )
    found = specs(shardings(jax.eval_shape(optimizer.init, weights), mesh(2, 4), small=0))
    of_q = [spec for path, spec in found.items() if path.endswith("layers_1/attn/q/kernel")]
    assert len(of_q) == 3 and set(of_q) == {P(None, "fsdp")}  # mu, nu and the accumulated gradient
    assert {spec for path, spec in found.items() if path.endswith("norm/scale")} == {P()}


def test_scales_and_packed_weights_follow_the_output_axis(rng):
    w = jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)
    tree = {
        "weights": {"q": {"kernel": qjax.quantize(w, "int4_g32", axis=0)}},
        "scales": {"layers_0/attn/q/kernel": {"s": shape(48, 2), "tensor": shape()}},
        "constants": {"layers_0/attn/q/kernel": {"s": shape(48, 2)}},
        "adapters": {"layers_0/attn/q/kernel": {"a": shape(64, 8), "b": shape(8, 48)}},
    }
    found = shardings(tree, mesh(2, 4), small=0)
    assert found["scales"]["layers_0/attn/q/kernel"]["s"].spec == P("fsdp")
    assert found["constants"]["layers_0/attn/q/kernel"]["s"].spec == P("fsdp")
    assert found["scales"]["layers_0/attn/q/kernel"]["tensor"].spec == P()
    assert {leaf.spec for leaf in jax.tree.leaves(found["adapters"])} == {P()}
    packed = jax.tree.leaves(found["weights"])
    assert len(packed) >= 2 and {leaf.spec for leaf in packed} == {P("fsdp")}
    q = distribute(tree["weights"], found["weights"])["q"]["kernel"]
    assert np.array_equal(qjax.dequantize(q), qjax.dequantize(tree["weights"]["q"]["kernel"]))
    assert {s.data.shape[0] for leaf in jax.tree.leaves(q) for s in leaf.addressable_shards} == {12}


def test_the_first_pattern_decides():
    tree = {"a": {"kernel": shape(8, 8)}, "b": {"kernel": shape(8, 8)}, "gain": shape(8)}
    table = (("re:a/k.*", P("data")), ("[!a]/kernel", P("fsdp", "data")), ("*", P()))
    found = specs(shardings(tree, mesh(2, 4), table, small=0))
    assert found == {"a/kernel": P("data"), "b/kernel": P("fsdp", "data"), "gain": P()}
    both = shardings(tree, mesh(2, 4), (("*kernel", P(("data", "fsdp"), None)),), small=0)
    assert both["a"]["kernel"].spec == P(("data", "fsdp"), None) and both["gain"].spec == P()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((("x", P()),), r"no rule of the sharding table fits b/kernel \[8, 8\]; add one, such as \('b/kernel'"),
        ((("*", P("tensor")),), "names 'tensor'; the mesh has data, fsdp"),
        ((("*", P(None, None, "fsdp")),), r"b/kernel \[8, 8\] has fewer axes"),
        ((("re:(", P()),), r"'re:\(' is no regular expression"),
    ],
)
def test_bad_tables(table, message):
    with pytest.raises(UserError, match=message):
        shardings({"b": {"kernel": shape(8, 8)}}, mesh(2, 4), table)


def test_axes_that_do_not_divide():
    m = mesh(1, 8)
    tree = {"embed": {"embedding": shape(50257, 768)}}
    with pytest.raises(
        UserError, match=r"embed/embedding \[50257, 768\]: axis 0 of 50257 does not divide over the 8 devices .* fsdp"
    ):
        shardings(tree, m)
    other = (("*embedding", P(None, "fsdp")), *DECODER)
    assert shardings(tree, m, other)["embed"]["embedding"].spec == P(None, "fsdp")
    assert shardings(tree, mesh(8, 1))["embed"]["embedding"].spec == P("fsdp", None)  # one device divides everything

    # Only what is small is replicated: the border is the count of elements.
    assert shardings({"kernel": shape(30, 30)}, m, small=900)["kernel"].spec == P(None, None)
    with pytest.raises(UserError, match="does not divide"):
        shardings({"kernel": shape(30, 30)}, m, small=899)


def test_groups_are_never_cut():
    """A contracted axis may be cut between groups only; the moments of the weight are held to it too."""
    rows = (("*kernel", P("fsdp", None)), ("*embedding", P(None, "fsdp")))
    m = mesh(1, 8)
    tree = {"layers_0": {"kernel": shape(1024, 24)}, "embed": {"embedding": shape(24, 1024)}}
    for block in (1, 32, 128):
        blocks = {"layers_0/kernel": block, "embed/embedding": block}
        assert shardings(tree, m, rows, blocks, small=0)["layers_0"]["kernel"].spec == P("fsdp", None)
    for path, axis in (("layers_0/kernel", 0), ("embed/embedding", 1)):
        for block, whole in ((256, 256), (0, 1024)):
            message = rf"{path} .* axis {axis} of 1024 does not divide in whole blocks of {whole} over the 8 devices"
            with pytest.raises(UserError, match=message):
                shardings({"weights": tree}, m, rows, {path: block}, small=0)
            with pytest.raises(UserError, match=message):
                shardings(jax.eval_shape(optax.adam(1e-3).init, tree), m, rows, {path: block}, small=0)
    # The default table cuts the other axis, so every group stays whole.
    assert shardings(tree, m, DECODER, {"layers_0/kernel": 0}, small=0)["layers_0"]["kernel"].spec == P(None, "fsdp")
    with pytest.raises(UserError, match="'layers_1/kernel', which is no leaf"):
        shardings(tree, m, rows, {"layers_1/kernel": 32})


def test_global_batch_is_the_rows_over_all_devices():
    m = mesh(2, 4)
    rows = np.arange(16 * 5, dtype=np.int32).reshape(16, 5)
    batch = global_batch(rows, m)
    assert np.array_equal(batch, rows) and batch.dtype == jnp.int32
    assert batch.sharding.is_equivalent_to(NamedSharding(m, P(("data", "fsdp"), None)), 2)
    assert [s.data.shape for s in batch.addressable_shards] == [(2, 5)] * 8
    with pytest.raises(UserError, match="12 rows does not divide among 8 devices"):
        global_batch(rows[:12], m)


def test_distributed_trees_may_be_donated():
    """What `distribute` returns shares no memory with its source, which a teacher may still need."""
    m = mesh(1, 1, jax.devices()[:1])
    source = {"kernel": jnp.ones((8, 8))}
    placed = distribute(source, shardings(source, m))
    after = jax.jit(lambda t: jax.tree.map(lambda x: 2 * x, t), donate_argnums=0)(placed)
    assert placed["kernel"].is_deleted() and float(source["kernel"].sum()) == 64 and float(after["kernel"][0, 0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (1, 8)])
def test_five_steps_on_a_mesh_are_five_steps_alone(rng, data, fsdp):
    windows = Batches(Tokens(cyclic_text(rng), tiny.CONFIG.vocab, ""), tiny.CONFIG.context, batch=16)
    alone, expected = tiny.train_alone(windows, 5)
    m = mesh(data, fsdp)
    state, losses = tiny.train_sharded(windows, m, 5)
    assert np.allclose(losses, expected, atol=1e-5, rtol=0) and losses[-1] < losses[0] - 0.01
    for a, b in zip(jax.tree.leaves(state["weights"]), jax.tree.leaves(alone["weights"]), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5
    # After five steps everything is still where it was put: each device holds its part and no more.
    where = shardings(jax.eval_shape(tiny.fresh_state), m, small=0)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), state, where)
    mu = next(
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"])
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("mu/layers_0/mlp/up/kernel")
    )
    assert {s.data.shape for s in mu.addressable_shards} == {(32, 64 // fsdp)}


def test_parts_of_a_batch_lie_on_all_devices():
    """Accumulation costs no device more than its share, and no gathering of rows: what was compiled says so."""

    def loss(params, kept, batch, key):
        y = jnp.tanh(batch["x"] @ params["up"]["kernel"]) @ params["down"]["kernel"]
        return jnp.mean((y - batch["x"]) ** 2), {}

    optimizer = partitioned((Group("all", "*"),), 0.1, optax.identity())
    step = make_step(loss, optimizer, accumulate=4, donate=False)
    state = init_state({"up": {"kernel": jnp.ones((32, 64))}, "down": {"kernel": jnp.ones((64, 32))}}, optimizer)
    rows, m = jnp.ones((32, 8, 32)), mesh(8, 1)
    alone = step.lower(state, {"x": rows}).compile()
    placed = distribute(state, shardings(jax.eval_shape(lambda: state), m))
    spread = step.lower(placed, {"x": global_batch(rows, m)}).compile()
    assert 8 * spread.cost_analysis()["flops"] < 1.6 * alone.cost_analysis()["flops"]
    assert spread.as_text().count(" all-gather(") == 0


def test_processes_are_started_with_all_or_nothing(monkeypatch):
    with pytest.raises(UserError, match="coordinator, processes and process"):
        start_processes("localhost:1234", 2)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: asked.append(a))
    start_processes("localhost:1234", 2, 0)
    start_processes()
    assert asked == [("localhost:1234", 2, 0), (None, None, None)]
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot join the processes"):
        start_processes("localhost:1234", 1, 0)  # JAX runs already


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, rng):
    tokens = write_tokens(tmp_path / "text.bin", [cyclic_text(rng)], tiny.CONFIG.vocab)
    alone, expected = tiny.train_alone(Batches(tokens, tiny.CONFIG.context, batch=8), 5)

    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable, Path(tiny.__file__), "--coordinator", f"127.0.0.1:{free_port()}", "--processes=2", "--steps=5",
        "--batch=8", tmp_path / "text.bin",
    ]  # fmt: skip
    outs = [tmp_path / f"{p}.npz" for p in range(2)]
    run_together([[*command, outs[p], f"--process={p}"] for p in range(2)], env, timeout=240)
    for out in outs:
        with np.load(out) as result:
            assert np.allclose(result["losses"], expected, atol=1e-5, rtol=0)
            for i, leaf in enumerate(jax.tree.leaves(alone["weights"])):
                assert np.abs(result[str(i)] - np.asarray(leaf)).max() < 1e-5
