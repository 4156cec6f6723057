"""What training through a format costs: the time of a step beside that of the float step, and memory.

    qjax run configs/bench_training.toml

All steps are compiled first and then timed in turn, one of each a round, so that what else the machine does falls on
all alike; the table gives the median over rounds of each step's time over the float step's of the same round. Memory is
what XLA's compiled step holds besides its arguments.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from qjax import rundir
from qjax.io.checkpoint import load
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.program import Compute, Teacher, program, start_state
from qjax.training.optim.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    model: str = "reference"
    context: int = 256
    batch: int = 8
    rounds: int = 11
    arms: tuple[Arm, ...] = ()  # besides the float step
    mixed: bool = True  # bfloat16 operands, float32 sums


def run(config: Config, out: Path) -> dict[str, Any]:
    """Time every arm; returns the table's rows."""
    model = load(config.model)
    params = model.dense
    drawn = np.random.default_rng(0).integers(0, model.config.vocab, (config.batch, config.context + 1))
    batch = {"tokens": jnp.asarray(drawn, jnp.int32)}
    steps, states = [], []
    rows: list[dict[str, Any]] = []
    for arm in (Arm("float", optimizer=Optimizer(trains=("weights",))), *config.arms):
        made = program(arm, model.config, 1000, teacher=Teacher(model.config), compute=Compute(config.mixed))
        state = start_state(made, params, teacher=params)
        clock = time.perf_counter()
        compiled = made.step.lower(state, batch).compile()
        seconds = time.perf_counter() - clock
        memory = compiled.memory_analysis()
        rows.append({"name": arm.name, "compile_seconds": seconds,
                     "temporary_mb": memory.temp_size_in_bytes / 2**20 if memory else None})  # fmt: skip
        steps.append(compiled)
        states.append(state)
    taken: list[list[float]] = [[] for _ in steps]
    for round_ in range(config.rounds + 1):
        for i, step in enumerate(steps):
            clock = time.perf_counter()
            states[i], metrics = step(states[i], batch)
            jax.block_until_ready(metrics)
            if round_:  # the first is a warm-up
                taken[i].append(time.perf_counter() - clock)
    for i, row in enumerate(rows):
        ratios = [t / f for t, f in zip(taken[i], taken[0], strict=True)]
        row |= {"seconds": statistics.median(taken[i]), "ratio": statistics.median(ratios),
                "ratio_quartiles": list(np.quantile(ratios, [0.25, 0.75]))}  # fmt: skip
        rundir.log(out, row)
    table = Table("step", "times the float step", "quartiles", "seconds", "temporary MB", "compile, s")
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(row["name"], f"{row['ratio']:.3f}", f"{low:.3f} - {high:.3f}", f"{row['seconds']:.3f}",
                      f"{row['temporary_mb'] or 0:.0f}", f"{row['compile_seconds']:.1f}")  # fmt: skip
    Console(highlight=False).print(table)
    return {"rows": rows, "machine": rundir.machine()}
