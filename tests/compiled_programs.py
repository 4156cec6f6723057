"""Compiled programs are kept between runs of the tests: most of the time of a first run is compilation.

One folder for each processor and version of JAX, for programs hold machine code. Nothing depends on it: without the
folder, or with a damaged program in it, JAX compiles anew.
"""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path


def folder() -> Path:
    """Where the programs for this machine and this JAX lie, beside the llama.cpp that `.ci/run` keeps."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "qjax" / f"programs-jax{importlib.metadata.version('jaxlib')}-{_processor()}"


def _processor() -> str:
    """What machine code depends on, short: the processor's name and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        said = [platform.machine(), platform.processor()]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]
