"""What a kernel costs on an H100, as its compiler says; found without one."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import cuda_ahead
import jax
import pytest


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one program.

    Attributes:
      registers: of a thread.
      spilled: whether any of them are.
      main_loop: SASS instructions of the innermost loop around all matrix products; 0 without a disassembler.
      temporary: bytes besides inputs and outputs.
    """

    registers: int
    spilled: bool
    main_loop: int
    temporary: int


@pytest.fixture
def h100(tmp_path, monkeypatch):
    """(fn, *shapes) -> the Cost of fn, in which there is one kernel; skips where its compiler is not at hand."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)  # a program found compiled says nothing of it

    def cost(fn, *shapes):
        temporary = cuda_ahead.compiled(fn, *shapes).memory_analysis().temp_size_in_bytes
        report = next(tmp_path.glob("*.ptxas")).read_text()
        spilled = "0 bytes spill stores, 0 bytes spill loads" not in report
        loop = _main_loop(next(tmp_path.glob("*.ptx")))
        return Cost(int(re.search(r"Used (\d+) registers", report)[1]), spilled, loop, temporary)

    yield cost
    jax.config.update("jax_enable_compilation_cache", True)


def _main_loop(ptx: Path) -> int:
    if not shutil.which("ptxas") or not shutil.which("nvdisasm"):
        return 0
    subprocess.run(["ptxas", "-arch=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")], check=True)
    done = subprocess.run(["nvdisasm", "-c", ptx.with_suffix(".cubin")], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line))}
    code = [i for i, line in enumerate(lines) if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    products = [i for i in code if "GMMA" in lines[i]]
    jumps = [(i, labels[to[1]]) for i in code if (to := re.search(r"BRA `\((\.L_x_\d+)\)", lines[i]))]
    first, last = min((b - a, a, b) for b, a in jumps if a <= products[0] and products[-1] <= b)[1:]
    return sum(first <= i <= last for i in code)
