"""Groups of rows with an H of their own in a walk: what tokens count, in memory and in files, and what comes of it."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_walks import CONFIG, tiny_calibration, tiny_model

import qjax
from qjax.models.stages import stages_of
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.passes import block_step
from qjax.pipeline.survey import survey
from qjax.pipeline.walk_state import save_survey, saved_survey

ALONE = "attn/o/kernel", "mlp/down/kernel"  # the only weights of their inputs
CHAIN = "nearest('h') >> ldlq()"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_it_is_the_sensitivity_of_the_rows_and_lies_in_files(model, tmp_path):
    """One group is all of a weight's outputs; four are its quarters."""
    stages, calibration = stages_of(CONFIG), tiny_calibration()
    whole, parts = ({f"layers_1/{path}": k for path in ALONE} for k in (1, 4))
    one = survey(stages, model, calibration, two_sided=False, guided=whole)
    four = survey(stages, model, calibration, tmp_path, two_sided=False, guided=parts)
    assert one.by_rows.of(0) == {} and set(one.by_rows.of(1)) == set(ALONE)
    for path in ALONE:
        (s,), quarters = one.by_rows.of(1)[path], four.by_rows.of(1)[path]
        assert min(np.abs(s - v).max() for v in one.sensitivity[1]) < 1e-4 * s.max()
        assert quarters.shape == (4, *s.shape)
        np.testing.assert_allclose(quarters[:, : calibration.used].mean(axis=(1, 2)), 1, rtol=1e-4)
        shares, *_ = np.linalg.lstsq(quarters.reshape(4, -1).T, s.reshape(-1), rcond=None)
        np.testing.assert_allclose(shares @ quarters.reshape(4, -1), s.reshape(-1), rtol=1e-3, atol=1e-4)
        assert (shares > 0).all() and shares.sum() == pytest.approx(1, abs=1e-3)
    save_survey(tmp_path, four)
    shape = (*calibration.tokens.shape, CONFIG.dim)
    again = saved_survey(tmp_path, CONFIG.layers, shape, guided=True)
    np.testing.assert_array_equal(again.by_rows.of(1)[ALONE[0]], four.by_rows.of(1)[ALONE[0]])
    (tmp_path / "row_sensitivity_1.npz").unlink()
    told = []
    assert saved_survey(tmp_path, CONFIG.layers, shape, told.append, guided=True) is None
    assert "row_sensitivity_1" in told[0]


def apply(params, x):
    return x @ params["w"]


def test_groups_are_of_rows_that_follow_each_other():
    rng = np.random.default_rng(0)
    w, x, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 8), (2, 3, 5), (2, 3, 8)))
    *_, found = block_step(apply, (("w",),), (), (("w", 4),), {"w": w}, x, g)
    want = np.square(np.asarray(g, np.float64)).reshape(2, 3, 4, 2).mean(axis=-1)
    np.testing.assert_allclose(found["w"], np.moveaxis(want, -1, 0), rtol=1e-5)


def test_a_walk_rounds_each_group_of_rows_in_its_own(model):
    """One group is what `sensitive` does where a weight is alone at its input; four are not; all blocks have them."""
    plan, calibration, found, notes = "int4_g32", tiny_calibration(), {}, {}
    for options in ("sensitive=True", "guided=1", "guided=4"):
        line = f"{CHAIN} >> options({options}, sequential=False)"
        made, report = quantize_model(model, plan, line, calibration)
        found[options] = made.params
        notes[options] = {t.name: t.calibration.note for t in report.tensors if t.calibration is not None}
    for layer in range(CONFIG.layers):
        of = {k: v[f"layers_{layer}"] for k, v in found.items()}
        for part, name in (path.split("/")[:2] for path in ALONE):
            dense = {k: np.asarray(qjax.dequantize(v[part][name]["kernel"])) for k, v in of.items()}
            assert np.mean(dense["sensitive=True"] == dense["guided=1"]) > 0.99
            assert np.mean(dense["sensitive=True"] == dense["guided=4"]) < 0.99
    blocks = {path: note for path, note in notes["guided=4"].items() if "/" in path and path.startswith("layers_")}
    assert blocks and not any("one H" in note for note in blocks.values())
