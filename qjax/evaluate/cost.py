"""What making and running a model costs: the peak of memory, tokens a second.

peak = watch_memory(); ...; peak()        MB of this process since then
cost_of(["qjax", "export", ...])          of a command in a process of its own
tokens_per_second(model, prompt, 64)      of `generate`, without what it compiles
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qjax.errors import UserError
from qjax.models.generate import generate
from qjax.models.model import Model

PROCESS = Path("/proc/self")  # Linux


def watch_memory() -> Callable[[], float | None]:
    """Forget the process's peak of resident memory so far.

    Returns: a function without arguments that gives the peak since now, in MB; None where the system cannot forget.
    """
    try:
        (PROCESS / "clear_refs").write_text("5")  # proc(5): the peak becomes the present size
    except OSError:
        return lambda: None
    return _peak_mb


def _peak_mb() -> float | None:
    found = re.search(r"VmHWM:\s*(\d+) kB", (PROCESS / "status").read_text())
    return None if found is None else int(found[1]) * 1024 / 1e6


def cost_of(command: Sequence[str]) -> dict[str, float]:
    """Run a command to its end.

    Returns: "seconds" of wall time, "cpu_seconds", "peak_rss_mb": the kernel's VmHWM, read while the process lives, for
      wait4's ru_maxrss would begin at the size of the process that started it. Linux has it; 0 elsewhere.

    Raises:
      UserError: it ends with another status than 0.
    """
    clock = time.perf_counter()
    pid = os.posix_spawn(command[0], list(command), os.environ)
    peak = done = 0
    while not done:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            peak = max(peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
        done, status, usage = os.wait4(pid, os.WNOHANG)
        time.sleep(0.0 if done else 0.02)
    if status:
        raise UserError(f"{' '.join(command[:4])} ... ended with status {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": round(time.perf_counter() - clock, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mb": round(peak * 1024 / 1e6, 1),
    }


def tokens_per_second(model: Model, prompt: Sequence[int], count: int) -> float:
    """How fast `generate` goes on, greedily: steps behind the prompt and the first token.

    Packed weights are decoded once and run in float32, so that this is a number of the machine and the architecture,
    not of the format.

    Args:
      model: what generates.
      prompt: token ids.
      count: steps that are timed.

    Raises:
      UserError: nothing to time; what `generate` raises.
    """
    if count < 1:
        raise UserError(f"tokens to time: at least 1, got {count}")
    compiled = generate(model, prompt, count + 1)
    next(compiled), next(compiled, None)  # the same shapes: the second pass compiles nothing
    stream = generate(model, prompt, count + 1)
    next(stream)
    clock = time.perf_counter()
    steps = sum(1 for _ in stream)
    return steps / (time.perf_counter() - clock)
