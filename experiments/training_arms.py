"""Ways to train through the grid, side by side and paired: the same float models, the same batches, the same judge.

    qjax run configs/training/qat_vs_ptq.toml

For every seed a small Llama is pretrained on the standard library's sources (once for all configs that share `models`),
then every arm starts from it and takes `steps` more steps. An arm without a format goes on in float; it is the control,
and `ptq` recipes are applied to it, so that everyone has seen the same tokens. `closed` is the share of the gap between
the best of these recipes and the continued float model that an arm closes. Every quantized number is computed from the
packed model; an arm's is written and read back where its formats have a file. Tables give means over seeds and the
half-width of the 95 % interval (Student's t) of the paired difference to the arm named by `against`. An interrupted run
goes on with the arms that it had not finished.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import t
from tokenizers import Tokenizer

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.io.checkpoint import load, save
from qjax.io.tokenizer_hf import read_tokenizer
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.pipeline.calibrated import Calibration, calibration_of, quantize_model
from qjax.plan import Plan
from qjax.tensor import is_qtensor
from qjax.training import weights
from qjax.training.arm import Arm, quantizers_of_arm
from qjax.training.blockwise import BlockTuning, tune_blocks
from qjax.training.corpus import Corpus, corpus_of, texts_of, train_tokenizer
from qjax.training.data import Windows
from qjax.training.distill import teacher_confidence
from qjax.training.finetune import finetune, forward, heldout_loss
from qjax.training.loop import Loop


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
    group: str = ""  # the recipes of `ptq` with this name are its rivals


@dataclasses.dataclass(frozen=True)
class Config:
    """The contest."""

    base: Base = Base()
    models: Path = Path("runs/training_models")  # where the pretrained models are kept
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 200  # after pretraining
    arms: tuple[Contestant, ...] = (Contestant(Arm("continued")),)
    ptq: dict[str, str] = dataclasses.field(default_factory=dict)  # "group: anything" -> a recipe with its format
    block_tuned: dict[str, BlockTuning] = dataclasses.field(
        default_factory=dict
    )  # "format how": the control, by blocks
    against: str = ""  # the arm that the others are compared with; "": the first
    calibration_windows: int = 32
    heldout_windows: int = 256
    log_every: int = 20
    text: Path | None = None  # UTF-8, to train on; none: the standard library
    heldout: Path | None = None  # UTF-8, to be judged by


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
    if any(c.teacher == "continued" for c in config.arms) and names[:1] != ["continued"]:
        raise UserError('a teacher "continued" needs the arm "continued" to come first')
    corpus, tokenizer = corpus_at(config)
    runs: list[dict[str, Any]] = []
    for seed in config.seeds:
        model = pretrained(config, corpus, tokenizer, seed)
        runs += one_seed(config, corpus, model, seed, out)
    rows = summary(config, runs)
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table(rows))
    return {"rows": rows, "runs": runs}


def corpus_at(config: Config) -> tuple[Corpus, Tokenizer]:
    """Tokenizer, token file and held-out windows, made once in `models`."""
    folder = config.models
    folder.mkdir(parents=True, exist_ok=True)
    texts, heldout = texts_of(config.text, config.heldout)
    path = folder / "tokenizer.json"
    if not path.is_file():
        train_tokenizer(texts, config.base.vocab).save(str(path))
        (folder / "tokenizer_config.json").write_text(
            '{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}'
        )
    tokenizer = Tokenizer.from_file(str(path))
    return corpus_of(
        lambda text: [0, *tokenizer.encode(text).ids], tokenizer.get_vocab_size(), texts, heldout, folder,
        config.base.context, config.heldout_windows,
    ), tokenizer  # fmt: skip


def pretrained(config: Config, corpus: Corpus, tokenizer: Tokenizer, seed: int) -> Model:
    """The float model of a seed: trained here, or read from `models`."""
    b = config.base
    architecture = DecoderConfig(
        vocab=tokenizer.get_vocab_size(), dim=b.dim, hidden=b.hidden, layers=b.layers, heads=b.heads,
        kv_heads=b.kv_heads, head_dim=b.dim // b.heads, context=b.context, tied=True,
    )  # fmt: skip
    folder = config.models / f"seed{seed}"
    check_models(config)
    if not (folder / "model").is_dir():
        params = jax.jit(Decoder(architecture).init)(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]
        arm = Arm("pretrain", rate=b.rate, weight_decay=b.weight_decay)
        tokens = Windows(corpus.tokens, b.context, b.batch, seed)
        model, _, _ = finetune(
            arm, Model(architecture, params), lambda s: {"tokens": tokens.batch_at(s)}, Loop(b.steps, 20, 200, 200),
            folder, heldout=corpus.heldout, identity={"data": corpus.tokens.sha256, "model_seed": seed},
        )  # fmt: skip
        save(dataclasses.replace(model, tokenizer=read_tokenizer(config.models)), folder / "model")
    return load(folder / "model")


def check_models(config: Config) -> None:
    """Raise UserError where `models` holds float models of another kind or text."""
    path = config.models / "base.json"
    said = json.dumps({**dataclasses.asdict(config.base), "text": str(config.text)}, indent=1)
    if path.is_file() and path.read_text() != said:
        raise UserError(f"{config.models} holds other float models (see {path}); give another `models`")
    path.write_text(said)


def one_seed(config: Config, corpus: Corpus, model: Model, seed: int, out: Path) -> list[dict[str, Any]]:
    """Every arm and every recipe on one float model."""
    runs: list[dict[str, Any]] = []

    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    before = {(r["seed"], r["name"]): r for r in map(json.loads, lines)}

    def is_done(name: str) -> bool:
        """Whether an earlier, interrupted run of this directory has the row, which is kept then."""
        if (seed, name) in before:
            runs.append(before[seed, name])
        return (seed, name) in before

    def log(row: dict[str, Any]) -> None:
        row = {"seed": seed, **row}
        runs.append(row)
        rundir.log(out, row)
        print(f"seed {seed} {row['name']}: {row['loss']:.4f} nats, {row['seconds']:.0f} s", file=sys.stderr)

    # Later epochs than the pretraining's: the same windows in another order.
    tokens = Windows(corpus.tokens, config.base.context, config.base.batch, 1000 + seed)
    judge = forward(model.config)
    if not is_done("start"):
        log({"name": "start", "loss": heldout_loss(judge, model.params, corpus.heldout), "seconds": 0.0})
    continued, confidences = None, {}
    for contestant in config.arms:
        arm = contestant.arm
        kept = out / f"seed{seed}" / arm.name / "model"
        if is_done(arm.name):
            continued = load(kept) if arm.name == "continued" else continued
            continue
        teacher = {"": None, "start": model, "continued": continued}.get(contestant.teacher)
        if contestant.teacher and teacher is None:
            raise UserError(f"arm {arm.name!r}: teacher must be start or continued, got {contestant.teacher!r}")
        confidence = None
        if "cakld" in arm.loss and teacher is not None:
            if contestant.teacher not in confidences:
                batches = ((b[:, :-1], b[:, 1:]) for b in (tokens.batch_at(s) for s in range(4)))
                confidences[contestant.teacher] = teacher_confidence(lambda x, m=teacher: m.logits(x), batches)
            confidence = confidences[contestant.teacher]
        clock = time.perf_counter()
        begun = begun_by(config, arm, model, tokens) if arm.init else None
        steps = contestant.steps or config.steps
        loop = Loop(steps, config.log_every, steps - steps % config.log_every or config.log_every,
                    steps - steps % config.log_every or config.log_every)  # fmt: skip
        result, log_rows, loss = finetune(
            arm, model, lambda s: {"tokens": tokens.batch_at(s)}, loop, out / f"seed{seed}" / arm.name,
            heldout=corpus.heldout, begun=begun, teacher=teacher,
            confidence=confidence,
            identity={"data": corpus.tokens.sha256, "model_seed": seed},
        )  # fmt: skip
        seconds = time.perf_counter() - clock
        if arm.format:
            loss = read_back(result, out / "exported.gguf", arm, corpus, loss)
        if arm.name == "continued":
            continued = result
            save(dataclasses.replace(result, tokenizer=model.tokenizer), kept)
        last = {k: log_rows[-1][k] for k in ("quant_noise", "flip_rate", "saturated") if k in log_rows[-1]}
        log({"name": arm.name, "loss": loss, "seconds": seconds, "steps": steps, "group": contestant.group, **last})
        shutil.rmtree(out / f"seed{seed}" / arm.name / "checkpoints")
    if continued is None and (config.ptq or config.block_tuned):
        raise UserError('ptq and block_tuned are of the arm "continued", which is missing')
    source = continued or model
    for name, line in config.ptq.items():
        if is_done(f"ptq {name}"):
            continue
        clock = time.perf_counter()
        recipe = recipes.recipe(line)
        if recipe.format is None:
            raise UserError(f"ptq: {line!r} names no format; write {line}:int2_g64_mid_mse")
        plan = Plan.from_dict({"rules": {"layers_*": recipe.format.name, "*": "rtn:Q8_0"}})
        q, _ = quantize_model(source, plan, recipe, calibration(config, source, tokens))
        loss = heldout_loss(judge, q.params, corpus.heldout)
        seconds = time.perf_counter() - clock
        log({"name": f"ptq {name}", "loss": loss, "seconds": seconds, "group": name.split(":")[0], "recipe": line})
    for name, tuning in config.block_tuned.items():
        if is_done(f"block {name}"):
            continue
        clock = time.perf_counter()
        arm = Arm(name, format=name.split()[0], scales="learned")
        seen = calibration(config, source, tokens)
        params, _ = tune_blocks(source, quantizers_of_arm(arm, source.config), seen.tokens, tuning)
        loss = heldout_loss(judge, params, corpus.heldout)
        log({"name": f"block {name}", "loss": loss, "seconds": time.perf_counter() - clock})
    return runs


def calibration(config: Config, model: Model, tokens: Windows) -> Calibration:
    """The first windows that the arms train on."""
    count = -(-config.calibration_windows // config.base.batch)
    rows = np.concatenate([tokens.batch_at(s)[:, :-1] for s in range(count)])[: config.calibration_windows]
    return calibration_of(model.config.context, rows.reshape(-1), context=rows.shape[1])


def begun_by(config: Config, arm: Arm, model: Model, tokens: Windows) -> Any:
    """The result of the arm's recipe for the model it starts from."""
    recipe = recipes.recipe(arm.init)
    return quantize_model(model, arm.plan(model.config), recipe, calibration(config, model, tokens))[0].params


def read_back(model: Model, path: Path, arm: Arm, corpus: Corpus, loss: float) -> float:
    """The loss of the exported model, which must be the trained one's to the last bit."""
    packed = [x for x in jax.tree.leaves(model.params, is_leaf=is_qtensor) if is_qtensor(x)]
    if any(not hasattr(q.format, "ggml_type") for q in packed):
        return loss  # no file of its own: computed from the packed leaves already
    tokenizer = read_tokenizer(corpus_folder(corpus))
    save(dataclasses.replace(model, tokenizer=tokenizer), path)
    back = load(path)
    again = heldout_loss(forward(model.config, arm.inputs, arm.cache), back.params, corpus.heldout)
    if again != loss:
        raise RuntimeError(f"{path} gives {again} nats, the trained model {loss}")
    for name, leaf in weights.leaves_by_path(model.params).items():
        if is_qtensor(leaf):
            other = weights.leaves_by_path(back.params)[name]
            if not np.array_equal(leaf.leaves["blocks"], other.leaves["blocks"]):
                raise RuntimeError(f"{name}: the file does not hold what was trained")
    return again


def corpus_folder(corpus: Corpus) -> Path:
    """Where the tokenizer lies: beside the token file."""
    return Path(corpus.tokens.values.filename).parent  # type: ignore[attr-defined]


def summary(config: Config, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, paired differences, and the share of the gap that is closed."""
    names = list(dict.fromkeys(r["name"] for r in runs))
    loss = {n: {r["seed"]: r["loss"] for r in runs if r["name"] == n} for n in names}
    group = {r["name"]: r.get("group", "") for r in runs}
    against = config.against or config.arms[0].arm.name
    rows = []
    for name in names:
        pairs = [loss[name][s] - loss[against][s] for s in config.seeds]
        row = {"name": name, "loss": statistics.fmean(loss[name].values()), "difference": statistics.fmean(pairs),
               "half_interval": half(pairs), "group": group[name]}  # fmt: skip
        rivals = [n for n in names if n.startswith("ptq ") and group[n] == group[name] and group[name]]
        if rivals and not name.startswith("ptq "):
            best = {s: min(loss[n][s] for n in rivals) for s in config.seeds}
            gains = [best[s] - loss[name][s] for s in config.seeds]
            gaps = [best[s] - loss["continued"][s] for s in config.seeds]
            row |= {"gain_over_ptq": statistics.fmean(gains), "gain_half_interval": half(gains)}
            # A ratio of means, for a gap may be near 0 on one seed; its interval by the delta method.
            share = sum(gains) / sum(gaps)
            off = [(a - share * b) / statistics.fmean(gaps) for a, b in zip(gains, gaps, strict=True)]
            row |= {"closed_percent": 100 * share, "closed_half_interval": half([100 * d for d in off])}
        own = [r for r in runs if r["name"] == name]
        row["seconds"] = statistics.fmean(r["seconds"] for r in own)
        for key in ("quant_noise", "flip_rate", "saturated"):
            if key in own[0]:
                row[key] = statistics.fmean(r[key] for r in own)
        rows.append(row)
    return rows


def half(values: list[float]) -> float | None:
    """Half the 95 % interval of a mean."""
    n = len(values)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def table(rows: list[dict[str, Any]]) -> Table:
    """For `rich.print`."""
    made = Table()
    for column in ("arm", "nats", "difference", "+-", "closed, %", "+-", "noise", "seconds"):
        made.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for r in rows:
        made.add_row(
            r["name"], cell(r["loss"], 4), cell(r["difference"], 4), cell(r["half_interval"], 4),
            cell(r.get("closed_percent"), 1), cell(r.get("closed_half_interval"), 1), cell(r.get("quant_noise"), 3),
            cell(r["seconds"], 0),
        )  # fmt: skip
    return made
