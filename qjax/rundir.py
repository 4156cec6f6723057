"""Run directories: what a run was, what it measured, how it ended.

    runs/<config>-<UTC time>/
      config.toml     the resolved config; `qjax run` on it repeats the run
      manifest.json   versions, device, hashes of inputs, seeds, command line, times, exit status
      metrics.jsonl   one JSON object a line, written as the run goes
      results.json    what the experiment's `run` returned
      ...             whatever else the experiment writes: report.html, plots, models

The manifest is written when the run starts (`exit_status` null) and again when it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qjax.errors import UserError, exit_status
from qjax.io.atomic import write_text
from qjax.io.lock import locked
from qjax.terminal import say

LOCK = ".lock"  # held while a process runs there
PACKAGES = ("qjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "gguf", "tokenizers", "safetensors")


def create(name: str, out: str | Path | None = None, config_text: str = "") -> Path:
    """Make the run directory: `out` if given, else a new runs/<name>-<UTC time>.

    An `out` that exists may be continued (training resumes from its checkpoints), but only under the same config.

    Raises:
      UserError: `out` is a file, holds a run of another config or no run at all, or cannot be made.
    """
    try:
        if out is not None:
            path = Path(out)
            path.mkdir(parents=True, exist_ok=True)
            said = path / "config.toml"
            if said.is_file() and said.read_bytes() != config_text.encode():
                raise UserError(f"{path} holds a run of another config, or {said} is damaged; give another --out")
            held = [] if said.is_file() else sorted(name for name in os.listdir(path) if not _own(name))
            if held:
                raise UserError(f"{path} holds {held[0]!r} and is no run of this config; give a new or empty --out")
            return path
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        Path("runs").mkdir(exist_ok=True)
        for again in range(1, 1000):
            path = Path("runs") / (f"{name}-{stamp}" + (f"-{again}" if again > 1 else ""))
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
        raise UserError(f"{path} exists already")
    except FileExistsError:
        raise UserError(f"--out {out}: is a file; a run needs a directory") from None


def _own(name: str) -> bool:
    """Whether a file may lie in the directory of a run that was killed before it had a config."""
    return name == LOCK or (name.startswith(".") and name.endswith(".tmp"))


@contextlib.contextmanager
def record(
    out: Path, config_text: str, *, config: Any = None, files: Iterable[Path] = (), command: Iterable[str] = ()
) -> Iterator[dict[str, Any]]:
    """Write config.toml and manifest.json around a run; yields the manifest, to which the run may add.

    A first run that fails by a mistake of the user before it made anything leaves nothing.

    Args:
      out: the run directory.
      config_text: the resolved config as TOML.
      config: the dataclass it stands for: its seeds and the files it names go into the manifest.
      files: further input files to hash.
      command: the command line.

    Raises:
      UserError: another process runs there; or the directory cannot be written.
    """
    with locked(out / LOCK, f"the run directory {out}"):
        first = not (out / "manifest.json").exists()
        try:
            with _recorded(out, config_text, config=config, files=files, command=command) as manifest:
                yield manifest
        except BaseException as error:
            made = {"config.toml", "manifest.json", LOCK}
            if first and exit_status(error) == 2 and set(os.listdir(out)) <= made:
                for name in made:
                    (out / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # a mount point, or where the shell stands
                    out.rmdir()
            raise


@contextlib.contextmanager
def _recorded(out: Path, config_text: str, **facts: Any) -> Iterator[dict[str, Any]]:
    manifest = describe(config_text, **facts)
    if (out / "manifest.json").exists():  # a continued run keeps its history
        manifest["earlier"] = _history(out / "manifest.json")
    write_text(out / "config.toml", config_text)
    write_json(out / "manifest.json", manifest)
    clock = time.perf_counter()
    status, problem = 1, None
    try:
        yield manifest
        status = 0
    except BaseException as error:
        status = exit_status(error)
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        manifest |= {
            "wall_seconds": round(time.perf_counter() - clock, 3),
            "exit_status": status,
            "error": problem,
        }
        try:
            write_json(out / "manifest.json", manifest)
        except UserError:
            if not status:  # a full disk must not hide what went wrong before
                raise


def _history(path: Path) -> list[dict[str, Any]]:
    """The manifests of earlier runs, oldest first."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return [*before.pop("earlier", []), before]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        say(f"{path} is damaged ({error}); the history of this run begins anew")
        return [{"error": f"the manifest of the runs before was damaged: {error}"}]


def describe(
    config_text: str = "", *, config: Any = None, files: Iterable[Path] = (), command: Iterable[str] = ()
) -> dict[str, Any]:
    """The manifest's facts about this moment: versions, device, hashes, seeds, command line, start time."""
    import jax

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    devices = jax.devices()
    named = [*files, *_named_files(config)]
    return {
        "command": list(command),
        "start": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "git": git_commit(),
        "platform": platform.platform(),
        "device": {"backend": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "config_sha256": hashlib.sha256(config_text.encode()).hexdigest(),
        "inputs_sha256": {_short(path): sha256(path) for path in dict.fromkeys(named)},
        "seeds": seeds(config),
        "wall_seconds": None,
        "exit_status": None,
        "error": None,
    }


def machine() -> dict[str, Any]:
    """Where a benchmark's numbers come from; the load and the peak of memory are those of now."""
    import jax

    return {
        "device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "architecture": platform.machine(),
        "python": platform.python_version(), "jax": jax.__version__,
        "load": os.getloadavg()[0], "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def _short(path: Path) -> str:
    """Relative to the working directory where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)


def sha256(path: Path) -> str:
    """The hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> dict[str, Any] | None:
    """The commit of the source tree qjax runs from and whether it was changed; None for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "rundir.py")  # not a stranger's repository around a virtual environment
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _leaves(config: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(config):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _leaves(value, f"{at}.{key}" if at else str(key))
    elif isinstance(config, list | tuple):
        for n, value in enumerate(config):
            yield from _leaves(value, f"{at}.{n}")
    else:
        yield at, config


def seeds(config: Any) -> dict[str, int]:
    """The seeds of a config by their keys; those of a list by their place in it: `seeds.0`."""
    named = ((re.sub(r"(\.\d+)+$", "", key).rsplit(".", 1)[-1], key, value) for key, value in _leaves(config))
    return {key: value for name, key, value in named if "seed" in name and type(value) is int}


def _named_files(config: Any) -> Iterator[Path]:
    """The input files a config names: plain files, and what lies in a Hugging Face directory."""
    for _, value in _leaves(config):
        if not isinstance(value, str | Path) or not str(value):
            continue
        path = Path(value)
        with contextlib.suppress(OSError, ValueError):  # a string too long or with NUL to be a path
            if path.is_file():
                yield path
            elif (path / "config.json").is_file():
                yield from (p for p in sorted(path.iterdir()) if p.is_file())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinities, which JSON lacks, become null; array scalars become numbers."""
    write_text(path, _json(value, indent=2) + "\n")


def _json(value: Any, indent: int | None = None) -> str:
    """JSON text that UTF-8 can hold: lone surrogates (bytes of file names, broken escapes) stay JSON escapes."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def log(out: Path, row: Mapping[str, Any]) -> None:
    """Append one line to metrics.jsonl; what a kill left of a line goes."""
    with (out / "metrics.jsonl").open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write((_json(row) + "\n").encode())


def logged(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where there is no such file. What a kill left of a last line is left out.

    Raises:
      UserError: a line that is no row; it names file and line.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: damaged ({error}); mend or delete the line, or begin anew") from None
        rows.append(row)
    return rows


def plain(value: Any) -> Any:
    """Dataclasses, tuples, paths and array scalars as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def command_line() -> list[str]:
    """How this process was started, for people to repeat: `qjax run ...`."""
    name = Path(sys.argv[0]).name
    return ["qjax" if name == "__main__.py" else name, *sys.argv[1:]]
