"""What a command will write, looked at before it works: nothing is lost, and nothing fails behind an hour of work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qjax.errors import UserError

FORCE_HELP = "replace an OUT that exists"
FILES = {".bin", ".safetensors", ".pt", ".pth", ".npz", ".onnx", ".ggml"}  # no names of folders


def check_output(out: Path, inputs: Iterable[str | Path | None], force: bool) -> None:
    """Refuse an output that is one of the inputs, and one that exists unless it may be replaced.

    Args:
      out: a .gguf file, or a folder.
      inputs: the model and whatever else the command reads.
      force: whether an existing output may be replaced. Unfinished work of an earlier run is no output.

    Raises:
      UserError: see above; no folder to write in, or one that takes no file.
    """
    if out.suffix.lower() in FILES:
        raise UserError(f"-o {out}: qjax writes no {out.suffix} file; name it .gguf, or a folder")
    for path in inputs:
        if path is not None and _same(out, Path(path)):
            raise UserError(f"-o {out} is {path} itself, which is read; write to another name")
    if os.path.lexists(out) and not force:
        raise UserError(f"-o {out} exists; --force replaces it")
    _check_writable(out)


def check_json(json: Path | None, others: Iterable[str | Path | None] = ()) -> None:
    """Refuse a --json that would fail behind the work, or replace what is read or written.

    Args:
      json: the option's value; "-" is standard output.
      others: files and folders that the command reads or writes.

    Raises:
      UserError: see above.
    """
    if json is None or str(json) == "-":
        return
    for path in others:
        if path is not None and _same(json, Path(path)):
            raise UserError(f"--json {json} is {path} itself; write the numbers to another name")
        if path is not None and os.path.lexists(json) and _same(json.parent, Path(path)):
            raise UserError(f"--json {json} is a file of {path}; write the numbers to another name")
    if json.exists() and not json.is_file():
        raise UserError(f'--json {json} is no file; write the numbers to a file, or to standard output with "-"')
    _check_writable(json)


def _same(a: Path, b: Path) -> bool:
    """One file, whether it exists or will, and whichever links and dots lead there."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def _check_writable(path: Path) -> None:
    """Try a file in the folder: what access(2) says is not what a read-only or remote disk does."""
    from qjax.io.atomic import check_folder

    check_folder(path)
