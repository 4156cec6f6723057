"""The tests marked `gpu`, which lie in files called test_gpu*.py."""

import subprocess
import sys
from pathlib import Path


def measure(dry: bool) -> dict:
    files = sorted(map(str, Path("tests").rglob("test_gpu*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = done.stdout.strip().splitlines()
    return {"ok": done.returncode == 0, "lines": said[-1:] if done.returncode == 0 else said[-25:]}
