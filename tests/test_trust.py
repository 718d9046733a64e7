"""What runs do when a number, a file, the disk or a process fails: they say so, and keep what was good."""

import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, TINY, equal, forking, metrics, start, state
from safetensors.torch import load_file

import diff_instruct_star as di
import swiftbrush_v2 as sb
import yoso
from common import UserError
from plumbing.cli import run_command
from plumbing.data import load_dataset
from plumbing.files import open_tensors
from plumbing.grids import save_grid
from plumbing.run import Run

# Flags of runs of two iterations a stage, by kind, below the folder of the tiny models.
FINE_TUNE = ["--preset", "mini", "--model", "sd", "--iterations", "2", "--adapt-iterations", "2",
             "--batch-size", "4", "--prior-num", "8", "--log-every", "100", "--save-every", "1",
             "--sample-every", "2"]
DISTIL = ["--preset", "shapes", "--model", "sd", "--decoder", "tae", "--iterations", "2", "--batch-size", "4",
          "--convert-iterations", "2", "--rank", "4", "--log-every", "100", "--save-every", "1"]
KINDS = {
    "scratch": (yoso, [*TINY, "--iterations", "2", "--log-every", "100", "--save-every", "1"]),
    "full": (yoso, FINE_TUNE),
    "lora": (yoso, [*FINE_TUNE, "--rank", "4"]),
    "adapt": (yoso, [*FINE_TUNE, "--adapt"]),
    "cached": (yoso, [*FINE_TUNE, "--dataset", "pictures", "--cache-latents"]),
    "swiftbrush": (sb, [*DISTIL, "--clip", "clip", "--iterations-b", "2", "--rank-b", "4", "--regularise",
                        "pairs", "--regularise-num", "4", "--regularise-steps", "2"]),
    "diff_instruct": (di, [*DISTIL, "--reward", "clip", "--probe", "", "--warmup", "1",
                           "--assistant-warmup", "0"]),
}

SCRIPTS = {script.__name__: script for script in (yoso, sb, di)}


pytestmark = pytest.mark.usefixtures("few_pictures")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where the tiny models lie, and a folder of eight pictures with captions."""
    folder = tiny.save_models(tmp_path_factory.mktemp("models"))
    (folder / "pictures").mkdir()
    for i, sample in enumerate(load_dataset("shapes", 32)[i] for i in range(8)):
        save_grid(sample["image"][None] / 127.5 - 1, folder / "pictures" / f"{i}.png", 1)
        (folder / "pictures" / f"{i}.txt").write_text(sample["caption"])
    return folder


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """finished(kind): the folder of a finished run, made when it is first asked for."""
    runs, root = {}, tmp_path_factory.mktemp("finished")

    def folder(kind):
        if kind not in runs:
            train(kind, models, root / kind)
            runs[kind] = root / kind
        return runs[kind]
    return folder


def arguments(kind, models, out, *more):
    """The command line of a run, with the models' paths."""
    script, flags = KINDS[kind]
    paths = {name: str(models / name) for name in ("sd", "tae", "clip", "pictures")}
    return [*(paths.get(flag, flag) for flag in flags), "--device", "cpu", "--out", str(out), *more]


def train(kind, models, out, *more):
    """The run, in this process."""
    KINDS[kind][0].main(arguments(kind, models, out, *more))


# Numbers that are not finite

# Kind, stage (a folder below OUT), which of an iteration's updates, and what is named.
NETWORKS = [("scratch", ".", 0, "grad_D"), ("scratch", ".", 1, "grad_G"), ("full", ".", 1, "grad_G"),
            ("lora", ".", 0, "grad_D"), ("lora", ".", 1, "grad_G"), ("adapt", "adapt-1", 0, "grad_student"),
            ("adapt", "adapt-2", 0, "grad_student"), ("adapt", ".", 1, "grad_G"),
            ("swiftbrush", "start", 0, "grad_student"), ("swiftbrush", "a", 0, "grad_student"),
            ("swiftbrush", "a", 1, "grad_lora_teacher"), ("swiftbrush", "b", 0, "grad_student"),
            ("swiftbrush", "b", 1, "grad_lora_teacher"), ("diff_instruct", "start", 0, "grad_student"),
            ("diff_instruct", ".", 0, "grad_assistant"), ("diff_instruct", ".", 1, "grad_student")]


@pytest.mark.parametrize("kind, stage, update, name", NETWORKS)
def test_a_gradient_that_is_not_finite_ends_the_run(models, tmp_path, monkeypatch, kind, stage, update, name):
    """In the last step, with finite losses: it is named, and nothing is saved, shown or exported after it."""
    out, calls, average = tmp_path / "run", [], Run.average_gradients
    where = out if stage == "." else out / stage

    def poisoned(run, parameters):
        average(run, parameters)
        if run.out == where:
            calls.append(run)
            per_iteration = 1 if name == "grad_student" and stage in ("start", "adapt-1", "adapt-2") else 2
            if len(calls) == run.config.iterations * per_iteration - per_iteration + update + 1:
                next(p.grad for p in parameters if p.grad is not None).view(-1)[0] = float("nan")
    monkeypatch.setattr(Run, "average_gradients", poisoned)
    last = 3 if kind == "diff_instruct" and stage == "." else 2
    message = f"iteration {last}: {name} is not finite.*the checkpoint of iteration {last - 1} is kept"
    with pytest.raises(UserError, match=message):
        train(kind, models, out)
    assert max(int(path.name) for path in (where / "checkpoint").glob("0*")) == last - 1
    assert not (where / "pipeline").exists() and not list(where.glob("samples/*2.png"))
    files = [file for file in out.rglob("*.safetensors")]
    assert files and all(value.isfinite().all() for file in files for value in load_file(file).values())
    monkeypatch.undo()
    train(kind, models, out)  # from the last good checkpoint
    assert (out / "pipeline").exists()


@pytest.mark.parametrize("kind", ["scratch", "lora", "swiftbrush", "diff_instruct"])
def test_weights_that_overflow_are_not_saved(models, tmp_path, kind):
    """At this rate the weights are not finite after the last step, though its losses and gradients were."""
    one = {"scratch": ["--iterations", "1"], "lora": ["--iterations", "1"],
           "swiftbrush": ["--convert-lr", "3e38", "--convert-iterations", "1"],
           "diff_instruct": ["--convert-lr", "3e38", "--convert-iterations", "1"]}[kind]
    with pytest.raises(UserError, match=r"iteration 1: \w+\..* is not finite, stopped; no checkpoint yet"):
        train(kind, models, tmp_path / "run", "--lr", "3e38", *one)
    assert not list(tmp_path.rglob("checkpoint/0*")) and not list(tmp_path.rglob("pipeline"))
    assert not list(tmp_path.rglob("samples/*"))


# Damaged files

# What a resumed run reads beside its checkpoint, by kind.
SIDE_FILES = {
    "full": ["config.json", "metrics.jsonl", "informative_prior.safetensors", "original.safetensors"],
    "cached": ["cache/latents/latents-000000.safetensors", "cache/latents/made_by.json",
               "cache/conditions/conditions-000000.safetensors", "cache/conditions/made_by.json"],
    "swiftbrush": ["pairs/000000-000004.safetensors", "pairs/made_by.json", "a/metrics.jsonl",
                   "a/pipeline/unet/diffusion_pytorch_model.safetensors",
                   "b/pipeline/unet/diffusion_pytorch_model.safetensors",
                   "b/pipeline/scheduler/scheduler_config.json", "a/pipeline/checksums.json"],
    "diff_instruct": ["before.safetensors", "config.json"],
}


def changed(data, place, new):
    """The bytes with some replaced."""
    return data[:place] + new + data[place + len(new):]


DAMAGES = {
    "a flipped bit": lambda data: changed(data, 3 * len(data) // 4, bytes([data[3 * len(data) // 4] ^ 4])),
    "a zeroed part": lambda data: changed(data, len(data) // 2, bytes(len(data) // 4)),
    "cut short": lambda data: data[:-len(data) // 3],
    "empty": lambda data: b"",
    "other bytes": lambda data: b"x" * len(data),
    "not UTF-8": lambda data: b"\xff\xfe" + data,
}


@pytest.mark.parametrize("damage", [
    "a flipped bit", *(pytest.param(damage, marks=pytest.mark.slow) for damage in list(DAMAGES)[1:])])
@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in SIDE_FILES.items() for name in names])
def test_a_damaged_side_file_is_named(models, finished, tmp_path, kind, name, damage):
    """The run ends as it would have, or in one line that names the file; it never goes on with the damage."""
    open_tensors.cache_clear()
    whole = finished(kind)
    out = shutil.copytree(whole, tmp_path / whole.name)
    last, *_ = sorted((out / "checkpoint").glob("0*"), reverse=True) if kind != "swiftbrush" else [None]
    if last and kind == "full":
        shutil.rmtree(last)  # its last iteration is still to come
    data = (out / name).read_bytes()
    (out / name).write_bytes(DAMAGES[damage](data))
    more = ["--stage", "merge"] if "pipeline" in name else []
    try:
        train(kind, models, out, *more)
    except UserError as error:
        assert str(Path(name).name) in str(error) or str(out / Path(name).parts[0]) in str(error), error
        assert "\n" not in str(error)
    else:
        assert "safetensors" not in name, "damage that nobody saw"
        if kind != "swiftbrush":
            assert equal(state(out), state(whole))


def test_tensors_of_another_run_are_not_taken(models, finished, tmp_path):
    """Whole files, but of a run with another seed."""
    for kind, name in (("full", "informative_prior.safetensors"), ("full", "original.safetensors"),
                       ("swiftbrush", "pairs/000000-000004.safetensors"),
                       ("diff_instruct", "before.safetensors")):
        open_tensors.cache_clear()
        train(kind, models, tmp_path / f"other {kind}", "--seed", "5")
        out = shutil.copytree(finished(kind), tmp_path / f"{kind} {Path(name).name}")
        shutil.copyfile(tmp_path / f"other {kind}" / name, out / name)
        with pytest.raises(UserError, match=f"{Path(name).name}: belongs to another run"):
            train(kind, models, out)
        shutil.rmtree(tmp_path / f"other {kind}")


@pytest.mark.parametrize("kind", ["full", "swiftbrush", "diff_instruct"])
def test_no_damaged_pipeline_is_sampled(models, finished, tmp_path, kind):
    out = shutil.copytree(finished(kind), tmp_path / kind)
    damage_network(out / "pipeline")
    argv = ["sample", "--run", str(out), "--num", "2", "--grid", str(tmp_path / "grid.png"), "--device",
            "cpu"]
    with pytest.raises(UserError, match="pipeline: damaged, unet/.* is not what was written"):
        KINDS[kind][0].main(argv)
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("kind, flag", [("full", "--model"), ("swiftbrush", "--model"),
                                        ("swiftbrush", "--student"), ("diff_instruct", "--model"),
                                        ("diff_instruct", "--student")])
def test_no_damaged_pipeline_is_trained_on(models, finished, tmp_path, kind, flag):
    """One that a run has written, and a bit of which was flipped."""
    damaged = shutil.copytree(finished("swiftbrush") / "pipeline", tmp_path / "damaged")
    damage_network(damaged)
    with pytest.raises(UserError, match="damaged: damaged, unet/.* is not what was written"):
        train(kind, models, tmp_path / "run", flag, str(damaged))
    assert not (tmp_path / "run").exists()


def damage_network(pipeline):
    """Turns over a bit of its network's weights."""
    file = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(DAMAGES["a flipped bit"](file.read_bytes()))


# Full disks

def train_within(size, errors, script, argv):
    """The command in a process that can write no file larger than `size`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    sys.argv = [f"{script}.py", *argv]
    sys.stdout = sys.stderr = errors
    run_command(SCRIPTS[script].main)


class Sent:
    """A text file whose lines go through a pipe, for the process may write no file."""

    def __init__(self, pipe):
        self.pipe = pipe

    def write(self, text):
        self.pipe.send(text)

    def flush(self):
        pass

    def isatty(self):
        return False


SIZES = [0, 100, 1000, 10_000, 50_000, 200_000, 1_000_000]


@pytest.mark.parametrize("kind, size", [
    (kind, size) if (kind, size) in (("scratch", 0), ("full", 1000), ("swiftbrush", 10_000))
    else pytest.param(kind, size, marks=pytest.mark.slow) for kind in KINDS for size in SIZES])
def test_a_full_disk_ends_in_one_line(models, tmp_path, kind, size):
    """It names a file and the reason; the same command with room then ends as if nothing had been."""
    context = forking()
    receiver, sender = context.Pipe(False)
    script, argv = KINDS[kind][0].__name__, arguments(kind, models, tmp_path / "run")
    process = context.Process(target=train_within, args=(size, Sent(sender), script, argv))
    process.start()
    sender.close()
    text = ""
    try:
        while True:
            text += receiver.recv()
    except EOFError:
        process.join()
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith(f"{script}.py: ")]
    assert "Traceback" not in text and process.exitcode in (0, 2), text
    assert len(lines) == process.exitcode // 2, text
    assert all(str(tmp_path / "run") in line and "File too large" in line for line in lines), lines
    assert size > 100 or lines
    if lines and kind in ("scratch", "diff_instruct"):
        train(kind, models, tmp_path / "run")


def fill_up(argv):
    """A main that writes to a full disk."""
    with open("/dev/full", "w") as file:
        file.write("x" * 10**6)


def test_a_write_that_nobody_foresaw_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(fill_up)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("the output: No space left on device\n")


# Pickles

@pytest.mark.parametrize("kind", ["scratch", "lora", "swiftbrush", "diff_instruct"])
def test_no_pickle_is_ever_loaded(models, tmp_path, monkeypatch, kind):
    """Through training, resuming, export and sampling."""
    def refuse(*_, **__):
        raise AssertionError("a pickle was loaded")
    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    script, out = KINDS[kind][0], tmp_path / "run"
    train(kind, models, out)
    for folder in out.rglob("checkpoint"):
        shutil.rmtree(folder / sorted(os.listdir(folder))[-1])  # the last iteration anew
    train(kind, models, out)
    script.main(["sample", "--run", str(out), "--num", "2", "--grid", str(tmp_path / "grid.png"),
                 "--device", "cpu"])
    assert (tmp_path / "grid.png").exists()


# Kills

# Calls between the first kills; every ninth was tried too, which takes minutes.
STEP = dict(scratch=13, lora=41, swiftbrush=97, diff_instruct=61)


def killed_at(moment, argv, script):
    """The command in a process that kills itself at that call of a function that changes files."""
    calls = []

    def aimed(function):
        def call(*arguments, **more):
            calls.append(function)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)
        return call
    for owner, name in ((os, "replace"), (Path, "rename"), (shutil, "rmtree"), (os, "fsync"), (Path, "mkdir"),
                        (torch.distributed.checkpoint, "save"), (json, "dumps")):
        setattr(owner, name, aimed(getattr(owner, name)))
    SCRIPTS[script].main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scratch", "lora", "swiftbrush", "diff_instruct"])
def test_a_kill_at_any_moment_loses_nothing(models, finished, tmp_path, kind):
    """The same command, killed twice, ends with the same numbers, to the bit."""
    whole, script = finished(kind), KINDS[kind][0].__name__
    for first in itertools.count(1, STEP[kind]):
        out, exits = tmp_path / str(first), []
        for moment in (first, 1 + first // 2, 10**9):
            argv = arguments(kind, models, out)
            process = forking().Process(target=killed_at, args=(moment, argv, script))
            process.start()
            process.join()
            exits.append(process.exitcode)
        assert set(exits) <= {0, -signal.SIGKILL} and exits[-1] == 0, exits
        for folder in whole.rglob("checkpoint"):
            assert equal(state(out / folder.parent.relative_to(whole)), state(folder.parent)), (first, folder)
        shutil.rmtree(out)
        if exits[0] == 0:
            break
    assert first > 30


@pytest.mark.slow
def test_kills_from_outside_lose_nothing(tmp_path):
    """At random moments of a real command, four times; the log has every line once."""
    flags = [*TINY, "--iterations", "150", "--save-every", "3", "--sample-every", "50", "--log-every", "10"]
    yoso.main([*flags, "--out", str(tmp_path / "whole")])
    draw, kills = torch.Generator().manual_seed(0), 0
    while True:
        process = start(ROOT / "yoso.py", *flags, "--out", tmp_path / "killed")
        pause = 4 + 6 * torch.rand(1, generator=draw).item()
        try:
            _, error = process.communicate(timeout=pause if kills < 4 else 280)
            assert process.returncode == 0, error
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills and equal(state(tmp_path / "killed"), state(tmp_path / "whole"))
    lines = [[row["iteration"] for row in metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert lines[0] == lines[1]
