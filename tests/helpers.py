"""What several test files need: the commands, how they fail, and what a run leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plumbing.cli
import yoso
from plumbing.checkpoint import read_checkpoint

ROOT = Path(__file__).parent.parent

# Flags of yoso.py for a run from scratch that takes a second or two.
TINY = ["--preset", "shapes", "--channels", "8", "16", "--channels-d", "8", "16", "--batch-size", "8",
        "--log-every", "2", "--save-every", "4", "--sample-every", "4", "--device", "cpu"]


def tiny_config(out, **changes):
    """yoso.Config of the flags TINY, of 4 iterations, with changes by name."""
    config = plumbing.cli.parse_config(yoso.Config, yoso.PRESETS, [*TINY, "--out", str(out)], "")
    return yoso.Config(**{**vars(config), "iterations": 4, **changes})


def equal(a, b):
    """Whether two nested state dicts hold exactly the same tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def moved(before, after):
    """Whether any parameter of two copies of a network differs."""
    return any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def state(out):
    """The last checkpoint of the run in the folder `out`: part -> key -> tensor."""
    return read_checkpoint(out / "checkpoint")["state"]


def metrics(out):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def fails(monkeypatch, capsys, script, *flags):
    """The one line that a script (its module), called with these flags, prints before it exits with 2."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        plumbing.cli.run_command(script.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


def start(*command, **options):
    """Starts `python COMMAND` as a process of its own, with its output in pipes."""
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def finish(process, code=0):
    """Waits for a process that start() gave, which must end with the exit code; returns (stdout, stderr)."""
    out, err = process.communicate(timeout=280)
    assert process.returncode == code, err[-3000:]
    return out, err


def torchrun(processes, *command):
    """`torchrun COMMAND` with that many processes on this machine, to its end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return finish(start(*launcher, *command))
