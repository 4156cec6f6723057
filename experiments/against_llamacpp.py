"""qjax against llama.cpp's own quantizer with an imatrix: same types, same bytes, judged by llama.cpp.

    LLAMA_CPP_LIB_PATH=<folder of libllama.so> qjax run configs/against_llamacpp.toml

For each seed a calibration text is drawn, disjoint from the text judged on, or windows of given ones are taken.
llama.cpp gets an importance matrix of that text (mean squared activations of the float model at every weight) and makes
its file by llama_model_quantize; each recipe makes one of the same mix from the same text, of which it holds a part
out. All files are unpacked to F32 and run by llama.cpp; KL divergence is that to the float model's file, token by
token. `ratio` is a recipe's mean KL over llama.cpp's of the same seed and mix; with several amounts of text, over
llama.cpp's of the largest. `seconds` of a recipe that looks at the float model's gradients hold that look, which
recipes share; llama.cpp's are without its importance matrix.

A killed run goes on with the same command and its --out.
"""

from __future__ import annotations

import dataclasses
import functools
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
from qjax.evaluate.cost import watch_memory
from qjax.evaluate.intervals import half_interval
from qjax.evaluate.judge import windows_of
from qjax.io.checkpoint import load, load_float, save
from qjax.io.gguf_read import read_gguf
from qjax.io.text import read_text, texts_at
from qjax.models import stdlib_text
from qjax.models.families import weight_names
from qjax.models.model import Model, forward
from qjax.models.own_text import own_tokens, written
from qjax.pipeline.calibrated import quantize_model, survey_model
from qjax.pipeline.report import Report
from qjax.pipeline.windows import Calibration, calibration_of, calibration_text
from qjax.plan.mixes import mix as plan_of_mix
from qjax.recipes import Recipe

THEIRS = "llama.cpp + imatrix"
OWN = "self"  # a calibration text that the model writes


@dataclasses.dataclass(frozen=True)
class Config:
    """The contest."""

    model: str = "reference"
    mixes: tuple[str, ...] = ("Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_NL", "Q4_0")  # llama-quantize's names
    recipes: tuple[str, ...] = ("best_gguf",)
    seeds: tuple[int, ...] = (0, 1, 2)  # each draws another calibration text
    text: Path | None = None  # a UTF-8 text, or a JSON list of texts; none: the standard library's modules
    calibration: tuple[Path, ...] = ()  # files and folders, or self; none: the parts of `text` that are not judged on
    calibration_windows: tuple[int, ...] = (64,)  # at most; each amount is a row
    context: int | None = None  # tokens a window, in calibration and judging; none: 512 or the model's
    windows: int = 64  # judged, at most
    threads: int = 1  # of llama.cpp; its threads spin, so more than the idle cores are slower than one
    keep: bool = False  # leave the GGUF files of the first seed in the run directory
    massive: bool = True  # tokens with a massive activation are told apart; False: their gradients count as they are
    generated: int = 0  # tokens that each file of the first seed writes behind `prompt`, greedily
    prompt: str = "The history of"


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns all rows, the summary, and what machine made them."""
    model = load_float(config.model)
    chosen = {text: recipes.recipe(text) for text in config.recipes}
    context = config.context or min(512, model.config.context)
    done = {
        (r["seed"], r["calibration_windows"], r["mix"], r["recipe"]): r for r in rundir.logged(out / "metrics.jsonl")
    }
    with tempfile.TemporaryDirectory(dir=out) as folder:
        contest = Contest(config, model, context, chosen, done, out, Path(folder))
        for seed in config.seeds:
            for windows in sorted(config.calibration_windows, reverse=True):
                contest.hold(seed, windows)
        judged = {"windows": len(contest.judged), "context": context}
    rows = list(done.values())
    for row in rows:
        most = max(r["calibration_windows"] for r in rows if (r["seed"], r["mix"]) == (row["seed"], row["mix"]))
        row["ratio"] = row["kl_mean"] / done[row["seed"], most, row["mix"], THEIRS]["kl_mean"]
    summary = summarize(rows)
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table(summary))
    return {"rows": rows, "summary": summary, "machine": machine(), "judged": judged}


Key = tuple[int, int, str, str]  # seed, windows of calibration text, mix, recipe


@dataclasses.dataclass
class Contest:
    """What all rows share: the float model, its file, and llama.cpp's logits of it."""

    config: Config
    model: Model
    context: int
    chosen: dict[str, Recipe]
    done: dict[Key, dict[str, Any]]
    out: Path
    scratch: Path

    @functools.cached_property
    def source(self) -> Path:
        """The float model as a file."""
        save(self.model, self.scratch / "float.gguf")
        return self.scratch / "float.gguf"

    @functools.cached_property
    def judged(self) -> np.ndarray:
        """Windows of tokens."""
        return self._windows.tokens

    @functools.cached_property
    def _windows(self) -> Any:
        text = texts(self.config.text, None)[0] if not self.config.calibration else read_text(self.config.text or "")
        return windows_of(self.model, text, context=self.context, limit=self.config.windows)

    @functools.cached_property
    def judge(self) -> llamacpp.Judge:
        """llama.cpp, with its logits of the float model."""
        first = self._windows.first
        return llamacpp.judge_of(self.source, self.judged, first, self.scratch, self.config.threads)

    def calibration(self, seed: int, windows: int) -> Calibration:
        """Of the given texts, of the model's own, or of the parts of the judged one that are not judged."""
        if self.config.calibration == (Path(OWN),):
            tokens = own_tokens(self.model, windows, self.context, seed)
            return calibration_of(self.context, tokens, context=self.context, seed=seed)
        given = texts_at(self.config.calibration) if self.config.calibration else texts(self.config.text, seed)[1]
        return calibration_text(self.model, given, context=self.context, limit=windows, seed=seed)

    def hold(self, seed: int, windows: int) -> None:
        """The rows of one calibration text that are not done."""
        names = (THEIRS, *self.chosen)
        left = [(mix, n) for mix in self.config.mixes for n in names if (seed, windows, mix, n) not in self.done]
        if not left:
            return
        calibration = self.calibration(seed, windows)
        seen, importance, surveyed = None, None, 0.0
        if any(n != THEIRS and self.chosen[n].sensitive for _, n in left):
            two_sided = any(n != THEIRS and self.chosen[n].two_sided for _, n in left)
            clock = time.perf_counter()
            seen = survey_model(self.model, calibration, two_sided)
            if not self.config.massive:
                seen = dataclasses.replace(seen, alike=np.zeros_like(seen.alike))
            surveyed = time.perf_counter() - clock
        for mix, name in left:
            kept = self.config.keep and seed == self.config.seeds[0]
            file = (self.out if kept else self.scratch) / f"{mix}.{windows}.{[*names].index(name)}.gguf"
            peak, clock = watch_memory(), time.perf_counter()
            losses: dict[str, Any] = {}
            if name == THEIRS:
                importance = importance_of(self.model, calibration.tokens) if importance is None else importance
                clock = time.perf_counter()
                llamacpp.quantize(self.source, file, mix, importance, threads=self.config.threads)
            else:
                plan = plan_of_mix(mix, self.model.config, has_imatrix=True)
                quantized, report = quantize_model(self.model, plan, self.chosen[name], calibration, seen=seen)
                save(quantized, file)
                losses = means_of(report)
            facts = {"seed": seed, "calibration_windows": windows, "mix": mix, "recipe": name,
                     "calibration_tokens": calibration.tokens.size}  # fmt: skip
            seconds, memory = time.perf_counter() - clock, peak()
            seconds += surveyed if name != THEIRS and self.chosen[name].sensitive else 0.0
            row = {**facts, "seconds": round(seconds, 1), "peak_mb": memory, **row_of(self.judge, file), **losses}
            if self.config.generated and seed == self.config.seeds[0]:
                row["text"] = written(load(file), self.config.prompt, self.config.generated)
            theirs = self.scratch / f"{mix}.{THEIRS}.types"
            same_types(file, theirs)
            self.done[seed, windows, mix, name] = row
            rundir.log(self.out, row)
            if not kept:
                file.unlink()
            print(f"seed {seed}, {windows} windows, {mix} {name}: KL {row['kl_mean']:.5f}", file=sys.stderr)


def means_of(report: Report) -> dict[str, float | None]:
    """Means over weights of what their lines say."""
    calibrated = [t.calibration for t in report.tensors if t.calibration]
    made: dict[str, float | None] = {}
    for key in ("first_loss", "loss", "first_heldout_loss", "heldout_loss", "shrinkage", "cross_share"):
        found = [getattr(c, key) for c in calibrated if getattr(c, key) is not None]
        made[key] = statistics.fmean(found) if found else None
    return {**made, "guarded": float(sum(c.guarded for c in calibrated))}


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


def row_of(judge: llamacpp.Judge, file: Path) -> dict[str, Any]:
    """The judgement of one file."""
    return {"bytes": file.stat().st_size, **dataclasses.asdict(llamacpp.judge_file(judge, file))}


def same_types(file: Path, known: Path) -> None:
    """Raise UserError unless a file holds the tensors and types, and so the bytes of weights, of the first that was
    looked at; `known` keeps them."""
    mine = {t.name: f"{t.type} {t.nbytes}" for t in read_gguf(file).tensors.values()}
    if not known.exists():
        known.write_text(json.dumps(mine))
    theirs = json.loads(known.read_text())
    if mine != theirs:
        differs = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        raise UserError(f"{file.name}: {differs[0]} is {mine.get(differs[0])}, and was {theirs.get(differs[0])}")


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and the half width of the 95 % interval of the ratio (Student's t)."""
    made = []
    for key in dict.fromkeys((r["mix"], r["recipe"], r["calibration_windows"]) for r in rows):
        mine = [r for r in rows if (r["mix"], r["recipe"], r["calibration_windows"]) == key]
        mix, recipe, windows = key
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
                "calibration_windows": windows,
                "calibration_tokens": mine[0]["calibration_tokens"],
                "seeds": len(mine),
                "kl_half_interval": half_interval([r["kl_mean"] for r in mine]),
                **mean,
                "ratio": statistics.fmean(ratios),
                "ratio_half_width": half,
            }
        )
    return made


def table(summary: list[dict[str, Any]]) -> Table:
    """For `rich.print`."""
    made = Table()
    heads = "mix", "recipe", "windows", "mean KL", "99 % KL", "same top, %", "ln ppl ratio", "KL / llama.cpp's", "s"
    for head in heads:
        made.add_column(head, justify="left" if head in ("mix", "recipe") else "right")
    for s in summary:
        half = "" if s["ratio_half_width"] is None else f" ± {s['ratio_half_width']:.3f}"
        found = f"{s['kl_mean']:.5f}", f"{s['kl_p99']:.4f}", f"{s['same_top_percent']:.2f}", f"{s['log_ratio']:.5f}"
        last = f"{s['ratio']:.3f}{half}", f"{s['seconds']:.1f}"
        made.add_row(s["mix"], s["recipe"], str(s["calibration_windows"]), *found, *last)
    return made


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {**rundir.machine(), "llama-cpp-python": version("llama-cpp-python")}
