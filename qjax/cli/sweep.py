"""`qjax sweep FILE`: the runs of a config's [sweep] table, each in a process and a directory of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import tyro

from qjax import config as configs
from qjax.cli import output
from qjax.cli.run import EXPERIMENTS, SCRIPTS_HELP, load_script
from qjax.cli.runs import SHOW_HELP, keys_of
from qjax.cli.targets import check_json
from qjax.errors import UserError
from qjax.io.atomic import write_text
from qjax.io.lock import InUse, locked
from qjax.rundir import LOCK, write_json
from qjax.runs import Run, read
from qjax.sweep import SWEEP, Planned, planned, shown, text_of
from qjax.terminal import say
from qjax.terminal import shown as clean

PATIENCE = 30.0  # seconds that runs have to end on Ctrl-C


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Run an experiment over values of its config's keys.

        qjax sweep FILE                            # FILE: a config with a [sweep] table, see docs/experiments.md
        qjax sweep FILE --dry                      # what would run, and what is done already
        qjax sweep FILE --jobs 4                   # four at a time
        qjax sweep FILE --devices 0 1 2 3          # one GPU each

    Every run is a `qjax run` in OUT/<hash of its config>, its output beside as <hash>.log. The same command goes on
    where an earlier one ended: finished runs are kept, others continue or are tried again; one that fails stops none.
    Given twice at a time, also on machines that share the disk, the commands share the runs: each is done once.
    """

    file: tyro.conf.Positional[Path]
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help="where the runs go; runs/sweeps/NAME if not given")
    ] = None
    jobs: Annotated[int, tyro.conf.arg(help="runs at a time; with --devices as many as these")] = 1
    devices: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="N", help="numbers of GPUs; each run sees one of them (CUDA_VISIBLE_DEVICES)"),
    ] = ()
    smoke: Annotated[bool, tyro.conf.arg(help="the config's own seconds-long version of every run")] = False
    dry: Annotated[bool, tyro.conf.arg(help="only say what would run")] = False
    show: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY", help=SHOW_HELP)] = ()
    scripts: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help=SCRIPTS_HELP)] = None
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--jobs: at least 1, got {self.jobs}")
        check_json(self.json)
        source = configs.read(self.file)
        module, script = load_script(source, self.scripts)
        runs = planned(source, module.Config, self.smoke)
        out = self.out or Path("runs") / "sweeps" / (source.name + ("-smoke" if self.smoke else ""))
        if self.dry:
            self._print(out, runs, [state_of(out / run.name) for run in runs])
            return
        if out.exists() and not (out / SWEEP).is_file() and not _is_empty(out):
            raise UserError(f"{out}: is no directory of a sweep; give a new or empty --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SWEEP, {"file": str(self.file), "runs": {run.name: run.values for run in runs}})
        failed = self._run(out, script, [run for run in runs if state_of(out / run.name) != "done"], len(runs))
        self._print(out, runs, [state_of(out / run.name) for run in runs])
        if failed:
            logs = ", ".join(str(out / f"{name}.log") for name in failed)
            raise UserError(f"{len(failed)} of {len(runs)} runs failed; see {logs}; the same command tries them again")

    def _run(self, out: Path, script: Path, waiting: list[Planned], total: int) -> list[str]:
        """Run what waits; returns the names of those that failed."""
        done = total - len(waiting)
        if done:
            say(f"{done} of {total} runs are finished already")
        slots = list(self.devices) or [""] * self.jobs
        free, failed = list(slots), []
        running: dict[str, tuple[subprocess.Popen, str, float, Planned]] = {}
        claims: dict[str, contextlib.ExitStack] = {}
        states = {run.name: "waiting" for run in waiting}
        left = list(waiting)
        try:
            with _live(waiting) as draw:
                while left or running:
                    for run in list(left) if free else ():
                        if (claim := _claimed(out, run.name)) is None:
                            continue  # another command's; looked at again
                        left.remove(run)
                        if state_of(out / run.name) == "done":
                            claim.close()
                            done += 1
                            say(f"{done}/{total} {run.name} done by another command: {shown(run.values)}")
                            continue
                        slot, claims[run.name] = free.pop(0), claim
                        running[run.name] = (self._start(out, script, run, slot), slot, time.monotonic(), run)
                        if not free:
                            break
                    time.sleep(0.05 if running else 0.5)
                    for name, (process, slot, began, run) in list(running.items()):
                        gone = time.monotonic() - began
                        states[name] = f"running, {gone:.0f} s"
                        if process.poll() is None:
                            continue
                        del running[name]
                        claims.pop(name).close()
                        free.append(slot)
                        done += 1
                        if process.returncode:
                            failed.append(name)
                        how = "failed" if process.returncode else "done"
                        states[name] = f"{how}, {gone:.1f} s"
                        say(f"{done}/{total} {name} {how}, {gone:.1f} s: {shown(run.values)}")
                    draw(states)
        except BaseException as stop:
            _end(process for process, *_ in running.values())
            for claim in claims.values():
                claim.close()
            if isinstance(stop, KeyboardInterrupt):
                stop.add_note(f"{out} keeps what was done; the same command continues")
            raise
        return failed

    def _start(self, out: Path, script: Path, run: Planned, slot: str) -> subprocess.Popen:
        plan = out / f"{run.name}.toml"
        # Beside the run directory, whose own config.toml has the script as seen from there.
        write_text(plan, configs.to_toml(run.config, head={"script": os.path.relpath(script, out)}))
        folder = self.scripts or EXPERIMENTS
        argv = [sys.executable, "-m", "qjax", "run", str(plan), "--out", str(out / run.name), "--scripts", str(folder)]
        env = dict(os.environ)
        if slot:
            env["CUDA_VISIBLE_DEVICES"] = slot
        if self.smoke:
            env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        with (out / f"{run.name}.log").open("ab") as log:
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def _print(self, out: Path, runs: tuple[Planned, ...], states: list[str]) -> None:
        found = [read(out / run.name) for run in runs]
        rows = [
            {"run": str(out / run.name), "values": run.values, "state": state, **_measured(made)}
            for run, state, made in zip(runs, states, found, strict=True)
        ]
        if output.write_json(self.json, {"file": str(self.file), "out": str(out), "runs": rows}):
            return
        keys = list(dict.fromkeys(key for run in runs for key in run.values))
        numbers = self.show or keys_of([made for made in found if made is not None])
        table = [
            (
                run.name,
                *(text_of(run.values[key]) if key in run.values else "" for key in keys),
                state,
                *("" if r["numbers"].get(n) is None else f"{r['numbers'][n]:.6g}" for n in numbers),
            )
            for run, state, r in zip(runs, states, rows, strict=True)
        ]
        output.table(
            ("run", *keys, "state", *numbers), table, numbers=range(len(keys) + 2, len(keys) + 2 + len(numbers))
        )
        print(f"{out}: {sum(state == 'done' for state in states)} of {len(runs)} runs done")


def _is_empty(out: Path) -> bool:
    """Whether nothing is in it but what another command is about to give a name."""
    return out.is_dir() and all(path.name.startswith(".") for path in out.iterdir())


def _claimed(out: Path, name: str) -> contextlib.ExitStack | None:
    """A run as this command's own, until the stack is closed; None where another command, or what is left of one that
    was killed, works on it."""
    claim = contextlib.ExitStack()
    try:
        claim.enter_context(locked(out / f".{name}.lock", f"the run {name}"))
        if (out / name).is_dir():
            with locked(out / name / LOCK, f"the run {name}"):
                pass
    except InUse:
        claim.close()
        return None
    return claim


@contextlib.contextmanager
def _live(runs: list[Planned]) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """On a terminal a table of the runs under way; elsewhere nothing, for each end of a run is a line."""
    if not sys.stderr.isatty():
        yield lambda states: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table(states: Mapping[str, str]) -> Table:
        made = Table("run", "values", "state")
        for run in runs:
            if states.get(run.name, "waiting").startswith("running"):
                made.add_row(run.name, Text(clean(shown(run.values))), states[run.name])
        return made

    with Live(table({}), console=Console(stderr=True), refresh_per_second=2, transient=True) as live:
        yield lambda states: live.update(table(states))


def state_of(path: Path) -> str:
    """Of a planned run: waiting, or as `qjax.runs.Run.state`; done only with its results."""
    run = read(path)
    if run is None:
        return "waiting"
    return "failed" if run.state == "done" and not (path / "results.json").is_file() else run.state


def _measured(run: Run | None) -> dict:
    return {"seconds": None, "numbers": {}} if run is None else {
        "seconds": run.manifest.get("wall_seconds"), "numbers": run.numbers,
    }  # fmt: skip


def _end(processes: Iterable[subprocess.Popen]) -> None:
    """Ask runs to stop as Ctrl-C would, and kill what does not."""
    alive = [p for p in processes if p.poll() is None]
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    until = time.monotonic() + PATIENCE
    for process in alive:
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
