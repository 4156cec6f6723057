"""Takes features of qjax away, one at a time, and expects a test to fail for each.

    python scripts/mutate.py              all mutants of the table
    python scripts/mutate.py --only NAME  those named, one or more
    python scripts/mutate.py --list       what there is, changing nothing

Each mutant replaces one piece of text in one file of a temporary copy of the package and runs the narrow tests that
guard it there; the working tree is never touched. First those tests run on the copy as it is, where all must pass.

    killed      a test failed by an assertion: the feature is guarded
    SURVIVED    all tests passed without the feature: they assert too little. Let one assert the feature's gain, against
                an independent reference, with a margin: "never worse" passes wherever a guard keeps the start.
    CRASHED     a test ended otherwise: the change breaks the program instead of the feature. Write it differently.

Exit status: 0 all killed, 1 something survived, 2 the table is out of date (a text that is not there exactly once, a
test that does not exist), a mutant crashed, or the tests fail before any change.

A mutant of your own is a line of MUTANTS in scripts/mutants.py. Take short texts that other edits are unlikely to move,
and tests that take a second or two: with compiled programs kept (tests/conftest.py) a mutant takes about a dozen,
mostly imports.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]


def stale(root: Path, mutants: Sequence[Mutant] = MUTANTS) -> list[str]:
    """What no longer fits the tree, a line each: texts that are not there exactly once, tests that are not there."""
    lines = []
    for m in mutants:
        path = root / m.file
        count = path.read_text().count(m.old) if path.is_file() else 0
        if count != 1:
            lines.append(f"{m.name}: {m.file} has {m.old!r} {count} times; the table wants a text that it has once")
        for test in m.ids:
            file, _, function = test.partition("::")
            function = function.partition("[")[0]
            found = root / file
            if not (found.is_file() and re.search(rf"^def {re.escape(function)}\(", found.read_text(), re.MULTILINE)):
                lines.append(f"{m.name}: there is no test {test}")
    return lines


def copied(root: Path, to: Path) -> Path:
    """What tests need of the tree, without compiled files."""
    for name in ("qjax", "tests", "configs"):
        shutil.copytree(root / name, to / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    shutil.copy(root / "pyproject.toml", to)
    return to


def tested(tree: Path, ids: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status and its last words on the tests of a copy; it stops at the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "slow or not slow", "-p", "no:cacheprovider"]
    # Wide enough that pytest does not cut the reason of a failure off; plugins are only slow to import.
    env = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "400", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, "--tb=line", *ids], cwd=tree, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def judged(status: int, output: str) -> tuple[str, str]:
    """The verdict on a mutant, and why."""
    if status == 0:
        return "SURVIVED", ""
    failed = re.search(r"^FAILED \S*?::(\S+)(?: - (.*))?$", output, re.MULTILINE)
    if status == 1 and failed:
        test, reason = failed[1], failed[2] or ""
        if reason.startswith(("assert", "AssertionError", "Failed: DID NOT RAISE")):
            return "killed", test
        return "CRASHED", f"{test}: {reason}"
    last = [line for line in output.splitlines() if line.strip()][-3:]
    return "CRASHED", f"pytest ended with {status}: " + " | ".join(last)


def run(mutants: Sequence[Mutant], tree: Path) -> int:
    """Run mutants on a copy; prints the table, returns the exit status."""
    ids = list(dict.fromkeys(test for m in mutants for test in m.ids))
    print(f"{len(mutants)} mutants, {len(ids)} tests; the tests first, on the code as it is ...", flush=True)
    begun = time.monotonic()
    status, output = tested(tree, ids)
    if status:
        print(output, file=sys.stderr)
        print("the tests fail before any change", file=sys.stderr)
        return 2
    print(f"{'passed':9} {time.monotonic() - begun:5.0f} s", flush=True)
    verdicts = []
    for m in mutants:
        path, begun = tree / m.file, time.monotonic()
        kept = path.read_text()
        path.write_text(kept.replace(m.old, m.new))
        # Python tells sources apart by size and second, which a change and its undoing may share.
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        try:
            verdict, why = judged(*tested(tree, m.ids))
        finally:
            path.write_text(kept)
            shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        verdicts.append(verdict)
        print(f"{verdict:9} {time.monotonic() - begun:5.0f} s  {m.name:28} {m.file:34} {why}", flush=True)
    survived, crashed = verdicts.count("SURVIVED"), verdicts.count("CRASHED")
    print(f"{verdicts.count('killed')} killed, {survived} survived, {crashed} crashed")
    return 1 if survived else 2 if crashed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants to run; all by default")
    parser.add_argument("--list", action="store_true", help="print the table and change nothing")
    options = parser.parse_args(argv)
    known = {m.name: m for m in MUTANTS}
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        print(f"no mutant {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    mutants = [known[name] for name in options.only or known]
    if options.list:
        for m in mutants:
            print(f"{m.name}\n    {m.file}: {m.old!r} -> {m.new!r}\n    {' '.join(m.ids)}")
        return 0
    lines = stale(ROOT, mutants)
    if lines:
        print("\n".join(lines), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="qjax-mutants-") as folder:
        return run(mutants, copied(ROOT, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
