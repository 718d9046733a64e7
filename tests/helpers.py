"""What several test files need: the commands, how they fail, and what a run leaves behind."""

import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from diffusers import DiffusionPipeline
from PIL import Image

import plumbing.cli
import yoso
from common import Denoiser, load
from plumbing.checkpoint import read_checkpoint
from plumbing.run import Run
from plumbing.shapes import Shapes

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


# The schedules of Stable Diffusion and of PixArt, as their schedulers' configs name them.
SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
PIXART = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")

CAPTIONS = ["a large red circle on white", "a small blue square on black", "a large green triangle on gray",
            "a small red square on white"]


def drawings(number, size):
    """The first pictures of the embedded dataset, in [-1, 1], [number, 3, size, size]."""
    return torch.stack([Shapes(size)[i]["image"] for i in range(number)]).float() / 127.5 - 1


def random_vgg(patched):
    """Lets lpips build its network offline, with random weights; returns the layers that it will use."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    patched.setattr(torchvision.models, "vgg16", lambda pretrained: SimpleNamespace(features=layers))
    return layers


def forking():
    """Multiprocessing whose processes are forked from one that has imported the scripts, once for all tests.

    A new process would take seconds for that. Functions and their arguments are pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "tiny"])
    with pytest.MonkeyPatch.context() as patched:
        # Python 3.11 does not tell it sys.path, and it goes on without a word if it finds no module.
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    return context


def ranks(number, function, *arguments, timeout=250):
    """function(*arguments) in that many processes of one group, in the environment that torchrun gives them.

    One that fails ends them all. The function and its arguments are pickled.
    """
    context = forking()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE=number, LOCAL_WORLD_SIZE=number, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes, errors, end = [], context.SimpleQueue(), time.monotonic() + timeout
    for i in range(number):
        environment = group | dict(RANK=i, LOCAL_RANK=i)
        processes.append(context.Process(target=run_rank, args=(environment, errors, function, arguments)))
        processes[-1].start()
    while (running := [p for p in processes if p.is_alive()]) and time.monotonic() < end:
        multiprocessing.connection.wait([p.sentinel for p in running], 1)
        if any(p.exitcode for p in processes):
            break
    error = "the time was up" if errors.empty() else errors.get()
    for process in processes:
        process.kill()
        process.join()
    assert [p.exitcode for p in processes] == [0] * number, error


def run_rank(environment, errors, function, arguments):
    """One process of ranks()."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        function(*arguments)
    except BaseException:
        errors.put(traceback.format_exc())
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# The bench of the closed forms: the student draws mu + s z, the teacher's data are N(m, 1), at a noise level
# with alpha = .8 and sigma = .6, where x_t has the variance A for the student and B for the teacher.
ALPHA, SIGMA, MU, S, M = 0.8, 0.6, 0.5, 1.5, -0.3
A, B = ALPHA**2 * S**2 + SIGMA**2, 1.0


def quadrature(n):
    """Nodes z, eps and weights [n * n, 1, 1, 1] of two standard normals, exact up to degree 2 n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    z, eps = (torch.tensor(v).view(-1, 1, 1, 1) for v in np.meshgrid(nodes, nodes, indexing="ij"))
    return z, eps, torch.tensor(np.outer(weights, weights)).view(-1, 1, 1, 1) / (2 * math.pi)


@torch.no_grad()
def perturb(parameters, size=0.1):
    """Adds normal noise of that size to parameters by name: a fresh LoRA then changes its network."""
    for p in parameters.values():
        p.add_(size * torch.randn_like(p))


def unexplained(*runs):
    """The keys in the logs below these folders that docs/metrics.md does not explain."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    logs = [log.read_text().splitlines() for run in runs for log in Path(run).rglob("metrics.jsonl")]
    keys = {key for lines in logs for line in lines for key in json.loads(line)}
    assert "iteration" in keys
    return sorted(key for key in keys if f"| `{key}` |" not in page)


def gaussian_denoiser(schedule, variance):
    """A Denoiser that knows eps exactly, where the data are N(0, variance), whatever the condition."""
    def net(x_t, timestep, **cond):
        alpha, sigma = (v[timestep].view(-1, 1, 1, 1) for v in (schedule.alpha, schedule.sigma))
        return SimpleNamespace(sample=sigma * x_t / (alpha**2 * variance + sigma**2))

    return Denoiser(net, schedule, "epsilon")


def stop_at(patched, name, iteration):
    """Lets the runs whose folder has this name behave as after a SIGTERM in that iteration, from 1."""
    finish_iteration = Run.finish_iteration

    def stop(run, number, losses, draw=None):
        if (run.out.name, number + 1) == (name, iteration):
            run.signal = signal.SIGTERM
        return finish_iteration(run, number, losses, draw)

    patched.setattr(Run, "finish_iteration", stop)


def weights(pipeline):
    """The weights of an exported pipeline's network, by name."""
    return dict(load(pipeline)[0].net.state_dict())


def furthest(a, b):
    """The largest difference between two networks' weights, given by name."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


def levels_apart(a, b):
    """The largest difference between two picture files, in levels of 255; labels, in a's margin, aside."""
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (a, b))
    return abs(a[-len(b):, -b.shape[1]:] - b).max()


def plain(path, kind=DiffusionPipeline, **parts):
    """A pipeline as diffusers itself loads it."""
    pipe = kind.from_pretrained(path, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def defaults_in_help(capsys, script, *flags):
    """What --help of a script (its module) shows as the defaults beside these flags, by flag."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main([*flags, "--help"])
    assert stopped.value.code == 0
    flag_and_default = r"(?ms)^  (--[a-z0-9-]+)[ ,].*?\[(?![A-Z_]+ \.)([^];]*)"
    return dict(re.findall(flag_and_default, capsys.readouterr().out))
