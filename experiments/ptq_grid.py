"""Every format on one model: what each costs in bits, and what it does to the predictions.

    qjax run configs/quickstart.toml

An entry of `formats` is a GGUF mix by its llama-quantize name (Q4_K_M), or a format for every matrix (NF4, int4_g128;
`pure:Q4_0` where a mix has that name too), and may have a recipe in front (best_gguf:Q4_K_M, gptq:uint4_g128), which
is calibrated on a text disjoint from the judged one. Without a recipe weights are rounded to nearest. The float model
runs once; every quantized one is judged on the same windows: perplexity, KL(float || quantized), how often both find
the same token most probable.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
from rich.console import Console

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate import plots, report
from qjax.evaluate.judge import Judgement, baseline_of, judge
from qjax.evaluate.perplexity import PROTOCOLS
from qjax.evaluate.sizes import TensorRow, named_leaves, tensor_rows
from qjax.io.checkpoint import load_float, save
from qjax.io.text import read_text
from qjax.models import stdlib_text
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model, survey_model
from qjax.pipeline.memory import quantize_params
from qjax.pipeline.survey import Survey
from qjax.pipeline.windows import Calibration, calibration_text
from qjax.plan import Plan, decoder_weights
from qjax.plan.named import plan_named
from qjax.recipes import Recipe
from qjax.terminal import bar


@dataclasses.dataclass(frozen=True)
class Config:
    """What to quantize, how, and what to judge it on."""

    model: str = "reference"  # Hugging Face directory, .gguf, llama2.c .bin or built-in name
    formats: tuple[str, ...] = ("Q8_0", "Q4_K_M", "NF4", "int4_g128")  # mixes and formats
    text: Path | None = None  # UTF-8; none: the held-out modules of Python's standard library
    tokens: int = 16_384  # judged from the start of the text, in whole windows
    context: int | None = None  # tokens a window; none: the protocol's, or the model's if shorter
    protocol: Literal["llama.cpp", "gptq"] = "llama.cpp"  # how the text is cut and scored
    gguf: str = "Q4_K_M"  # the entry written as a GGUF file; "" for none
    shown: str = "Q4_K_M"  # the entry whose error by layer and weight grid the report draws; "" for none
    calibration: Path | None = None  # UTF-8 text for recipes; none: a draw of the standard library's other modules
    calibration_windows: int = 64  # at most; an eighth is held out
    seed: int = 0  # of the draw, and of labels drawn from the model


def run(config: Config, out: Path) -> dict:
    """Fill `out` with metrics.jsonl, report.html and its plots, and one GGUF file. Returns the table's rows."""
    if not config.formats:
        raise UserError('formats: the list is empty; name at least one, as in formats = ["Q4_K_M"]')
    for key in ("gguf", "shown"):
        if getattr(config, key) not in ("", *config.formats):
            raise UserError(f"{key}: {getattr(config, key)!r} is not among the formats")
    model = load_float(config.model)
    plans = {
        name: plan_named(kind, model.config, has_imatrix=bool(how.requires))
        for name, (how, kind) in ((name, split(name)) for name in config.formats)
    }
    for plan in plans.values():  # what does not fit fails before any work
        plan.assign(decoder_weights(model.config))
    rows, tensors = grid(config, model, plans, out)
    rows.sort(key=lambda row: -row.sizes.whole_bits)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(report.table(rows))

    manifest = json.loads(path.read_text()) if (path := out / "manifest.json").is_file() else None
    text = path.read_text() if (path := out / "config.toml").is_file() else None
    page = report.write_report(
        out, rows,
        title=f"{config.model}: {len(plans)} formats", plots=pictures(config, model, rows, tensors), tensors=tensors,
        config=text, manifest=manifest,
        notes="Weights rounded as the recipe in front of an entry says, to the nearest level where there is none.",
    )  # fmt: skip
    print(f"report: {page}")
    if config.gguf:
        print(f"GGUF:   {out / file_name(config.gguf)}")
    return {"rows": [row.to_json() for row in rows]}


def grid(
    config: Config, model: Model, plans: dict[str, Plan], out: Path
) -> tuple[list[Judgement], dict[str, list[TensorRow]]]:
    """Quantize and judge, one entry at a time; only one quantized model is in memory."""
    text = stdlib_text.heldout_text() if config.text is None else read_text(config.text)
    window = config.context or min(PROTOCOLS[config.protocol], model.config.context)
    tensors = {}
    text_seen: Calibration | None = None
    seen: Survey | None = None
    with bar("windows") as show:

        def progress(name: str, before: int) -> Callable[[int, int], None]:
            """Shows the windows of one model on the bar of all: the baseline runs twice."""
            return lambda done, windows: show(before * windows + done, (len(plans) + 2) * windows, name) and None

        baseline = baseline_of(
            model, text, protocol=config.protocol, context=window, limit=max(1, config.tokens // window),
            progress=progress("float baseline", 0),
        )  # fmt: skip
        rows = [judge(model, baseline=baseline, name="float32", progress=progress("float32", 1))]
        rundir.log(out, rows[0].to_json())
        for number, (name, plan) in enumerate(plans.items(), 2):
            recipe = split(name)[0]
            if recipe.requires and text_seen is None:
                text_seen = calibration_of_config(config, model)
                seen = survey_model(model, text_seen)
            clock = time.perf_counter()
            quantized = rounded(model, plan, recipe, text_seen, seen)
            seconds = time.perf_counter() - clock
            qparams = quantized.params
            done = progress(name, number)
            rows.append(judge(quantized, baseline=baseline, name=name, encode_seconds=seconds, progress=done))
            rundir.log(out, rows[-1].to_json())
            if name in (config.shown, config.gguf):
                tensors[name] = tensor_rows(qparams, model.params)
            if name == config.gguf:
                save(quantized, out / file_name(name), name=f"{Path(config.model).name} {name}")
    return rows, tensors


def split(name: str) -> tuple[Recipe, str]:
    """The recipe of an entry, rtn where it names none, and the mix or format."""
    head, colon, rest = name.partition(":")
    return (recipes.recipe(head), rest) if colon and head in recipes.RECIPES else (recipes.rtn(), name)


def file_name(name: str) -> str:
    """The GGUF file of an entry."""
    return f"{name.replace(':', '-')}.gguf"


def calibration_of_config(config: Config, model: Model) -> Calibration:
    """The windows recipes look at."""
    if config.calibration is None:
        text = stdlib_text.calibration_text(1_200_000, config.seed)
    else:
        text = read_text(config.calibration)
    return calibration_text(model, text, limit=config.calibration_windows, seed=config.seed)


def rounded(model: Model, plan: Plan, recipe: Recipe, calibration: Calibration | None, seen: Survey | None) -> Model:
    """The quantized model of one entry."""
    if recipe.requires:
        assert calibration is not None
        return quantize_model(model, plan, recipe, calibration, seen=seen)[0]
    qparams, _ = quantize_params(model.params, plan)
    jax.block_until_ready(qparams)
    return dataclasses.replace(model, params=qparams)


def pictures(
    config: Config, model: Model, rows: list[Judgement], tensors: dict[str, list[TensorRow]]
) -> dict[str, bytes]:
    """Caption -> PNG: both Pareto fronts, and for the entry `shown` its error by layer and the weights on its grid."""
    made = {"KL divergence against bits": plots.pareto_plot(rows, "kl")}
    made["Perplexity against bits"] = plots.pareto_plot(rows, "perplexity")
    if config.shown:
        drawn = tensors[config.shown]
        made["Error by layer"] = plots.error_heatmap(drawn, f"{config.shown}: relative error of the weights, %")
        middle = [row for row in drawn if row.path.endswith("mlp/up/kernel")]
        row = middle[len(middle) // 2]
        axis = -2  # a flax kernel (in, out) is contracted along `in`
        made["Weights on the grid"] = plots.weight_histogram(
            named_leaves(model.params)[row.path], row.format, axis, f"{row.path} in {row.format}"
        )
    return made
