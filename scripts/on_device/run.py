"""Run the parts, one process each, and report: see scripts/on_device.sh."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("exact", "tests", "compile", "encode", "kernels", "generate")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/on_device.sh", description="What only a device shows.")
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("on_device.json"))
    parser.add_argument("--limit", type=float, help="seconds of all parts together: 285, and an hour with --dry")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # a part's own process: where its result goes
    args = parser.parse_args()
    unknown = [p for p in args.parts if p not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.one:
        found = importlib.import_module(args.parts[0]).measure(args.dry)
        args.one.write_text(json.dumps({**found, "machine": machine()}))
        return 0

    if args.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
    begun, results = time.time(), {}
    limit = args.limit or (3600.0 if args.dry else 285.0)
    for part in args.parts or PARTS:
        left = limit - (time.time() - begun)
        results[part] = run(part, args.dry, left) if left > 1 else {"ok": False, "lines": ["no time was left"]}
        print(
            f"{part}: {'ok' if results[part]['ok'] else 'FAILED'}, {results[part].get('seconds', 0):.0f} s", flush=True
        )
    machines = [r.pop("machine", None) for r in results.values()]
    report = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
        "command": " ".join(["scripts/on_device.sh", *sys.argv[1:]]),
        "commit": commit(),
        "dry": args.dry,
        "machine": next((m for m in machines if m), None),
        "seconds": round(time.time() - begun, 1),
        "parts": results,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for part, result in results.items():
        print(f"\n{part}: {'ok' if result['ok'] else 'FAILED'}")
        for line in result["lines"]:
            print(f"  {line}")
    failed = [part for part, result in results.items() if not result["ok"]]
    print(f"\n{json.dumps(report['machine'])}")
    print(f"{args.out}, {report['seconds']:.0f} s; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def run(part: str, dry: bool, limit: float) -> dict:
    """A part's result; what it printed where it died."""
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / "run.py"), part, "--one", str(out), *(["--dry"] if dry else [])]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
            said = done.stdout
        except subprocess.TimeoutExpired as e:
            said = f"{(e.stdout or b'').decode(errors='replace')}\nstopped after {limit:.0f} s"
        lines = {"ok": False, "lines": said.splitlines()[-15:]}
        result = json.loads(out.read_text()) if out.exists() else lines
    return {**result, "seconds": round(time.time() - begun, 1)}


def machine() -> dict:
    import jax
    import jaxlib

    device = jax.devices()[0]
    return {
        "device": device.device_kind, "platform": device.platform, "count": len(jax.devices()),
        "backend": getattr(device.client, "platform_version", "").splitlines()[:2],
        "jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": sys.version.split()[0],
    }  # fmt: skip


def commit() -> str | None:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
