"""qjax against llama.cpp's own quantizer with an imatrix: same types, same bytes, judged by llama.cpp.

    LLAMA_CPP_LIB_PATH=<folder of libllama.so> qjax run configs/against_llamacpp.toml

For each seed a calibration text is drawn, disjoint from the text judged on. llama.cpp gets an importance matrix of that
text (mean squared activations of the float model at every weight) and makes its file by llama_model_quantize; each
recipe makes one of the same mix from the same text, an eighth of which it holds out. All files are unpacked to F32 and
run by llama.cpp; KL divergence is that to the float model's file, token by token. `ratio` is a recipe's mean KL over
llama.cpp's of the same seed and mix.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from qjax import recipes, rundir
from qjax.calibrate import observe
from qjax.errors import UserError
from qjax.evaluate import llamacpp
from qjax.evaluate.intervals import half_interval
from qjax.evaluate.judge import windows_of
from qjax.io.checkpoint import load, save
from qjax.io.gguf_read import read_gguf
from qjax.io.text import read_text
from qjax.models import stdlib_text
from qjax.models.families import weight_names
from qjax.models.model import Model, forward
from qjax.pipeline.calibrated import quantize_model, survey_model
from qjax.pipeline.windows import calibration_text
from qjax.plan.mixes import mix as plan_of_mix

THEIRS = "llama.cpp + imatrix"


@dataclasses.dataclass(frozen=True)
class Config:
    """The contest."""

    model: str = "reference"
    mixes: tuple[str, ...] = ("Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_NL", "Q4_0")  # llama-quantize's names
    recipes: tuple[str, ...] = ("best_gguf",)
    seeds: tuple[int, ...] = (0, 1, 2)  # each draws another calibration text
    text: Path | None = None  # a UTF-8 text, or a JSON list of texts; none: the standard library's modules
    calibration_windows: int = 64  # at most
    context: int | None = None  # tokens a window, in calibration and judging; none: 512 or the model's
    windows: int = 64  # judged, at most
    threads: int = 1  # of llama.cpp; its threads spin, so more than the idle cores are slower than one
    keep: bool = False  # leave the GGUF files of the first seed in the run directory


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns all rows, the summary, and what machine made them."""
    model = load(config.model)
    chosen = {text: recipes.recipe(text) for text in config.recipes}
    context = config.context or min(512, model.config.context)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        scratch = Path(folder)
        source = scratch / "float.gguf"
        save(model, source)
        judged = windows_of(model, texts(config.text, None)[0], context=context, limit=config.windows)
        judge = llamacpp.judge_of(source, judged.tokens, judged.first, scratch, config.threads)
        for seed in config.seeds:
            calibration = calibration_text(
                model, texts(config.text, seed)[1], context=context, limit=config.calibration_windows, seed=seed
            )
            importance = importance_of(model, calibration.tokens)
            seen = survey_model(model, calibration) if any(r.requires for r in chosen.values()) else None
            for mix in config.mixes:
                theirs = scratch / f"{mix}.llamacpp.gguf"
                clock = time.perf_counter()
                llamacpp.quantize(source, theirs, mix, importance, threads=config.threads)
                seconds = time.perf_counter() - clock
                first = row_of(judge, theirs, mix, THEIRS, seed, seconds)
                rows.append(first | {"ratio": 1.0})
                rundir.log(out, rows[-1])
                plan = plan_of_mix(mix, model.config, has_imatrix=True)
                for name, recipe in chosen.items():
                    ours = (out if config.keep and seed == config.seeds[0] else scratch) / f"{mix}.{len(rows)}.gguf"
                    clock = time.perf_counter()
                    quantized, report = quantize_model(model, plan, recipe, calibration, seen=seen)
                    save(quantized, ours)
                    seconds = time.perf_counter() - clock
                    row = row_of(judge, ours, mix, name, seed, seconds)
                    same_tensors(ours, theirs)
                    calibrated = [t.calibration for t in report.tensors if t.calibration]
                    for key in ("first_loss", "loss", "first_heldout_loss", "heldout_loss"):
                        found = [getattr(c, key) for c in calibrated if getattr(c, key) is not None]
                        row[key] = statistics.fmean(found) if found else None
                    row["ratio"] = row["kl_mean"] / first["kl_mean"]
                    rows.append(row)
                    rundir.log(out, row)
                    print(
                        f"seed {seed} {mix} {name}: KL {row['kl_mean']:.5f}, {row['ratio']:.3f} of llama.cpp's",
                        file=sys.stderr,
                    )
    summary = summarize(rows)
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table(summary))
    return {
        "rows": rows,
        "summary": summary,
        "machine": machine(),
        "judged": {"windows": len(judged), "context": context},
    }


def texts(path: Path | None, seed: int | None) -> tuple[str, str]:
    """(the text judged on, the calibration text of a seed); disjoint, the first the same for every seed."""
    if path is None:
        return stdlib_text.heldout_text(), "" if seed is None else stdlib_text.calibration_text(1_200_000, seed)
    if path.suffix == ".json":
        parts = json.loads(read_text(path))
    else:
        parts = read_text(path).split("\n\n")
    held = [p for i, p in enumerate(parts) if i % 4 == 3]
    rest = [p for i, p in enumerate(parts) if i % 4 != 3]
    rest.sort(key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).hexdigest())
    return "\n\n".join(held), "\n\n".join(rest)


def importance_of(model: Model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """llama.cpp's imatrix: mean squared activation at every weight, by GGUF name."""
    config = model.config
    batches = [jnp.asarray(t) for t in np.array_split(tokens, max(1, len(tokens) // 8))]
    stats = observe(partial(forward, config), model.dense, batches, kinds=("h",))
    paths = {w.gguf: "/".join(w.path) for w in weight_names(config)}
    return {gguf: np.asarray(stats[path].h) for gguf, path in paths.items() if path in stats}


def row_of(judge: llamacpp.Judge, file: Path, mix: str, recipe: str, seed: int, seconds: float) -> dict[str, Any]:
    """The judgement of one file."""
    found = dataclasses.asdict(llamacpp.judge_file(judge, file))
    return {
        "mix": mix,
        "recipe": recipe,
        "seed": seed,
        "bytes": file.stat().st_size,
        "seconds": round(seconds, 1),
        **found,
    }


def same_tensors(ours: Path, theirs: Path) -> None:
    """Raise UserError unless two files hold the same tensors in the same types, and so the same bytes of weights."""
    a, b = ({t.name: (t.type, t.nbytes) for t in read_gguf(f).tensors.values()} for f in (ours, theirs))
    if a != b:
        differs = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        found = f"{a.get(differs[0])} and {b.get(differs[0])}"
        raise UserError(f"{ours.name} and {theirs.name} differ in {differs[0]}: {found}")


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and the half width of the 95 % interval of the ratio (Student's t)."""
    made = []
    for mix, recipe in dict.fromkeys((r["mix"], r["recipe"]) for r in rows):
        mine = [r for r in rows if (r["mix"], r["recipe"]) == (mix, recipe)]
        ratios = [r["ratio"] for r in mine]
        half = half_interval(ratios)
        mean = {
            k: statistics.fmean(r[k] for r in mine)
            for k in ("kl_mean", "kl_p99", "same_top_percent", "log_ratio", "seconds")
        }
        made.append(
            {
                "mix": mix,
                "recipe": recipe,
                "seeds": len(mine),
                **mean,
                "ratio": statistics.fmean(ratios),
                "ratio_half_width": half,
            }
        )
    return made


def table(summary: list[dict[str, Any]]) -> Table:
    """For `rich.print`."""
    made = Table()
    for column in ("mix", "recipe", "mean KL", "99 % KL", "same top, %", "ln ppl ratio", "KL / llama.cpp's", "s"):
        made.add_column(column, justify="left" if column in ("mix", "recipe") else "right")
    for s in summary:
        half = "" if s["ratio_half_width"] is None else f" ± {s['ratio_half_width']:.3f}"
        made.add_row(
            s["mix"], s["recipe"], f"{s['kl_mean']:.5f}", f"{s['kl_p99']:.4f}", f"{s['same_top_percent']:.2f}",
            f"{s['log_ratio']:.5f}", f"{s['ratio']:.3f}{half}", f"{s['seconds']:.1f}",
        )  # fmt: skip
    return made


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {**rundir.machine(), "llama-cpp-python": version("llama-cpp-python")}
