"""What the tests cost: the dearest twenty and the sum of every part, in seconds of processor time.

Wall time of a test says more about what ran beside it; processor time adds up to what a machine has to spend.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

DEAREST = 20


def _spent() -> float:
    """Processor seconds of this process and of the children it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Setup and teardown included: a module's fixtures count for the test that needed them first."""
    item.stash[STARTED] = _spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.user_properties.append(("cpu", _spent() - item.stash[STARTED]))
    return report


def pytest_terminal_summary(terminalreporter):
    each = Counter()
    for report in terminalreporter.stats.get("", []):  # teardowns that went well
        each[report.nodeid] += dict(report.user_properties).get("cpu", 0.0)
    if len(each) < DEAREST:
        return
    parts, files = Counter(), Counter()
    for name, seconds in each.items():
        path = Path(name.split("::")[0])
        files[str(path)] += seconds
        parts[path.parts[1] if len(path.parts) > 2 else "tests"] += seconds
    write = terminalreporter.write_line
    terminalreporter.section("processor seconds")
    for title, table in (("test", each), ("file", files), ("part", parts)):
        for name, seconds in table.most_common(DEAREST):
            write(f"{seconds:8.1f} {title}  {name}")
    write(f"{sum(each.values()):8.1f} all   {len(each)} tests")


STARTED = pytest.StashKey[float]()
