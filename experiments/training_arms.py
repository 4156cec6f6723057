"""Ways to train through the grid, side by side and paired: the same float models, the same batches, the same judge.

    qjax run configs/training/qat_vs_ptq.toml

For every seed a small Llama is pretrained on the standard library's sources (once for all configs that share `models`),
then every arm starts from it and takes `steps` more steps. An arm without a format goes on in float; it is the control,
and `ptq` recipes are applied to it, so that everyone has seen the same tokens. A float arm may have recipes of its own,
which make rows but are no rivals: the student of a teacher, rounded. `closed` is the share of the gap between
the best of these recipes and the continued float model that an arm closes, `of tuned` the same where block-wise tuning
of its format (`block_tuned`) is a rival too. All numbers are those of the exported files. Tables give means over seeds
and the half-width of the 95 % interval (Student's t) of the paired difference to the arm named by `against`. An
interrupted run goes on with the arms that it had not finished.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate.intervals import half_interval
from qjax.io.atomic import write_text
from qjax.io.checkpoint import load, save
from qjax.io.tokenizer_hf import read_tokenizer
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.windows import Calibration, calibration_of
from qjax.plan import Plan
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.blockwise import BlockTuning, tune_blocks
from qjax.training.decoder.export import export, exported_loss, read_back
from qjax.training.decoder.finetune import finetune, heldout_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.fresh import fresh_model
from qjax.training.decoder.program import Program, Teacher, program, start_state
from qjax.training.decoder.quantization import Grid, quantizers_of
from qjax.training.losses.distill import teacher_confidence
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.corpus import Corpus, corpus_in, texts_of, tokenizer_in
from qjax.training.run.curve import curve
from qjax.training.run.data import Batches
from qjax.training.run.devices import data_on
from qjax.training.run.loop import Run

ROUNDED = ("ptq ", "block ")  # how the names of rounded controls begin
Programs = dict[tuple[Arm, int, Teacher], Program]  # what all seeds share


@dataclasses.dataclass(frozen=True)
class Base:
    """The float models."""

    vocab: int = 1024  # byte-level BPE, trained on the same text
    dim: int = 128
    hidden: int = 384
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    context: int = 128
    steps: int = 1200
    batch: int = 16
    rate: float = 3e-3
    weight_decay: float = 0.1


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An arm, and what it is compared with."""

    arm: Arm
    steps: int = 0  # 0: the config's
    teacher: str = ""  # "start": the float model it starts from; "continued": the float model trained on
    group: str = ""  # the recipes of `ptq` with this name are its rivals, and `block_tuned` of its format
    ptq: dict[str, str] = dataclasses.field(default_factory=dict)  # of a float arm: as the config's, of what it became


@dataclasses.dataclass(frozen=True)
class Config:
    """The contest."""

    base: Base = Base()
    models: Path = Path("runs/training_models")  # where the pretrained models are kept
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 200  # after pretraining
    arms: tuple[Contestant, ...] = (Contestant(Arm("continued")),)
    ptq: dict[str, str] = dataclasses.field(default_factory=dict)  # "group: anything" -> a recipe with its format
    # "format anything" -> how the control is tuned block by block
    block_tuned: dict[str, BlockTuning] = dataclasses.field(default_factory=dict)
    against: str = ""  # the arm that the others are compared with; "": the first
    calibration_windows: int = 32
    heldout_windows: int = 256
    log_every: int = 20
    text: Path | None = None  # UTF-8, to train on; none: the standard library
    heldout: Path | None = None  # UTF-8, to be judged by
    characters: int = 0  # of each text that are read; 0: all


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl and the arms' own logs; returns every run and the table."""
    names = [c.arm.name for c in config.arms]
    if len(set(names)) < len(names):
        raise UserError(f"arms: two have the same name among {names}")
    if not names or not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError("arms and seeds: give at least one of each, and no seed twice")
    groups = {name.split(":")[0] for name in config.ptq}
    for c in config.arms:
        if c.group and c.group not in groups:
            raise UserError(f"arm {c.arm.name!r}: no recipe of ptq is called {c.group!r}: anything")
    if config.against and config.against not in names:
        raise UserError(f"against: no arm is called {config.against!r}; there are {', '.join(names)}")
    for c in config.arms:
        if c.teacher not in ("", "start", "continued"):
            raise UserError(f"arm {c.arm.name!r}: teacher must be start or continued, got {c.teacher!r}")
        if c.ptq and c.arm.grid.format:
            raise UserError(f"arm {c.arm.name!r}: ptq rounds a float arm, and this one has {c.arm.grid.format} already")
        for name in c.ptq:
            if name.split(":")[0] not in groups:
                raise UserError(f"arm {c.arm.name!r}: its ptq {name!r} names no group; there are {sorted(groups)}")
    leans = config.ptq or config.block_tuned or any(c.teacher == "continued" or c.group for c in config.arms)
    if leans and names[0] != "continued":
        raise UserError('recipes, block tuning and the teacher "continued" need the arm "continued" to come first')
    corpus, tokenizer = corpus_at(config)
    runs: list[dict[str, Any]] = []
    programs: Programs = {}
    for seed in config.seeds:
        model = pretrained(config, corpus, tokenizer, seed)
        runs += one_seed(config, corpus, model, seed, programs, out)
    rows = summary(config, runs)
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table(rows))
    return {"rows": rows, "runs": runs, "curve": curves(config, out)}


def curves(config: Config, out: Path) -> list[dict[str, Any]]:
    """The arms' logs over steps, means over seeds; an arm that was trained before without its log has none."""
    logs = {
        c.arm.name: [
            log for s in config.seeds if (log := rundir.logged(out / f"seed{s}" / c.arm.name / "metrics.jsonl"))
        ]
        for c in config.arms
    }
    return curve(logs)


def corpus_at(config: Config) -> tuple[Corpus, Tokenizer]:
    """Tokenizer, token file and held-out windows, made once in `models`."""
    check_models(config)
    texts, heldout = texts_of(config.text, config.heldout, config.characters)
    tokenizer = tokenizer_in(config.models, texts, config.base.vocab)
    windows = config.heldout_windows
    return corpus_in(config.models, tokenizer, texts, heldout, config.base.context, windows), tokenizer


def pretrained(config: Config, corpus: Corpus, tokenizer: Tokenizer, seed: int) -> Model:
    """The float model of a seed: trained here, or read from `models`."""
    b = config.base
    folder = config.models / f"seed{seed}"
    if not (folder / "model").is_dir():
        arm = Arm("pretrain", optimizer=Optimizer(b.rate, weight_decay=b.weight_decay))
        tokens = Batches(corpus.tokens, b.context, b.batch, seed)
        model = fresh_model(b, tokenizer.get_vocab_size(), seed)
        trained = program(arm, model.config, b.steps)
        run = Run(folder, b.steps, 20, 200, 200, identity={**tokens.identity, "model_seed": seed})
        state = start_state(trained, model.params)
        params = finetune(trained, state, data_on(tokens, corpus.heldout), run).params
        model = dataclasses.replace(model, params=params, tokenizer=read_tokenizer(config.models))
        save(model, folder / "model")
    return load(folder / "model")


def check_models(config: Config) -> None:
    """Raise UserError where `models` holds float models of another kind or text."""
    path = config.models / "base.json"
    said = json.dumps({**dataclasses.asdict(config.base), "text": str(config.text)}, indent=1)
    if path.is_file() and path.read_text() != said:
        raise UserError(f"{config.models} holds other float models (see {path}); give another `models`")
    config.models.mkdir(parents=True, exist_ok=True)
    write_text(path, said)


def one_seed(
    config: Config, corpus: Corpus, model: Model, seed: int, programs: Programs, out: Path
) -> list[dict[str, Any]]:
    """Every arm and every recipe on one float model; rows of an earlier, interrupted run of `out` are kept."""
    path = out / "metrics.jsonl"
    before = {(r["seed"], r["name"]): r for r in rundir.logged(path)}
    runs: list[dict[str, Any]] = []

    def row_of(name: str, make: Callable[[], dict[str, Any]]) -> None:
        """The row of a name: the earlier one, or a new one with the time that making it took."""
        if (seed, name) in before:
            runs.append(before[seed, name])
            return
        clock = time.perf_counter()
        row = {"seed": seed, "name": name, **make(), "seconds": time.perf_counter() - clock}
        runs.append(row)
        rundir.log(out, row)
        print(f"seed {seed} {name}: {row['loss']:.4f} nats, {row['seconds']:.0f} s", file=sys.stderr)

    # Later epochs than the pretraining's: the same windows in another order.
    tokens = Batches(corpus.tokens, config.base.context, config.base.batch, 1000 + seed)
    judge = Forward(model.config)
    row_of("start", lambda: {"loss": heldout_loss(judge, model.params, corpus.heldout)})
    folder = out / f"seed{seed}"
    teachers: dict[str, Any] = {"": None, "start": model}
    for contestant in config.arms:
        name = contestant.arm.name
        row_of(name, partial(train_arm, config, contestant, model, teachers, tokens, corpus, programs, folder / name))
        if name == "continued":
            teachers["continued"] = load(folder / name / "model")
        for label, line in contestant.ptq.items():
            where = folder / f"{name}, rounded: {label.replace(':', ',')}"
            trained = load(folder / name / "model")
            row_of(where.name, partial(round_control, config, label, line, trained, tokens, corpus, where))
    control: Any = teachers.get("continued")  # there is one where files or blocks are asked for
    for name, line in config.ptq.items():
        where = folder / f"ptq {name}"
        row_of(where.name, partial(round_control, config, name, line, control, tokens, corpus, where))
    for name, tuning in config.block_tuned.items():
        where = folder / f"block {name}"
        row_of(where.name, partial(tune_control, config, name, tuning, control, tokens, corpus, where))
    return runs


def train_arm(
    config: Config, contestant: Contestant, model: Model, teachers: dict[str, Model | None],
    tokens: Batches, corpus: Corpus, programs: Programs, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train one arm; its loss is that of the file it is exported to."""
    arm, teacher = contestant.arm, teachers[contestant.teacher]
    confidence = None
    if "cakld" in arm.losses.names and teacher is not None:
        batches = ((b[:, :-1], b[:, 1:]) for b in map(tokens.batch_at, range(4)))
        confidence = teacher_confidence(teacher.logits, batches)
    steps = contestant.steps or config.steps
    at_the_end = config.log_every * steps  # the last step alone is evaluated and saved
    key = arm, steps, Teacher(None if teacher is None else teacher.config, confidence)
    if key not in programs:
        programs[key] = program(arm, model.config, steps, teacher=key[2])
    rounded = rounded_by(config, arm, model, tokens) if arm.grid.init else None
    state = start_state(programs[key], model.params, rounded=rounded, teacher=teacher and teacher.dense)
    run = Run(folder, steps, config.log_every, at_the_end, at_the_end, identity=tokens.identity)
    params, log, loss, _ = finetune(programs[key], state, data_on(tokens, corpus.heldout), run)
    shutil.rmtree(folder / "checkpoints")
    path = export(dataclasses.replace(model, params=params), folder)
    read_back(path, loss, corpus.heldout, arm.activations)
    last: dict[str, Any] = {k: log[-1][k] for k in ("quant_noise", "flip_rate", "saturated") if k in log[-1]}
    return {"loss": loss, "steps": steps, "group": contestant.group, **last}


def round_control(
    config: Config, name: str, line: str, control: Model, tokens: Batches, corpus: Corpus, folder: Path
) -> dict[str, Any]:
    """A float model, rounded by a recipe."""
    recipe = recipes.recipe(line)
    if recipe.format is None:
        raise UserError(f"ptq: {line!r} names no format; write {line}:int2_g64_mid_mse")
    plan = Plan.from_dict({"rules": {"layers_*": recipe.format.name, "*": "rtn:Q8_0"}})
    q, _ = quantize_model(control, plan, recipe, calibration(config, control, tokens))
    loss = exported_loss(q, folder, corpus.heldout)
    return {"loss": loss, "group": name.split(":")[0], "recipe": line}


def tune_control(
    config: Config, name: str, tuning: BlockTuning, control: Model, tokens: Batches, corpus: Corpus, folder: Path
) -> dict[str, Any]:
    """The continued float model, tuned block by block; the name begins with its format."""
    grid = Grid(name.split()[0], scales="learned")
    seen = calibration(config, control, tokens)
    params, _ = tune_blocks(control, quantizers_of(grid, control.config), seen.tokens, tuning)
    return {"loss": exported_loss(dataclasses.replace(control, params=params), folder, corpus.heldout)}


def calibration(config: Config, model: Model, tokens: Batches) -> Calibration:
    """The first windows that the arms train on."""
    count = -(-config.calibration_windows // config.base.batch)
    rows = np.concatenate([tokens.batch_at(s)[:, :-1] for s in range(count)])[: config.calibration_windows]
    return calibration_of(model.config.context, rows.reshape(-1), context=rows.shape[1])


def rounded_by(config: Config, arm: Arm, model: Model, tokens: Batches) -> Any:
    """The result of the arm's recipe for the model it starts from."""
    recipe = recipes.recipe(arm.grid.init)
    return quantize_model(model, arm.grid.plan(model.config), recipe, calibration(config, model, tokens))[0].params


def summary(config: Config, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, paired differences, and the share of the gap that is closed."""
    names = list(dict.fromkeys(r["name"] for r in runs))
    loss = {n: {r["seed"]: r["loss"] for r in runs if r["name"] == n} for n in names}
    group = {r["name"]: r.get("group", "") for r in runs}
    of_format = {c.arm.grid.format: c.group for c in config.arms}
    group |= {f"block {name}": of_format.get(name.split()[0], "") for name in config.block_tuned}
    against = config.against or config.arms[0].arm.name
    rows = []
    for name in names:
        pairs = [loss[name][s] - loss[against][s] for s in config.seeds]
        row = {"name": name, "loss": statistics.fmean(loss[name].values()), "difference": statistics.fmean(pairs),
               "half_interval": half_interval(pairs), "group": group[name]}  # fmt: skip
        if not name.startswith(ROUNDED):
            for key, kinds in (("closed", ROUNDED[:1]), ("closed_of_tuned", ROUNDED)):
                rivals = [loss[n] for n in names if n.startswith(kinds) and group[n] == group[name] and group[name]]
                row |= closed(key, rivals, loss[name], loss["continued"]) if rivals else {}
        own = [r for r in runs if r["name"] == name]
        row["seconds"] = statistics.fmean(r["seconds"] for r in own)
        for key in ("quant_noise", "flip_rate", "saturated"):
            if key in own[0]:
                row[key] = statistics.fmean(r[key] for r in own)
        rows.append(row)
    return rows


def closed(
    key: str, rivals: list[dict[int, float]], own: dict[int, float], floor: dict[int, float]
) -> dict[str, float | None]:
    """The share of the gap, from the best rival of each seed down to the continued float model, that an arm closes."""
    gaps = [min(r[s] for r in rivals) - floor[s] for s in own]
    gains = [min(r[s] for r in rivals) - own[s] for s in own]
    # A ratio of means, for a gap may be near 0 on one seed; its interval by the delta method.
    share = sum(gains) / sum(gaps)
    off = [100 * (a - share * b) / statistics.fmean(gaps) for a, b in zip(gains, gaps, strict=True)]
    return {f"{key}_percent": 100 * share, f"{key}_half_interval": half_interval(off)}


def table(rows: list[dict[str, Any]]) -> Table:
    """For `rich.print`."""
    made = Table()
    for column in ("arm", "nats", "difference", "+-", "closed, %", "+-", "of tuned", "+-", "noise", "seconds"):
        made.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for r in rows:
        made.add_row(
            r["name"], cell(r["loss"], 4), cell(r["difference"], 4), cell(r["half_interval"], 4),
            cell(r.get("closed_percent"), 1), cell(r.get("closed_half_interval"), 1),
            cell(r.get("closed_of_tuned_percent"), 1), cell(r.get("closed_of_tuned_half_interval"), 1),
            cell(r.get("quant_noise"), 3), cell(r["seconds"], 0),
        )  # fmt: skip
    return made
