"""Commands that run together, for the tests of several processes."""

import socket
import subprocess


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ends_of(commands, env, timeout):
    """[(exit status, what it said)] of commands that run at once."""
    workers = [
        subprocess.Popen(c, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for c in commands
    ]
    try:
        said = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, text) for worker, text in zip(workers, said, strict=True)]


def run_together(commands, env, timeout):
    """Run all at once and return what they said; raises AssertionError with it unless all succeed."""
    ends = ends_of(commands, env, timeout)
    assert [status for status, _ in ends] == [0] * len(ends), "\n".join(said for _, said in ends)
    return [said for _, said in ends]
