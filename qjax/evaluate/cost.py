"""What making and running a model costs: the peak of memory, tokens a second.

peak = watch_memory(); ...; peak()        MB of this process since then
tokens_per_second(model, prompt, 64)      of `generate`, without what it compiles
"""

from __future__ import annotations

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
