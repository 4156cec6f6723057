"""Commands that run together, for the tests of several processes."""

import socket
import subprocess


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_together(commands, env, timeout):
    """Run all at once; raises AssertionError with what they said unless all succeed."""
    workers = [
        subprocess.Popen(c, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for c in commands
    ]
    try:
        said = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n".join(said)
