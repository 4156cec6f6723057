"""The named methods on one model at one width: what each does to the predictions, what it stores, what it costs.

    qjax run configs/methods/4bit.toml

An entry of `methods` is a recipe with a format: a name (gptq:uint4_g128) or a line (NF4 >> nearest() >> ldlq()). It
rounds the matrices of the blocks; embedding and head become `outside`, the same for all, to nearest. With a mix of
llama-quantize in the format's place (Q5_K_M, best_gguf:Q5_K_M) the mix decides for all of them. "float" is the model as
it is. What the model cannot take is refused before any work.

Every entry runs once for each calibration text, and the table gives the mean over them with its 95 % interval
(Student's t); entries that look at no text run once. Two methods whose intervals overlap are a tie. Beside it stands
the standard error over the judged windows. At each of `rates` the families of formats are put side by side, and told
apart text by text (evaluate/equal_bits.py); rows of tuned or entropy-coded models are no entries here. A killed run
goes on with the entries that it had not finished. Times of an entry hold what it compiles, and the peak of memory the
float model and what earlier entries left compiled.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate.cost import tokens_per_second, watch_memory
from qjax.evaluate.divergence import Baseline
from qjax.evaluate.equal_bits import Member, at_equal_bits, claims
from qjax.evaluate.intervals import half_interval
from qjax.evaluate.judge import baseline_of, judge
from qjax.formats import find
from qjax.io.checkpoint import load_float
from qjax.io.text import read_text, read_texts
from qjax.models import stdlib_text
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.models.own_text import written
from qjax.pipeline.calibrated import quantize_model, survey_model
from qjax.pipeline.survey import Survey
from qjax.pipeline.windows import Calibration, calibration_text
from qjax.plan import Plan, decoder_weights
from qjax.plan.named import is_mix, plan_named
from qjax.recipes import Recipe
from qjax.rounding import check_grid

FLOAT = "float"
FAMILIES = {"trellis": "trellis", "E8P": "E8P", "additive": "aqlm", "IQ": "IQ[123]_", "scalar": ""}
"""How the names of their formats begin, the first that fits. In this order the KL at equal bits is claimed to rise."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The contest."""

    model: str = "reference"  # Hugging Face directory, .gguf, llama2.c .bin or built-in name
    methods: tuple[str, ...] = ("rtn:uint4_g128", "gptq:uint4_g128")
    outside: str = "Q8_0"  # the format of embedding and head; "keep" leaves them as they are
    text: Path | None = None  # judged, UTF-8; none: the held-out modules of Python's standard library
    tokens: int = 16_384  # judged, in whole windows
    context: int = 512  # tokens a window
    calibration: Path | None = None  # UTF-8, or a JSON list of texts; none: the standard library's other modules, drawn
    calibration_windows: int = 32  # at most; an eighth is held out
    seeds: tuple[int, ...] = (0, 1, 2)  # calibration texts; a file is the same one for all
    generated: int = 0  # tokens that each writes behind `prompt`, greedily, and is timed at; 0: none
    prompt: str = "The history of"
    rates: tuple[float, ...] = ()  # bits of the layers at which families of formats are compared; none: not at all


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: which weight gets which format, and how it is rounded; None for the float model."""

    name: str
    plan: Plan | None = None
    recipe: Recipe | None = None

    @property
    def looks(self) -> bool:
        """Whether its rounding depends on the calibration text."""
        return self.recipe is not None and bool(self.recipe.requires)

    @property
    def family(self) -> str:
        """Of the layers' format; none where there is no single one, or where inputs are rounded too."""
        if self.recipe is None or self.recipe.format is None or any(r.name == "act" for r in self.recipe.reparams):
            return ""
        return next(f for f, begins in FAMILIES.items() if re.match(begins, self.recipe.format.name))

    @property
    def sensitive(self) -> bool:
        """Whether it wants the float model's pass backwards."""
        return self.recipe is not None and bool(self.recipe.sensitive)


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl, whose rows an interrupted run keeps; returns every run and the table."""
    model = load_float(config.model)
    entries = [entry(name, config.outside, model.config) for name in config.methods]
    done = {(r["seed"], r["method"]): r for r in rundir.logged(out / "metrics.jsonl")}
    wanted = [(seed, e) for seed in config.seeds for e in entries if seed == config.seeds[0] or e.looks]
    left = [(seed, e) for seed, e in wanted if (seed, e.name) not in done]
    baseline = baseline_on(config, model) if left else None
    for seed in dict.fromkeys(seed for seed, _ in left):
        own = [e for s, e in left if s == seed]
        calibration = calibration_of(config, model, seed)
        two_sided = any(e.recipe is not None and e.recipe.two_sided for e in own)
        seen = survey_model(model, calibration, two_sided) if any(e.sensitive for e in own) else None
        for e in own:
            assert baseline is not None
            row = {"method": e.name, "recipe": str(e.recipe or FLOAT), "seed": seed}
            quantized, numbers = judged(e, model, calibration, seen, baseline)
            row |= numbers
            if config.generated:
                prompt = baseline.windows.tokens[0, :32].tolist()
                row["tokens_per_second"] = tokens_per_second(quantized, prompt, config.generated)
                row["text"] = written(quantized, config.prompt, config.generated)
            done[seed, e.name] = row
            rundir.log(out, row)
            print(f"seed {seed} {e.name}: KL {row['kl_mean']:.5f}, {row['whole_bits']:.3f} bits in all, "
                  f"{row['encode_seconds']:.1f} s", file=sys.stderr)  # fmt: skip
    runs = [done[seed, e.name] for seed, e in wanted]
    rows = [summary(e.name, [r for r in runs if r["method"] == e.name]) for e in entries]
    rows.sort(key=lambda row: -row["kl"])
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table(rows))
    found = {"rows": rows, "runs": runs}
    if config.rates:
        families = {e.name: e.family for e in entries if e.family}
        rows[:] = [row | {"family": families[row["method"]]} if row["method"] in families else row for row in rows]
        members = members_of(runs, families, len(config.seeds))
        found |= {
            "equal_bits": at_equal_bits(members, config.rates),
            "claims": claims(members, config.rates, list(FAMILIES)),
        }
    return found


def members_of(runs: Sequence[dict[str, Any]], families: Mapping[str, str], texts: int) -> list[Member]:
    """The entries with a family; what looks at no text has one KL for all."""
    made = []
    for name, family in families.items():
        own = [r for r in runs if r["method"] == name]
        kl = tuple(r["kl_mean"] for r in own)
        made.append(Member(name, family, own[0]["layer_bits"], kl if len(kl) == texts else kl[:1] * texts))
    return made


def entry(name: str, outside: str, decoder: DecoderConfig) -> Entry:
    """The plan and the recipe of a name.

    Raises:
      UserError: it names no format, or the model cannot take it; the message begins with the entry.
    """
    if name == FLOAT:
        return Entry(name)
    try:
        how, _, kind = name.rpartition(":")
        if is_mix(kind) and find(kind) is None:
            recipe = recipes.recipe(how or "rtn")
            plan = plan_named(kind, decoder, has_imatrix=bool(recipe.requires))
        else:
            recipe = recipes.recipe(name)
            if recipe.format is None:
                raise UserError(f"it names no format; write {name}:uint4_g128")
            rest: Any = outside if outside == "keep" else f"rtn:{outside}"
            plan = Plan.from_dict({"rules": {"layers_*": recipe.format.name, "*": rest}})
        for a in plan.assign(decoder_weights(decoder)):
            if a.format is not None:
                check_grid((a.recipe or recipe).roundings, a.format, a.weight.path)
    except UserError as error:
        raise UserError(f"methods: {name!r}: {error}") from None
    return Entry(name, plan, recipe)


def baseline_on(config: Config, model: Model) -> Baseline:
    """The float model on the windows that judge."""
    text = stdlib_text.heldout_text() if config.text is None else read_text(config.text)
    context = min(config.context, model.config.context)
    return baseline_of(model, text, context=context, limit=max(1, config.tokens // context))


def judged(
    e: Entry, model: Model, calibration: Calibration, seen: Survey | None, baseline: Baseline
) -> tuple[Model, dict[str, Any]]:
    """(the model of one entry, its numbers); `peak_mb` is of its rounding."""
    peak, clock = watch_memory(), time.perf_counter()
    quantized, inside = model, []
    if e.plan is not None and e.recipe is not None:
        quantized, report = quantize_model(model, e.plan, e.recipe, calibration, seen=seen)
        inside = [t for t in report.tensors if t.name.startswith("layers_") and not t.kept]
    seconds, memory = time.perf_counter() - clock, peak()
    numbers = judge(quantized, baseline=baseline, name=e.name, encode_seconds=seconds).to_json()
    if inside:
        numbers["layer_bits"] = 8 * sum(t.nbytes for t in inside) / sum(math.prod(t.shape) for t in inside)
    if memory is not None:
        numbers["peak_mb"] = memory
    return quantized, numbers


def calibration_of(config: Config, model: Model, seed: int) -> Calibration:
    """The windows of one seed."""
    if config.calibration is None:
        text = stdlib_text.calibration_text(1_200_000, seed)
    else:
        text = "\n\n".join(read_texts(config.calibration))
    return calibration_text(model, text, limit=config.calibration_windows, seed=seed, context=config.context)


def summary(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the calibration texts, half the 95 % interval of the KL, and its error over judged windows."""
    kl = [r["kl_mean"] for r in runs]
    half = {} if len(runs) < 2 else {"kl_half_interval": half_interval(kl)}
    means = {
        "kl": "kl_mean", "kl_se_clustered": "kl_mean_se_clustered", "perplexity": "perplexity",
        "same_top_percent": "same_top_percent", "layer_bits": "layer_bits", "whole_bits": "whole_bits",
        "bytes": "bytes", "seconds": "encode_seconds", "peak_mb": "peak_mb", "tokens_per_second": "tokens_per_second",
    }  # fmt: skip
    measured = {key: of for key, of in means.items() if runs[0].get(of) is not None}
    return {"method": name, "texts": len(runs), **half} | {
        key: statistics.fmean(r[of] for r in runs) for key, of in measured.items()
    }


COLUMNS = {  # key: (title, digits)
    "kl": ("KL", 5), "kl_half_interval": ("+-", 5), "kl_se_clustered": ("s.e. of windows", 5),
    "perplexity": ("perplexity", 3), "same_top_percent": ("same top, %", 1), "layer_bits": ("bits in layers", 3),
    "whole_bits": ("bits in all", 3), "bytes": ("bytes", 0), "seconds": ("seconds", 1), "peak_mb": ("peak, MB", 0),
    "tokens_per_second": ("tokens/s", 1),
}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For `rich.print`: the worst first; columns that some row has."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    made = Table("method")
    for key in keys:
        made.add_column(COLUMNS[key][0], justify="right", overflow="fold")
    for r in rows:
        made.add_row(r["method"], *(f"{r[key]:.{COLUMNS[key][1]}f}" if key in r else "" for key in keys))
    return made
