"""A bit budget against llama-quantize's hand-made mixes: the same bytes, the same rounding, judged by llama.cpp.

    LLAMA_CPP_LIB_PATH=<folder of libllama.so> qjax run configs/budget.toml

For each calibration text and mix `qjax plan` chooses formats for the mix's bytes, and both, plan and mix, are rounded
by the same recipe on the same text. Files are unpacked to F32 and run by llama.cpp; KL divergence is that to the float
model's file. `ratio` is the plan's mean KL over the mix's of the same text. Beside them stand random plans of the same
formats, rounded as formats are tried: what the sum of their parts promised, and the KL that was measured.

A killed run goes on with the same command and its --out.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qjax import rundir
from qjax.budget import plan_for
from qjax.budget.search import Found, formats_of
from qjax.budget.told import rows_of
from qjax.evaluate import llamacpp
from qjax.evaluate.intervals import half_interval
from qjax.evaluate.judge import windows_of
from qjax.io.checkpoint import load_float, save
from qjax.io.text import read_text, texts_at
from qjax.models import stdlib_text
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.windows import calibration_text
from qjax.plan import mix
from qjax.recipes import recipe


@dataclasses.dataclass(frozen=True)
class Config:
    """The contest."""

    model: str = "reference"
    mixes: tuple[str, ...] = ("Q3_K_M", "Q4_K_M")  # whose bytes are the budget
    recipe: str = "best_gguf"  # of both files
    seeds: tuple[int, ...] = (0, 1, 2)  # each draws another calibration text
    text: Path | None = None  # judged on, UTF-8; none: the standard library's modules
    calibration: tuple[Path, ...] = ()  # files and folders; none: other modules of the standard library
    calibration_windows: int = 64
    plan_windows: int = 16  # of them: half to measure formats on, half to check plans on
    context: int | None = None  # tokens a window; none: 512 or the model's
    windows: int = 64  # judged, at most
    measured: int = 2  # formats of a group that are run
    random: int = 24  # plans of random formats
    threads: int = 1  # of llama.cpp


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns rows, their summary, the plans and the random ones."""
    model, made = load_float(config.model), recipe(config.recipe)
    context = config.context or min(512, model.config.context)
    done = {(r["seed"], r["mix"], r["formats"]): r for r in rundir.logged(out / "metrics.jsonl")}
    tables: dict[str, list[dict[str, Any]]] = {"plans": [], "tensors": [], "parts": []}
    text = stdlib_text.heldout_text() if config.text is None else read_text(config.text)
    judged = windows_of(model, text, context=context, limit=config.windows)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        scratch = Path(folder)
        save(model, scratch / "float.gguf")
        judge = llamacpp.judge_of(scratch / "float.gguf", judged.tokens, judged.first, scratch, config.threads)
        for seed in config.seeds:
            given = (
                texts_at(config.calibration) if config.calibration else stdlib_text.calibration_text(1_200_000, seed)
            )
            calibration = calibration_text(model, given, context=context, limit=config.calibration_windows, seed=seed)
            tokens = np.random.default_rng(seed).permutation(calibration.tokens)[: config.plan_windows]
            for name in config.mixes:
                clock = time.perf_counter()
                plan, found = plan_for(model, tokens, like=name, measured=config.measured, progress=told)
                seconds = time.perf_counter() - clock
                of = f"{name}, text {seed}"
                rows = rows_of(model.config, plan, found)
                tables["plans"] += [{"of": of, **row} for row in rows["plans"]]
                tables["tensors"] += [{"of": of, **row} for row in rows["tensors"]] if seed == config.seeds[0] else []
                if not tables["parts"]:
                    tables["parts"] = random_plans(found, config.random)
                for formats, chosen in (("mix", mix(name, model.config, has_imatrix=True)), ("plan", plan)):
                    if (seed, name, formats) in done:
                        continue
                    clock = time.perf_counter()
                    quantized, report = quantize_model(model, chosen, made, calibration)
                    file = scratch / "small.gguf"
                    save(quantized, file)
                    row = {
                        "seed": seed, "mix": name, "formats": formats, "recipe": config.recipe,
                        "whole_bits": report.bits_per_weight, "bytes": report.nbytes,
                        "plan_seconds": round(seconds, 1) if formats == "plan" else None,
                        "seconds": round(time.perf_counter() - clock, 1),
                        **dataclasses.asdict(llamacpp.judge_file(judge, file)),
                    }  # fmt: skip
                    file.unlink()
                    done[seed, name, formats] = row
                    rundir.log(out, row)
                    print(f"seed {seed} {name} {formats}: KL {row['kl_mean']:.5f}", file=sys.stderr)
    contest = list(done.values())
    for row in contest:
        row["ratio"] = row["kl_mean"] / done[row["seed"], row["mix"], "mix"]["kl_mean"]
    summary = summarize(contest)
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table(summary))
    where = {**rundir.machine(), "llama-cpp-python": version("llama-cpp-python")}
    return {"rows": contest, "summary": summary, **tables, "machine": where}


def told(what: str, done: int, total: int) -> None:
    """A line now and then."""
    if done == total or done % 50 == 0:
        print(f"{what} {done}/{total}", file=sys.stderr)


def random_plans(found: Found, count: int) -> list[dict[str, Any]]:
    """Plans of random formats: the sum of their groups' costs, and their KL on the windows those were measured on."""
    rng, rows = np.random.default_rng(0), []
    for n in range(count):
        lean = rng.uniform(-2, 2)  # plans of few bits and of many
        picks = []
        for s in found.sensitivities:
            p = np.exp(lean * np.linspace(-1, 1, len(s.choices)))
            picks.append(s.choices[rng.choice(len(s.choices), p=p / p.sum())])
        kl = found.rounder.kl(formats_of(found.sensitivities, picks), found.rounder.runs)
        rows.append({"name": f"random {n}", "predicted": sum(c.cost for c in picks), "kl": float(kl.mean())})
    return rows


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over texts, and the half width of the 95 % interval of the ratio (Student's t)."""
    made = []
    for key in dict.fromkeys((r["mix"], r["formats"]) for r in rows):
        mine = [r for r in rows if (r["mix"], r["formats"]) == key]
        ratios = [r["ratio"] for r in mine]
        means = {k: statistics.fmean(r[k] for r in mine) for k in ("whole_bits", "kl_mean", "same_top_percent")}
        half = half_interval(ratios)
        made.append(
            {"mix": key[0], "formats": key[1], "seeds": len(mine), **means,
             "ratio": statistics.fmean(ratios), "ratio_half_width": half}
        )  # fmt: skip
    return made


def table(summary: list[dict[str, Any]]) -> Table:
    """For `rich.print`."""
    made = Table()
    for head in ("mix", "formats", "bits", "mean KL", "same top, %", "KL / the mix's"):
        made.add_column(head, justify="left" if head in ("mix", "formats") else "right")
    for s in summary:
        half = "" if s["ratio_half_width"] is None else f" ± {s['ratio_half_width']:.3f}"
        made.add_row(s["mix"], s["formats"], f"{s['whole_bits']:.3f}", f"{s['kl_mean']:.5f}",
                     f"{s['same_top_percent']:.2f}", f"{s['ratio']:.3f}{half}")  # fmt: skip
    return made
