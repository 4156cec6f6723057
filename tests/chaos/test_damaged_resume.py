"""Unfinished work with damaged bytes: a rerun gives the bytes of a run that nobody stopped, or refuses in one line."""

import os
import shutil

import numpy as np
import pytest
from mutations import campaign
from tiny_runs import calibration, quantized

RUNS = {
    "rtn": {},
    "ldlq": {"recipe": "nearest('h') >> ldlq('act', cross=1.0)", "calibration": calibration()},
}


def stop(out, model, **options):
    """Ctrl-C behind the last weight but one; where blocks are walked, behind the last: its block is kept by then."""
    seen = []

    def count(*step):
        seen.append(step)
        if len(seen) == (9 if "recipe" in options else 8):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(model, out, progress=count, walked=count, **options)


@pytest.mark.slow
@pytest.mark.cases(16)
@pytest.mark.parametrize("name", RUNS)
def test_a_rerun_gives_the_same_bytes(model, tmp_path, name, cases):
    out, kept, options = tmp_path / "q.gguf", tmp_path / "kept", RUNS[name]
    quantized(model, out, **options)
    whole = out.read_bytes()
    out.unlink()
    stop(out, model, **options)
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.name == "state.json" for p in left) == (name == "ldlq"), left
    shutil.copytree(tmp_path, kept)

    def again():
        damaged = {p: p.read_bytes() for p in left}
        try:
            quantized(model, out, **options)
            assert out.read_bytes() == whole
            assert sorted(os.listdir(tmp_path)) == ["kept", "q.gguf"]
        finally:
            out.unlink(missing_ok=True)
            for p in damaged:  # all but what the next case damages, as it was left
                p.parent.mkdir(exist_ok=True)
                shutil.copy(kept / p.relative_to(tmp_path), p)

    count = len(cases) if name == "rtn" else len(cases) // 2
    outcomes = campaign(f"resume {name}", cases[:count], left, again, read_only=False)
    assert outcomes["read"]


def test_calibration_is_in_the_vocabulary():
    assert np.asarray(calibration().tokens).max() < 320
