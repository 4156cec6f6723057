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
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate import report
from qjax.evaluate.divergence import Baseline
from qjax.evaluate.histograms import middle_histograms
from qjax.evaluate.judge import Judgement, baseline_of, judge, kl_by_token
from qjax.evaluate.perplexity import PROTOCOLS
from qjax.evaluate.sizes import by_layer, tensor_rows
from qjax.evaluate.tokens import kl_quantiles, worst_tokens
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
from qjax.report.run_page import write_run_page
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
    shown: str = "Q4_K_M"  # the entry whose layers, weights and worst tokens the report shows; "" for none
    calibration: Path | None = None  # UTF-8 text for recipes; none: a draw of the standard library's other modules
    calibration_windows: int = 64  # at most; an eighth is held out
    seed: int = 0  # of the draw, and of labels drawn from the model


def run(config: Config, out: Path) -> dict:
    """Fill `out` with metrics.jsonl, report.html and one GGUF file. Returns the tables of the report."""
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
    rows, seen = grid(config, model, plans, out)
    rows.sort(key=lambda row: -row.sizes.whole_bits)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(report.table(rows))
    found = {"summary": report.summary(rows), "rows": [row.to_json() for row in rows], **seen}
    note = f"Weights rounded as the recipe in front of an entry says, else to nearest; {report.protocol(rows)}"
    print(f"report: {write_run_page(out, found, title=f'{config.model}: {len(plans)} formats', note=note)}")
    if config.gguf:
        print(f"GGUF:   {out / file_name(config.gguf)}")
    return found


def grid(
    config: Config, model: Model, plans: dict[str, Plan], out: Path
) -> tuple[list[Judgement], dict[str, list[dict[str, Any]]]]:
    """Quantize and judge, one entry at a time; only one quantized model is in memory. Returns also `inside`."""
    text = stdlib_text.heldout_text() if config.text is None else read_text(config.text)
    window = config.context or min(PROTOCOLS[config.protocol], model.config.context)
    found: dict[str, list[dict[str, Any]]] = {}
    text_seen: Calibration | None = None
    seen: Survey | None = None
    with bar("windows") as show:

        def progress(name: str, before: int) -> Callable[[int, int], Any]:
            """Shows the windows of one model on the bar of all: the baseline runs twice."""
            return lambda done, windows: show(before * windows + done, (len(plans) + 2) * windows, name)

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
            done = progress(name, number)
            rows.append(judge(quantized, baseline=baseline, name=name, encode_seconds=seconds, progress=done))
            rundir.log(out, rows[-1].to_json())
            if name == config.shown:
                found = inside(name, quantized, model, baseline)
            if name == config.gguf:
                save(quantized, out / file_name(name), name=f"{Path(config.model).name} {name}")
    return rows, found


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


def inside(name: str, quantized: Model, model: Model, baseline: Baseline) -> dict[str, list[dict[str, Any]]]:
    """Tables of one entry: its tensors, the weights in the middle before and after, KL by token, the worst tokens."""
    tensors = tensor_rows(quantized.params, model.params)
    found = {"tensors": [{"of": name, **row} for row in by_layer(tensors)]}
    found |= middle_histograms(model.params, quantized.params)
    kl = kl_by_token(quantized, baseline)
    found["tokens"] = [{"name": name, **line} for line in kl_quantiles(kl)]
    decode = model.tokenizer.decode if model.tokenizer is not None else str
    return found | {"worst_tokens": worst_tokens(kl, baseline.windows, decode)}
