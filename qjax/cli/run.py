"""`qjax run CONFIG.toml`: an experiment, from a config to a run directory."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

from qjax import config as configs
from qjax.cli.process import JOIN_HELP
from qjax.errors import UserError
from qjax.rundir import seeds

HELP = """Run the experiment a TOML config describes.

    qjax run configs/quickstart.toml
    qjax run configs/quickstart.toml --tokens 65536        # change a key; --section.key for tables
    qjax run configs/quickstart.toml --smoke               # the config's own seconds-long version
    qjax run configs/training/qat.toml --out DIR --join HOST:PORT/2/0    # process 0 of 2 that train together
    qjax run CONFIG.toml --help                            # every key of that config

The run directory (runs/NAME-TIME, or --out) gets the resolved config, manifest.json, metrics.jsonl, results.json
and whatever the experiment makes. An --out that exists is continued, if its config is the same.

A config is data that may come from anywhere, so it can name only scripts of qjax's own experiments folder, or of the
one that --scripts names."""

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SCRIPTS_HELP = "the folder of the scripts that configs may name, in place of qjax's experiments"

RESERVED = ("config", "out", "smoke", "join", "scripts")


@dataclasses.dataclass(frozen=True)
class Run:
    """A parsed `qjax run`."""

    source: configs.Source
    script: Path
    module: ModuleType
    config: Any
    out: Path | None
    join: str | None

    @staticmethod
    def parse(args: list[str]) -> Run:
        """Read the config first: its script's dataclass says which options the rest of the command line may use."""
        path = _config_path(args)
        if path is None:
            print(
                f"usage: qjax run CONFIG.toml [--section.key VALUE ...] [--out DIR] [--smoke] [--scripts DIR]\n\n{HELP}"
            )
            if {"-h", "--help"} & set(args):
                raise SystemExit(0)
            raise UserError("run needs a config file, as in: qjax run configs/quickstart.toml")
        source = configs.read(path)
        if source.sweep:
            raise UserError(f"{path}: has a [sweep] table, so it is many runs: say qjax sweep {path}")
        folder = Path(_option(args, "--scripts") or EXPERIMENTS)
        script_of(source, folder)
        line = _option(args, "--join")
        if line and not {"-h", "--help"} & set(args):  # before anything else asks JAX for its devices
            from qjax.processes import join

            join(line)
        module, script = load_script(source, folder)
        default = configs.build(module.Config, source, smoke="--smoke" in args)
        if "--smoke" in args:
            import jax

            # It is there to be seen working, and most of its time is compilation.
            jax.config.update("jax_disable_most_optimizations", True)
        command = dataclasses.make_dataclass(
            "Run",
            [
                ("config", tyro.conf.Positional[Path]),
                ("out", Annotated[Path | None, tyro.conf.arg(metavar="DIR", help="the run directory")], None),
                ("smoke", Annotated[bool, tyro.conf.arg(help="the config's own seconds-long version")], False),
                ("join", Annotated[str | None, tyro.conf.arg(metavar="LINE", help=JOIN_HELP)], None),
                ("scripts", Annotated[Path | None, tyro.conf.arg(metavar="DIR", help=SCRIPTS_HELP)], None),
                ("keys", Annotated[type(default), tyro.conf.arg(name="", help="")], default),
            ],
            frozen=True,
        )
        parsed: Any = tyro.cli(
            command,
            args=args,
            prog="qjax run",
            description=HELP,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
        )
        for key, value in seeds(parsed.keys).items():
            configs.check_seed(key, value)
        return Run(source, script, module, parsed.keys, parsed.out, parsed.join)

    def execute(self) -> None:
        from qjax import rundir
        from qjax.terminal import say

        if self.join and not getattr(self.module, "SEVERAL_PROCESSES", False):
            raise UserError(f"--join: {self.script} runs in one process; those of pretrain and qat run in several")
        if self.join and self.out is None:
            raise UserError("--join: give --out too, one directory that all processes see")
        if self.join and not _writes():
            assert self.out is not None
            self.module.run(self.config, self.out)
            return
        # A run directory that is still to be named lies as deep as any other.
        script = os.path.relpath(self.script, self.out or Path("runs") / self.source.name)
        text = configs.to_toml(self.config, head={"script": script})
        out = rundir.create(self.source.name, self.out, text)
        files = (*self.source.files, self.script)
        command = rundir.command_line()
        try:
            with rundir.record(out, text, config=self.config, files=files, command=command) as manifest:
                results = self.module.run(self.config, out)
                rundir.write_json(out / "results.json", results)
        except KeyboardInterrupt as stop:
            stop.add_note(f"{out} keeps what was done; the same command with --out {out} continues")
            raise
        except (BrokenPipeError, SystemExit) as error:
            if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
                raise
            raise UserError(f"standard output was closed before the run ended; {out} keeps what was done") from None
        say(f"run directory: {out}  ({manifest['wall_seconds']:.1f} s)")


def _config_path(args: list[str]) -> Path | None:
    """The first argument that is neither an option nor the value of `--out`, `--join` or `--scripts`."""
    for before, arg in zip(["", *args], args, strict=False):
        if not arg.startswith("-") and before not in ("--out", "--join", "--scripts"):
            return Path(arg)
    return None


def _option(args: list[str], name: str) -> str | None:
    """The value of an option: `NAME VALUE` or `NAME=VALUE`."""
    for before, arg in zip(["", *args], args, strict=False):
        if before == name or arg.startswith(f"{name}="):
            return arg.removeprefix(f"{name}=")
    return None


def _writes() -> bool:
    from qjax.processes import chief

    return chief()


def script_of(source: configs.Source, folder: Path) -> Path:
    """The script a config names; nothing of it is run.

    Raises:
      UserError: the config names none, the file is missing, or it lies outside of the folder.
    """
    last = source.files[-1]
    if source.script is None:
        raise UserError(f'{last}: has no key `script` (as in script = "../experiments/ptq_grid.py")')
    where = f"{source.origin['script',]}:script"
    path = source.script.resolve()
    if not folder.is_dir():
        raise UserError(f"{where}: there is no folder {folder} of scripts; name one with --scripts DIR")
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {path} lies outside of {folder}; run it only if you trust it, with --scripts DIR")
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{where}: {path} is not a Python file")
    return path


def load_script(source: configs.Source, folder: Path | None = None) -> tuple[ModuleType, Path]:
    """Import the experiment a config names, from the folder of scripts.

    Raises:
      UserError: what `script_of` raises; or it lacks `Config` and `run`.
    """
    path = script_of(source, folder or EXPERIMENTS)
    where = f"{source.origin['script',]}:script"
    name = f"qjax_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses resolve their annotations through it
    spec.loader.exec_module(module)
    if not dataclasses.is_dataclass(getattr(module, "Config", None)) or not inspect.isroutine(
        getattr(module, "run", None)
    ):
        raise UserError(f"{where}: {path} must define a dataclass `Config` and `run(config, out)`")
    taken = [f.name for f in dataclasses.fields(module.Config) if f.name in RESERVED]
    if taken:
        raise UserError(f"{where}: {path}: Config.{taken[0]} clashes with an option of `qjax run`; rename it")
    return module, path
