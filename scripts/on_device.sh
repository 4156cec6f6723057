#!/usr/bin/env bash
# What only a device shows, in under five minutes, offline: correctness, compile times and speed on the GPU at hand.
#
#   scripts/on_device.sh --pack DIR                here: the packages that machine lacks, into DIR (170 MB)
#   scripts/on_device.sh --carry DIR [part ...]    there: with Python 3.12 and jax[cuda]; all parts unless some are named
#   scripts/on_device.sh --dry [part ...]          every part on the CPU at tiny shapes
#
# Parts: exact, tests, compile, encode, kernels, generate. Each runs in a process of its own, and the next though one fails. A summary
# comes last; on_device.json (--out FILE) has it all, with device, versions, commit and command. --limit SECONDS, of all
# parts together, is 285 but for --dry. Results worth keeping go to experiments/results/gpu/.
#
# A new part is a file scripts/on_device/NAME.py with `measure(dry) -> {"ok": bool, "lines": [str], ...}`, and its name
# in PARTS of scripts/on_device/run.py; what it measures must fit the five minutes beside the others.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

if [ "${1:-}" = --pack ]; then
  to=${2:?--pack needs a folder}
  exec "${PYTHON:-python3}" -m pip install -q --no-deps --upgrade --target "$to" --python-version 3.12 --implementation cp \
    --only-binary=:all: --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    -r scripts/on_device/packages.txt
fi

carry=
if [ "${1:-}" = --carry ]; then
  carry=$(cd "${2:?--carry needs a folder}" && pwd)
  shift 2
fi
export PYTHONPATH="$root${carry:+:$carry}${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_PREALLOCATE=false
exec "${PYTHON:-python3}" scripts/on_device/run.py "$@"
