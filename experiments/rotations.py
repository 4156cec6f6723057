"""Learned rotations against random ones, and against none: the same feedback onto the same grids, KL to the float one.

    qjax run configs/rotations.toml

Of each format: `gptq` as the model is; `quarot`, residual stream and values in random Hadamard coordinates, folded into
the weights; `spinquant`, rotations that learned from there for this very format. All three are rounded by one recipe on
one text; with `inputs` the blocks' inputs are rounded too, and rotations learn for those alone, as the paper's do.
`ratio` is the KL over quarot's on the same windows, with half its 95 % interval over them, as in tuning.py. A killed
run goes on with the formats that it had not finished.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qjax import rundir
from qjax.evaluate.intervals import half_interval, ratio_of_means
from qjax.evaluate.judge import baseline_of, kl_by_token
from qjax.io.checkpoint import load_float
from qjax.models import stdlib_text
from qjax.models.fuse import rotated
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.windows import Calibration, calibration_text
from qjax.plan import Plan
from qjax.training.tuning.descent import Tuning
from qjax.training.tuning.rotations import learn_rotations


@dataclasses.dataclass(frozen=True)
class Config:
    """The formats, the texts and the steps."""

    model: str = "reference"
    formats: tuple[str, ...] = ("uint2_g64", "uint3_g64", "uint4_g64")
    inputs: Literal["", "int8", "int4"] = ""  # how the inputs of the blocks' weights are rounded
    recipe: str = "nearest() >> ldlq()"  # behind act(inputs), where there are any
    outside: str = "Q8_0"
    windows: int = 64  # of calibration text
    context: int = 128  # tokens a window, of both texts
    judged: int = 64  # windows
    tuning: Tuning = dataclasses.field(default_factory=lambda: Tuning(rate=1.5))
    seed: int = 0


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns a row for each format and method."""
    model = load_float(config.model)
    text = stdlib_text.calibration_text(1_200_000, config.seed)
    calibration = calibration_text(model, text, limit=config.windows, context=config.context, seed=config.seed)
    baseline = baseline_of(model, stdlib_text.heldout_text(), context=config.context, limit=config.judged)
    done = {(r["format"], r["method"]): r for r in rundir.logged(out / "metrics.jsonl")}
    for format in config.formats:
        if all((format, method) in done for method in ("gptq", "quarot", "spinquant")):
            continue
        models, said = models_of(config, format, model, calibration)
        kl = {k: np.asarray(kl_by_token(q, baseline), np.float64).mean(axis=1) for k, q in models.items()}
        for method, a in kl.items():
            ratio, half = ratio_of_means(a, kl["quarot"])
            whole = {"kl": float(a.mean()), "kl_half_interval": half_interval(list(a)), "ratio": ratio}
            learned = said if method == "spinquant" else {}
            row = {"format": format, "method": method, **whole, "ratio_half_width": half, **learned}
            done[format, method] = row
            rundir.log(out, row)
            print(f"{format} {method}: KL {row['kl']:.5f}, {ratio:.3f} of quarot's", file=sys.stderr)
    return {"rows": list(done.values())}


def models_of(
    config: Config, format: str, model: Model, calibration: Calibration
) -> tuple[dict[str, Model], dict[str, Any]]:
    """One format by all methods, and what the learning says of itself."""
    act = f"act({config.inputs!r}) >> " if config.inputs else ""
    line = f"{act}{format} >> {config.recipe}"
    learned_on = None if config.inputs else Plan.from_dict({"rules": {"layers_*": format, "*": config.outside}})
    plan = Plan.from_dict({"rules": {"layers_*": line, "*": f"rtn:{config.outside}"}})
    clock = time.perf_counter()
    spun, found = learn_rotations(
        model, learned_on, calibration, config.tuning, inputs=config.inputs, seed=config.seed
    )  # fmt: skip
    said = {"steps": found.steps, "kept": found.kept, "seconds": time.perf_counter() - clock,
            "first_heldout": found.first_loss, "heldout": found.loss}  # fmt: skip
    print(f"{format}: {found}", file=sys.stderr)
    floats = {"gptq": model, "quarot": rotated(model, config.seed, untie=True), "spinquant": spun}
    return {k: quantize_model(m, plan, "rtn", calibration)[0] for k, m in floats.items()}, said
