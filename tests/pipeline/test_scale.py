"""What models that fit on no device take: the compiled programs hold no more than the committed table says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qjax.report.result import read

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
sys.path.insert(0, "experiments")
import scale
print(json.dumps(scale.run(scale.Config(), None)))
"""


@pytest.mark.slow
def test_no_device_holds_more_than_the_page_says():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found, said = json.loads(done.stdout), read(ROOT / "experiments/results/scale.json")
    programs, models = (table.rows for table in said.tables)
    assert [row["program"] for row in found["programs"]] == [row["program"] for row in programs]
    for row, before in zip(found["programs"], programs, strict=True):
        assert row["all_gb"] <= 1.05 * before["all_gb"] and row["all_gb"] < 40, row
    assert found["models"] == list(models)
