"""Runs of several processes of which one dies or hangs: the others end, and say which it was.

In a file of their own, for they wait most of their time, and a file's tests run one after another.
"""

import os
import signal
import socket
import time

import pytest
from helpers import ROOT, TINY, start


def processes_of(number, *command):
    """`python COMMAND` in that many processes, in the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = dict(WORLD_SIZE=number, MASTER_ADDR="127.0.0.1", MASTER_PORT=free.getsockname()[1])
    return [start(*command, env=os.environ | {name: str(value) for name, value in group.items()}
                  | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(number)]


@pytest.mark.parametrize("sent, then", [
    (signal.SIGSTOP, None), pytest.param(signal.SIGKILL, None, marks=pytest.mark.slow),
    pytest.param(signal.SIGSTOP, signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_process_that_is_lost_ends_the_others(tmp_path, sent, then):
    """One that has died, or hangs, is named with the last checkpoint, after the time-out at the latest."""
    flags = [*TINY, "--batch-size", "12", "--iterations", "100000", "--save-every", "200", "--timeout", "6"]
    group = processes_of(3, ROOT / "yoso.py", *flags, "--out", tmp_path / "run")
    while not list(tmp_path.glob("run/checkpoint/0*")):
        assert all(process.poll() is None for process in group), [p.stderr.read() for p in group]
        time.sleep(0.2)
    time.sleep(1)  # behind the save, whose end all await much longer
    os.kill(group[1].pid, sent)
    lost, others = time.monotonic(), (group[0], group[2])
    if then:
        for process in others:
            process.send_signal(then)
    errors = [process.communicate(timeout=60)[1] for process in others]
    assert time.monotonic() - lost < 30
    group[1].kill()
    group[1].communicate()
    assert [process.returncode for process in others] == [2, 2]
    lines = [line for error in errors for line in error.splitlines() if "rank 1: has ended" in line]
    assert lines and not any("Traceback" in error for error in errors), errors
    assert all("the checkpoint of iteration" in line and "--timeout 6" in line for line in lines)


LOST_OUTSIDE_A_STEP = """
import os, sys, torch
from plumbing.cli import run_command
from plumbing.files import gathered
from plumbing.run import start_processes
def main(argv):
    start_processes(torch.device("cpu"))
    gathered(1)
    if os.environ["RANK"] == "1":
        os._exit(1)
    gathered(2)
run_command(main)
"""


def test_a_process_that_is_lost_outside_of_a_step_is_named(tmp_path):
    (tmp_path / "script.py").write_text(LOST_OUTSIDE_A_STEP)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT))
        group = processes_of(2, tmp_path / "script.py")
    error = group[0].communicate(timeout=100)[1]
    group[1].communicate()
    assert group[0].returncode == 2
    assert error.startswith("script.py: rank 1: has ended, or does not answer") and error.count("\n") == 1
