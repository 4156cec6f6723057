"""Products with packed weights: every form against float64, and the operation under grad, vmap and a mesh."""

import cuda_ahead
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from jaxprs import products

import qjax
from qjax.errors import UserError
from qjax.kernels import TABLE, Call, Kernel, Layout, choice, dispatch, xla
from qjax.lifting import lift
from qjax.tensor import QTensor


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def exact(x, q):
    """x W^T in float64, and the same of absolute values: what rounding errors are measured by."""
    x, w = np.asarray(x, np.float64), np.asarray(qjax.dequantize(q), np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "int4_g64", "NF4", "FP8_E4M3_tensor"])
@pytest.mark.parametrize("rows", [1, 3])
def test_dot_is_the_exact_product_but_for_float32(rng, monkeypatch, name, rows):
    """Also where the last strip of weights would not be full: 45 rows, seven at a time."""
    monkeypatch.setattr(xla, "STRIP", 7 * 256)
    q, x = qjax.quantize(drawn(rng, 45, 256), name), drawn(rng, rows, 256)
    y, size = exact(x, q)
    assert np.all(np.abs(qjax.dot(x, q) - y) <= 256 * 2.0**-24 * size)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_sums_in_whole_numbers_keep_twenty_bits(rng, name):
    q = qjax.quantize(drawn(rng, 64, 128), name)
    x = drawn(rng, 1, 128) * 10.0 ** jnp.repeat(jnp.asarray([-3.0, 0.0, 2.0, -30.0]), 32)[None]
    y, size = exact(x, q)
    bits = xla.sum_bits(q.format)
    assert 20 <= bits <= 23 and xla.in_whole_numbers(q.format)
    largest = np.repeat(np.abs(np.asarray(x)).reshape(4, 32).max(-1), 32)[None]
    _, off = exact(largest * 2.0 ** -(bits + 1), q)
    assert np.all(np.abs(xla.sums(x, q.leaves, q.format) - y) <= off + 128 * 2.0**-24 * size)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(rng, bad):
    q = qjax.quantize(drawn(rng, 8, 64), "Q4_0")
    assert not np.isfinite(qjax.dot(jnp.zeros(64).at[40].set(bad), q)).any()
    assert np.array_equal(qjax.dot(jnp.zeros(64), q), np.zeros(8))


def test_the_largest_codes_and_inputs_do_not_overflow():
    q = qjax.quantize(-jnp.ones((4, 32)), "Q4_0")  # every code is -8
    np.testing.assert_allclose(qjax.dot(jnp.full(32, 3.0), q), -96.0, rtol=1e-6)


def test_gradients_decode_again_and_keep_packed_weights(rng):
    q, x = qjax.quantize(drawn(rng, 64, 128), "Q4_0"), drawn(rng, 1, 128)
    y, back = jax.vjp(lambda x: qjax.dot(x, q), x)
    assert sum(a.nbytes for a in jax.tree.leaves(back)) <= q.nbytes + x.nbytes + 4096
    w = np.asarray(qjax.dequantize(q), np.float64)
    np.testing.assert_allclose(back(y)[0], np.asarray(y, np.float64) @ w, rtol=1e-5, atol=1e-4)


def test_gradients_by_leaves_that_are_floats(rng):
    q, x = qjax.quantize(drawn(rng, 4, 64), "int4_g32_f32"), drawn(rng, 3, 64)

    def loss(scale):
        leaves = q.leaves | {"scale": scale}
        return jnp.sum(qjax.dot(x, qjax.QTensor(leaves, q.format)))

    got = jax.grad(loss)(q.leaves["scale"])
    codes = np.asarray(q.format.unpack(q.leaves)[1], np.float64).reshape(4, 2, 32)
    np.testing.assert_allclose(got, (codes * np.asarray(x).sum(0).reshape(2, 32)).sum(-1), rtol=1e-5, atol=1e-4)


def test_a_gradient_has_the_precision_of_its_product(rng):
    """That in force when the product was traced, not when it is differentiated."""
    q = qjax.quantize(drawn(rng, 4, 32), "Q8_0")

    def loss(x):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(qjax.dot(x, q))

    with jax.default_matmul_precision("bfloat16"):
        count, lesser = products(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 32))))
    assert count and not lesser


def test_vmap_over_inputs_makes_rows(rng):
    """Three inputs of one row are one product of three rows, whose kernel is another."""
    q, x = qjax.quantize(drawn(rng, 16, 96), "Q4_0"), drawn(rng, 3, 96)
    text = jax.jit(jax.vmap(lambda x: qjax.dot(x, q))).lower(x).as_text()
    assert "3x96xf32" in text and "dot_general" in text
    np.testing.assert_allclose(jax.vmap(lambda x: qjax.dot(x, q))(x), exact(x, q)[0], rtol=1e-4, atol=1e-4)


def test_vmap_over_weights_decodes_one_after_another(rng):
    w, x = drawn(rng, 8, 96, 64), drawn(rng, 8, 5, 64)
    q = qjax.quantize(w, "Q4_0")
    each = jax.jit(jax.vmap(qjax.dot))
    assert each.lower(x, q).compile().memory_analysis().temp_size_in_bytes < 8 * 96 * 64 * 4 / 2
    want = np.einsum("ebn,eon->ebo", np.asarray(x, np.float64), np.asarray(qjax.dequantize(q), np.float64))
    np.testing.assert_allclose(each(x, q), want, rtol=1e-4, atol=1e-4)
    shared = jax.vmap(lambda q: jax.vmap(lambda x: qjax.dot(x, q))(x[0]))(q)  # the same inputs for all
    np.testing.assert_allclose(shared[3], exact(x[0], jax.tree.map(lambda a: a[3], q))[0], rtol=1e-4, atol=1e-4)
    g = jax.grad(lambda x: jnp.sum(jax.vmap(qjax.dot)(x, q)))(x)
    np.testing.assert_allclose(g[2, 0], np.asarray(qjax.dequantize(q))[2].sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, weights, inputs, output, moved",
    [
        ("Q4_0", P("d"), P(), P(None, "d"), set()),
        ("Q4_0", P(None, "d"), P(None, "d"), P(), {"all-reduce"}),
        ("int4_g64", P("d"), P(), P(None, "d"), set()),
        ("int4_g64", P(), P("d"), P("d"), set()),
        ("FP8_E4M3_tensor", P(), P("d"), P("d"), set()),
        ("E8P_2", P("d"), P(), P(None, "d"), set()),
    ],
)
def test_a_mesh_multiplies_where_the_packed_weights_lie(rng, name, weights, inputs, output, moved):
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))

    def put(tree, spec):
        return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec if a.ndim > 1 else P())), tree)

    q, x = qjax.quantize(drawn(rng, 64, 256), name), drawn(rng, 8, 256)
    program = jax.jit(qjax.dot).lower(put(x, inputs), put(q, weights)).compile()
    text = program.as_text()
    assert {op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if f" {op}" in text} == moved
    y = program(put(x, inputs), put(q, weights))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, output), 2)
    np.testing.assert_allclose(y, exact(x, q)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, cut", [(128, True), (80, False)])
def test_a_mesh_cuts_no_tile_of_rows(rng, rows, cut):
    """Of sixteen rows; where pieces would be of ten, all of the weights come to each device."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    there = NamedSharding(mesh, P("d"))
    fmt = qjax.format("trellis2_L12_3inst")
    leaves = {
        "codes": jnp.asarray(rng.integers(0, 256, (rows, 16), np.uint8)),
        "scale": jnp.ones((rows, 1), jnp.float16),
    }
    q, x = QTensor(leaves, fmt), drawn(rng, 3, 64)
    on_mesh = jax.tree.map(lambda a: jax.device_put(a, there), q)
    program = jax.jit(qjax.dot).lower(x, on_mesh).compile()
    assert ("all-gather" in program.as_text()) != cut
    np.testing.assert_allclose(program(x, on_mesh), exact(x, q)[0], rtol=1e-4, atol=1e-4)


def test_experts_on_a_mesh_stay_where_they_lie(rng):
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    there = NamedSharding(mesh, P("d"))
    q, x = qjax.quantize(drawn(rng, 8, 16, 64), "Q4_0"), drawn(rng, 8, 3, 64)
    program = jax.jit(jax.vmap(qjax.dot)).lower(*jax.device_put((x, q), there)).compile()
    assert "all-" not in program.as_text()
    want = jax.vmap(qjax.dot)(x, q)
    np.testing.assert_allclose(program(*jax.device_put((x, q), there)), want, rtol=1e-5, atol=1e-5)


def test_a_program_for_another_platform_has_its_kernels(rng, monkeypatch):
    """Exported on a machine without it: only a CPU takes strips, in a loop."""
    monkeypatch.setattr(xla, "STRIP", 9 * 96)
    q = qjax.quantize(drawn(rng, 36, 96), "Q4_0")

    def text(platform):
        program = jax.jit(lambda x, leaves: qjax.dot(x, QTensor(leaves, q.format)))
        return jax.export.export(program, platforms=[platform])(jnp.ones((3, 96)), q.leaves).mlir_module()

    for platform, looped in (("cpu", True), ("cuda", False), ("tpu", False)):
        assert ("stablehlo.while" in text(platform)) == looped, platform


@pytest.mark.parametrize(
    "name, rows, dtype, platform, kernel",
    [
        ("Q4_0", 1, jnp.float32, "cpu", "sums"),
        ("Q4_0", 2, jnp.float32, "cpu", "strips"),
        ("Q4_0", 1, jnp.bfloat16, "cpu", "strips"),
        ("Q8_0", 1, jnp.float32, "cpu", "strips"),
        ("Q4_K", 1, jnp.float32, "cpu", "strips"),
        ("E8P_2", 1, jnp.float32, "cpu", "strips"),
        ("trellis2_L8_mul1", 1, jnp.float32, "cpu", "strips"),
        ("FP8_E4M3_tensor", 1, jnp.float32, "cpu", "first"),
        ("Q4_0", 1, jnp.float32, "cuda", "mosaic_gpu"),
        ("Q4_0", 1, jnp.float32, "tpu", "mosaic_tpu"),
    ],
)
def test_which_kernel_is_chosen(name, rows, dtype, platform, kernel):
    lies = platform != "cpu"  # as any kernel wants them
    found, passed = choice(Call(qjax.format(name), (64, 256), rows, jnp.dtype(dtype), lies), platform)
    assert found.name == kernel and all(why for _, why in passed)


def test_what_a_cpu_prepacks():
    """Integers of any rows of x; what has no layout, and what lies in another's, has the kernel that there was."""

    def name(format, lies):
        return choice(Call(qjax.format(format), (64, 256), 1, jnp.dtype(jnp.bfloat16), lies), "cpu")[0].name

    assert [name(f, True) for f in ("Q4_K", "uint3_g64", "int8_row")] == ["lanes"] * 3
    assert [name(f, True) for f in ("NF4", "IQ2_XXS", "FP8_E4M3_tensor")] == ["strips", "strips", "first"]
    assert name("Q4_K", turned) == name("Q4_K", False) == "strips"


@pytest.mark.parametrize("name, strip", [("E8P_2", 7 * 64), ("trellis2_L8_mul1", 40 * 64)])
def test_strips_of_vectors_are_whole_tiles(name, strip, rng, monkeypatch):
    """80 rows by 7, or by 32, the last strip begun early."""
    monkeypatch.setattr(xla, "STRIP", strip)
    q, x = qjax.quantize(drawn(rng, 80, 64), name), drawn(rng, 3, 64)
    want, got = exact(x, q)[0], xla.strips(x, q.leaves, q.format)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def of_points(name, rows, n):
    """Shapes of the leaves of weights; no search is traced for it."""
    fmt = qjax.format(name)
    if hasattr(fmt, "layout"):
        return fmt, {"blocks": jax.ShapeDtypeStruct((rows, n // fmt.block, fmt.block_bytes), jnp.uint8)}
    codes = jax.ShapeDtypeStruct((rows, n * fmt.code.bits // 8), jnp.uint8)
    return fmt, {"codes": codes, "scale": jax.ShapeDtypeStruct((rows, 1), jnp.float16)}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "name", ["E8P_2", "E8P_4", "trellis2_L12_3inst", "trellis2_L16_hyb", "IQ2_XXS", "IQ3_S", "IQ1_M"]
)
def test_no_more_than_a_strip_of_vectors_is_decoded(name, rows):
    """However many rows of weights there are."""
    fmt, leaves = of_points(name, 4096, 1024)
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32)
    program = jax.jit(lambda x, leaves: qjax.dot(x, QTensor(leaves, fmt))).lower(x, leaves).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 4 * xla.STRIP  # W is sixteen of them


@pytest.mark.slow
@pytest.mark.parametrize("name", ["E8P_2", "trellis2_L12_3inst", "IQ2_XXS"])
def test_a_gpu_without_a_kernel_decodes_strips_of_vectors(name):
    fmt, leaves = of_points(name, 32768, 1024)
    x = jax.ShapeDtypeStruct((4, 1024), jnp.bfloat16)
    program = cuda_ahead.compiled(
        lambda x, *a: qjax.dot(x, QTensor(dict(zip(leaves, a, strict=True)), fmt)), x, *leaves.values()
    )
    assert program.memory_analysis().temp_size_in_bytes < 2 * 4 * 16 * xla.STRIP  # W in bfloat16 is twice that


def of_few_rows(call):
    return "" if call.rows < 4 else f"{call.rows} rows of x, more than 3"


def doubled(x, packed, format, precision):
    """What shows that it ran, from a layout that only it knows."""
    return 2 * xla.whole(x, turned.unpack(packed), format, precision)


MADE = []


def turn(format, leaves):
    MADE.append(format.name)
    return jnp.swapaxes(leaves["blocks"], -3, -2)


turned = Layout(  # [blocks, rows, bytes]
    "turned",
    turn,
    lambda packed: {"blocks": jnp.swapaxes(packed, -3, -2)},
    lambda packed: (*packed.shape[:-3], packed.shape[-2], packed.shape[-3] * 32),
)
OWN = Kernel("cpu", "pallas", "own", doubled, of_few_rows, "", layout=turned)


def test_the_mesh_in_force_says_for_which_platform():
    chip = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    assert dispatch.running_on() == "cpu"
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        assert dispatch.running_on() == "cuda"
        assert dispatch.chosen(Call(qjax.format("Q4_0"), (64, 256), 1), "auto").name == "mosaic_gpu"


def test_a_kernel_is_a_line_of_the_table(rng, monkeypatch):
    """`fits` decides; weights that lie otherwise are laid out for it where it is asked for, else another takes them."""
    monkeypatch.setattr(dispatch, "TABLE", (OWN, *TABLE))
    q, x = qjax.quantize(drawn(rng, 24, 32), "Q8_0"), drawn(rng, 5, 32)
    once = exact(x, q)[0]
    np.testing.assert_allclose(qjax.dot(x[:2], q), once[:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qjax.dot(x[:2], qjax.prepack(q)), 2 * once[:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qjax.dot(x[:2], q, "pallas"), 2 * once[:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qjax.dot(x[:2], q, "xla"), once[:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qjax.dot(x, q), once, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        UserError, match=r"no pallas kernel on cpu takes Q8_0 weights \[24, 32\] and 5 rows .*more than"
    ):
        qjax.dot(x, q, "pallas")


def test_prepacked_weights_are_the_same_weights(rng, monkeypatch):
    """Turned once: the kernel reads them as they lie, all else turns them back; leaves that no kernel turns stay."""
    monkeypatch.setattr(dispatch, "TABLE", (OWN, *TABLE))
    q, x = qjax.quantize(drawn(rng, 64, 40), "Q8_0", axis=0), drawn(rng, 5, 64)
    tree = qjax.prepack({"w": q, "scale": jnp.ones(3)})
    ready = tree["w"]
    assert ready.leaves["packed"].shape == (2, 40, 34) and ready.shape == (64, 40) and ready.axis == q.axis
    assert ready.bits_per_weight == 8.5 and "turned" in repr(ready) and qjax.prepack(ready) is ready
    np.testing.assert_array_equal(qjax.dequantize(ready), qjax.dequantize(q))
    once = exact(x, QTensor(q.leaves, q.format))[0]
    MADE.clear()
    np.testing.assert_allclose(qjax.dot(x[:3], ready), 2 * once[:3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qjax.dot(x, ready), once, rtol=1e-4, atol=1e-4)
    assert not MADE  # again, in a program
    g = jax.grad(lambda x: jnp.sum(qjax.dot(x, ready)))(x)
    np.testing.assert_allclose(g[0], np.asarray(qjax.dequantize(q)).sum(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lift(lambda p, x: x @ p["w"])(tree, x), once, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"in the layout of a kernel, turned: leave it out of qjax\.prepack"):
        lift(lambda p, x: x @ p["w"][:, :2])(tree, x)
    assert qjax.prepack(q, rows=4).format.layout == dispatch.LANES


def test_mistakes(rng, without_type_checks):
    q = qjax.quantize(drawn(rng, 4, 32), "Q8_0")
    with pytest.raises(UserError, match=r"no pallas kernel on cpu takes Q8_0 .*there is none yet.*'auto'"):
        qjax.dot(jnp.ones(32), q, "pallas")
    with pytest.raises(UserError, match="implementation='mosaic'; expected one of auto, xla, pallas"):
        qjax.dot(jnp.ones(32), q, "mosaic")
