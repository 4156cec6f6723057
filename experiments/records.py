"""The records: the lowest KL at so many bits on the reference model, each of which had to beat the one before.

    qjax run configs/records.toml

A class is a number of bits that a weight of the blocks may have at most, scales, zeros and outliers counted. Bits of
the blocks and not of the whole model: embedding and head are Q8_0 for all, and they are a seventh of this small model
but a hundredth of those that it stands for.

Entries (a recipe with its format, as in methods.py) challenge in the order of the config, after the records that stand.
These are judged again beside them: on the same windows, with the same calibration texts, by the same code, and by the
`line` of stages that their name stood for, for a name may come to stand for a better one. An entry is
a new record of its class if its KL is lower with every calibration text and chance would do as well with a probability
below `level`: a permutation test of the differences of windows, each the mean over calibration texts. Where a class has
no record, the first entry that fits is one, without a test. `history` gets a row for each and loses none.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate.divergence import Baseline
from qjax.evaluate.intervals import chance_of_gain, half_interval
from qjax.evaluate.judge import baseline_of, window_divergences
from qjax.io.checkpoint import load_float
from qjax.models import stdlib_text
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model, survey_model
from qjax.pipeline.windows import calibration_text
from qjax.plan import Plan, decoder_weights
from qjax.recipes import Recipe
from qjax.report.build import build
from qjax.report.result import read, write
from qjax.report.tables import markdown

Row = dict[str, Any]
TITLE = "Records: the lowest KL at so many bits"
NOTE = (
    "bits of the blocks' matrices, at most; embedding and head are Q8_0 for all; KL and its interval over calibration "
    "texts; p of a permutation test against the record before, judged beside it"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Who challenges."""

    model: str = "reference"
    entries: tuple[str, ...] = ("gptq:uint2_g64",)
    classes: tuple[float, ...] = (2.0, 2.5, 3.0, 4.0, 4.5)  # bits of the blocks, at most
    history: Path = Path("experiments/results/records.json")  # read first, and written where a record falls
    level: float = 0.05
    tokens: int = 8_192  # judged, in whole windows
    context: int = 512  # tokens a window
    calibration_windows: int = 16  # at most; an eighth is held out
    seeds: tuple[int, ...] = (0, 1, 2)  # calibration texts


def run(config: Config, out: Path) -> dict[str, Any]:
    """Judge standing records and entries, whose rows an interrupted run keeps; write the history where one falls."""
    history = records_of(config.history)
    standing = [r["line"] for r in {r["at_most_bits"]: r for r in history}.values()]
    names = {r["line"]: r["recipe"] for r in history} | {line_of(entry): entry for entry in config.entries}
    lines = tuple(dict.fromkeys([*standing, *map(line_of, config.entries)]))
    model = load_float(config.model)
    chosen = {line: recipe_of(line, model) for line in lines}
    runs = judged(config, model, chosen, out)
    facts = {"commit": commit(), "date": datetime.now(UTC).date().isoformat(), "config": config_name()}
    new = challenge(runs, lines, config.classes, config.level, history, facts)
    fallen = [{**r, "recipe": names[r["line"]], "before": names.get(r["before"])} for r in new]
    if fallen:
        keep(config, [*history, *fallen])
    rows = [{"recipe": names[line], **summary(runs, line)} for line in lines]
    found = {"records": [*history, *fallen], "rows": rows, "runs": runs}
    table = build({"records": found["records"]}, title="", command="-").tables
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print("\n".join(map(markdown, table)))
    print(f"{len(fallen)} new records{f' in {config.history}' if fallen else ''}")
    return found


def line_of(entry: str) -> str:
    """The stages of an entry, in one line; what is no recipe is refused where it is read as one."""
    try:
        return str(recipes.recipe(entry))
    except UserError:
        return entry


def recipe_of(name: str, model: Model) -> tuple[Recipe, Plan]:
    """The recipe of a name and the plan of its format; what the model cannot take is refused."""
    recipe = recipes.recipe(name)
    if recipe.format is None:
        raise UserError(f"entries: {name!r} names no format; write {name}:uint2_g64")
    plan = Plan.from_dict({"rules": {"layers_*": recipe.format.name, "*": "rtn:Q8_0"}})
    plan.assign(decoder_weights(model.config))
    return recipe, plan


def judged(config: Config, model: Model, chosen: Mapping[str, tuple[Recipe, Plan]], out: Path) -> list[Row]:
    """A row of every entry with every calibration text: its bits, and the KL of each window."""
    done = {(r["seed"], r["line"]): r for r in rundir.logged(out / "metrics.jsonl")}
    baseline: Baseline | None = None
    for seed in config.seeds:
        for name in chosen:  # what looks at no text comes to the same with all
            if not chosen[name][0].requires and (config.seeds[0], name) in done:
                done.setdefault((seed, name), {**done[config.seeds[0], name], "seed": seed})
        left = [name for name in chosen if (seed, name) not in done]
        if not left:
            continue
        if baseline is None:
            windows = max(1, config.tokens // config.context)
            baseline = baseline_of(model, stdlib_text.heldout_text(), context=config.context, limit=windows)
        text = stdlib_text.calibration_text(1_200_000, seed)
        limit = config.calibration_windows
        calibration = calibration_text(model, text, limit=limit, seed=seed, context=config.context)
        asked = [chosen[name][0] for name in left]
        two_sided = any(r.two_sided for r in asked)
        seen = survey_model(model, calibration, two_sided) if any(r.sensitive for r in asked) else None
        for name in left:
            recipe, plan = chosen[name]
            clock = time.perf_counter()
            quantized, report = quantize_model(model, plan, recipe, calibration, seen=seen)
            seconds = time.perf_counter() - clock
            inside = [t for t in report.tensors if t.name.startswith("layers_") and not t.kept]
            bits = 8 * sum(t.nbytes for t in inside) / sum(np.prod(t.shape) for t in inside)
            kl = window_divergences(quantized, baseline).tolist()
            row = {"line": name, "seed": seed, "layer_bits": float(bits), "windows": kl, "seconds": seconds}
            done[seed, name] = row
            rundir.log(out, row)
            print(f"seed {seed} {name}: KL {statistics.fmean(kl):.5f}, {bits:.3f} bits, {seconds:.1f} s",
                  file=sys.stderr)  # fmt: skip
    return [done[seed, name] for seed in config.seeds for name in chosen]


def challenge(
    runs: Sequence[Row], names: Sequence[str], classes: Sequence[float], level: float, history: Sequence[Row],
    facts: Mapping[str, str],
) -> list[Row]:  # fmt: skip
    """The records that fall, in order.

    Args:
      runs: a row of every name and calibration text.
      names: who challenges, in this order.
      classes: bits at most.
      level: of the test.
      history: the records so far; those that stand are among the runs.
      facts: commit, date and config of a new one.
    """
    by_text = {name: np.array([r["windows"] for r in runs if r["line"] == name]) for name in names}
    bits = {name: max(r["layer_bits"] for r in runs if r["line"] == name) for name in names}
    stands = {r["at_most_bits"]: r["line"] for r in history}
    fallen = []
    for name in names:
        for most in classes:
            before = stands.get(most)
            if bits[name] > most or name == before:
                continue
            p = None if before is None else chance(by_text[name], by_text[before])
            if p is not None and p >= level:
                continue
            stands[most] = name
            fallen.append({"at_most_bits": most, **summary(runs, name), "p_value": p, "before": before, **facts})
    return fallen


def chance(new: np.ndarray, old: np.ndarray) -> float:
    """How likely so great a gain is by chance, of KLs [texts, windows]; 1 where it is none with some text."""
    difference = new - old
    return chance_of_gain(difference.mean(axis=0)) if (difference.mean(axis=1) < 0).all() else 1.0


def summary(runs: Sequence[Row], name: str) -> Row:
    """The mean KL of an entry over calibration texts, with half its 95 % interval."""
    own = [r for r in runs if r["line"] == name]
    kl = [statistics.fmean(r["windows"]) for r in own]
    return {
        "line": name, "layer_bits": max(r["layer_bits"] for r in own), "kl": statistics.fmean(kl),
        "kl_half_interval": half_interval(kl), "texts": len(own),
    }  # fmt: skip


def records_of(path: Path) -> list[Row]:
    """The rows of a history; none where there is no such file."""
    tables = {t.name: t for t in read(path).tables} if path.is_file() else {}
    if tables and "records" not in tables:
        raise UserError(f"{path}: has no table records; give the history of another file")
    return [dict(row) for row in tables["records"].rows] if tables else []


def keep(config: Config, rows: Sequence[Row]) -> None:
    """Write the history: the facts of its run are those of the newest records."""
    facts = rundir.describe(config=config)
    made = build(
        {"records": list(rows)}, title=TITLE, command="qjax run configs/records.toml", note=NOTE, manifest=facts
    )
    write(made, config.history)


def commit() -> str:
    """That of the source tree; + where it holds changes that are not committed."""
    git = rundir.git_commit() or {"commit": "unknown", "changed": False}
    return git["commit"][:10] + ("+" if git["changed"] else "")


def config_name() -> str:
    """The config of the command line."""
    return next((Path(part).name for part in rundir.command_line() if part.endswith(".toml")), "")
