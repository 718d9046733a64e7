"""Checkpoints: every part comes back, on any number of processes; damage and other flags are named."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, equal, fails, finish, metrics, ranks, start, state, tiny_config

import plumbing.checkpoint
import plumbing.run
import yoso
from common import EMA, UserError, Weights
from plumbing.checkpoint import (
    checkpoint_note,
    checkpoints,
    latest_checkpoint,
    load_parts,
    read_checkpoint,
    remove,
    sound_checkpoint,
    sweep,
    write_checkpoint,
)
from plumbing.run import Run

FLAGS = [*TINY, "--save-every", "2", "--iterations", "4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    yoso.main([*FLAGS, "--out", str(out)])
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "run")


# Parts

def make_parts():
    """A part of every kind: a network with buffers, another's weights, an average, two optimisers."""
    net, other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), torch.nn.Linear(4, 2)
    groups = [dict(params=net.parameters(), lr=0.1), dict(params=other.parameters(), lr=0.2)]
    parts = dict(net=net, other=Weights(other.named_parameters()),
                 ema=EMA(net.named_parameters(), 0.5, ramp=True), optimizer=torch.optim.Adam(groups),
                 sgd=torch.optim.SGD(other.parameters(), 0.1, momentum=0.9))
    return parts, other


def train(parts, other, steps):
    """Some updates of all parts."""
    for step in steps:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        for name in ("optimizer", "sgd"):
            parts[name].zero_grad()
            other(parts["net"](x)).square().mean().backward()
            parts[name].step()
        parts["ema"].update(step)


def test_every_part_comes_back_and_goes_on_the_same(tmp_path):
    parts, other = make_parts()
    train(parts, other, range(3))
    write_checkpoint(tmp_path, 3, parts, tiny_config(tmp_path))
    again, its_other = make_parts()
    load_parts(latest_checkpoint(tmp_path), again)
    saved = read_checkpoint(tmp_path)
    assert saved["iteration"] == 3 and saved["config"] == vars(tiny_config(tmp_path))
    assert saved["state"].keys() == parts.keys()
    for name in ("net", "other", "ema"):
        kept = parts[name].state_dict()
        assert equal(again[name].state_dict(), kept)
        assert equal(saved["state"][name], {key: torch.atleast_1d(value) for key, value in kept.items()})
    for nets in ((parts, other), (again, its_other)):
        train(*nets, range(3, 5))
    for name in ("net", "other", "ema"):
        assert equal(again[name].state_dict(), parts[name].state_dict())


# Folders

def names(folder):
    """What lies in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_take_their_place_when_complete(tmp_path, monkeypatch):
    """A half-written one is not seen and swept away; the last two are kept; a full disk keeps both; nothing
    is unpickled.
    """
    folder = tmp_path / "checkpoint"
    yoso.train(tiny_config(tmp_path, iterations=1))
    assert names(folder) == ["00000001"]
    (folder / "new").mkdir()
    for i in (1, 2):
        (folder / "new" / f"shard-0000{i}-model-00001-of-00001.safetensors").write_bytes(b"half")
    for function in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(function, None)
    run = Run(tiny_config(tmp_path, iterations=1))
    part = torch.nn.Linear(2, 2)
    run.parts = dict(part=part)
    assert run.start == 1
    run.save(3)
    assert names(folder) == ["00000001", "00000003"]
    assert names(folder / "00000001") == names(folder / "00000003")

    def full(*arguments, **more):
        (folder / "new").mkdir()
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(plumbing.checkpoint.dcp, "save", full)
        with pytest.raises(UserError, match="iteration 6 cannot be saved.*No space left"):
            run.save(6)
    assert names(folder) == ["00000001", "00000003"]
    run.save(6)
    assert names(folder) == ["00000003", "00000006"]
    assert torch.equal(read_checkpoint(folder)["state"]["part"]["weight"], part.weight)


def test_what_a_checkpoint_is_called(tmp_path):
    """A folder of eight digits or more, of which the largest number is the newest."""
    for name in ("00000004", "99999999", "100000000", "0000004", "00000020-backup", "new", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "200000000").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["100000000", "99999999", "00000004"]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """A kill in the middle of a removal leaves none that is half there."""
    (tmp_path / "00000004").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **more: None)
    remove(tmp_path / "00000004")
    assert names(tmp_path) == ["old"]


def test_what_a_kill_has_left_is_swept(tmp_path):
    """A half-written checkpoint and a half-removed one, where there is nothing else to remove."""
    for name in ("00000004", "new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text("{}")
    sweep(tmp_path, 4)
    assert names(tmp_path) == ["00000004"]
    shutil.copytree(tmp_path / "00000004", tmp_path / "old")
    remove(tmp_path / "00000004")
    assert names(tmp_path) == []


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Its folder and every file in it."""
    synced, sync, rename = set(), os.fsync, Path.rename

    def renamed(path, target):
        assert synced == {file.stat().st_ino for file in (path, *path.iterdir())}
        return rename(path, target)
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), sync(file)))
    monkeypatch.setattr(Path, "rename", renamed)
    write_checkpoint(tmp_path, 4, dict(part=torch.nn.Linear(2, 2)), tiny_config(tmp_path))
    assert names(tmp_path) == ["00000004"] and len(synced) > 2


def test_only_what_the_run_made_is_removed(tmp_path):
    """Old checkpoints, also where a kill came before their removal, at the next start; nothing else."""
    folder, part = tmp_path / "checkpoint", dict(part=torch.nn.Linear(2, 2))
    config = tiny_config(tmp_path, iterations=8)
    others = ["00000020-backup", "00000007", "keep_me", "123"]
    for name in others:
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text("mine")
    for done in (4, 5, 6):
        write_checkpoint(folder, done, part, config)
    shutil.copytree(folder / "00000005", folder / "00000004")  # as if killed before its removal
    shutil.copytree(folder / "00000005", folder / "old")
    shutil.copytree(folder / "00000006", folder / "00000009")  # from before the run went back
    shutil.rmtree(folder / "00000007")
    run = Run(replace(config, batch_size=8))
    assert run.start == 9
    run.start = 6
    run.source = None
    run.begin(part)
    run.end()
    assert names(folder) == sorted(["00000005", "00000006", *set(others) - {"00000007"}])
    assert (folder / "keep_me" / "notes.txt").read_text() == "mine"


DAMAGES = {
    "a flipped bit": lambda file, note: flip(file, 1000),
    "a flipped bit in the header": lambda file, note: flip(file, 20),
    "a zeroed page": lambda file, note: zero(file, 4096, 4096),
    "cut short": lambda file, note: file.write_bytes(file.read_bytes()[:-1000]),
    "emptied": lambda file, note: file.write_bytes(b""),
    "other bytes": lambda file, note: file.write_bytes(b"x" * file.stat().st_size),
    "deleted": lambda file, note: file.unlink(),
    "of the other checkpoint": lambda file, note: shutil.copyfile(other(file), file),
    "the note cut short": lambda file, note: note.write_text(note.read_text()[:-9]),
    "the note a list": lambda file, note: note.write_text("[]"),
    "the note without a config": lambda file, note: note.write_text('{"config": 1, "files": {}}'),
    "the note deep": lambda file, note: note.write_text("[" * 10**5),
    "the note deleted": lambda file, note: note.unlink(),
    "all deleted": lambda file, note: (file.unlink(), note.unlink()),
}


def flip(file, place):
    """Turns over one bit."""
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def zero(file, first, number):
    """Fills a part with zeros, as a lost page."""
    data = bytearray(file.read_bytes())
    data[first:first + number] = bytes(number)
    file.write_bytes(data)


def other(file):
    """The same file of the run's other checkpoint."""
    return next(path for path in file.parent.parent.glob(f"*/{file.name}") if path != file)


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, copy, damage, capsys):
    """The run ends as it did; where the one before is damaged too, it is refused, and nothing changes."""
    last, before = checkpoints(copy / "checkpoint")
    spoil = lambda path: DAMAGES[damage](next(path.glob("*.safetensors")), path / "checkpoint.json")
    spoil(last)
    yoso.main([*FLAGS, "--out", str(copy)])
    error = capsys.readouterr().err
    assert f"{last}: damaged" in error and "going back to the checkpoint before it" in error
    assert equal(state(copy), state(finished)) and sound_checkpoint(copy / "checkpoint")[0] == last
    for path in (last, before):
        if damage != "of the other checkpoint":
            spoil(path)
    if damage == "of the other checkpoint":
        shutil.rmtree(before)
        flip(next(last.glob("*.safetensors")), 1000)
    kept = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="no sound one is left, delete .* to start this run anew"):
        yoso.main([*FLAGS, "--out", str(copy)])
    assert kept == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_the_note_comes_back(finished):
    assert checkpoint_note(latest_checkpoint(finished / "checkpoint"))["config"]["channels"] == (8, 16)


def test_going_back_is_told_by_the_first_process(copy, monkeypatch, capsys):
    last, before = checkpoints(copy / "checkpoint")
    (last / "checkpoint.json").unlink()
    for rank, times in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        assert sound_checkpoint(copy / "checkpoint")[0] == before
        assert capsys.readouterr().err.count("going back") == times


def test_a_checkpoint_that_cannot_be_read_is_a_damaged_one(copy, monkeypatch, capsys):
    """As on a broken disk; the one before it is used."""
    (last, before), read = checkpoints(copy / "checkpoint"), plumbing.checkpoint.checksums_of

    def broken(folder, share):
        if folder == last:
            raise OSError(5, "Input/output error")
        return read(folder, share)
    monkeypatch.setattr(plumbing.checkpoint, "checksums_of", broken)
    assert sound_checkpoint(copy / "checkpoint")[0] == before
    assert f"{last}: damaged" in capsys.readouterr().err


def test_processes_that_find_different_checkpoints_are_refused(copy, monkeypatch):
    """As on machines of which each has a disk of its own."""
    monkeypatch.setattr(plumbing.run, "gathered", lambda found: [found, found[:1]])
    with pytest.raises(UserError, match="the processes find different checkpoints"):
        Run(tiny_config(copy, save_every=2))


def test_processes_check_a_checkpoint_together(copy):
    """The file that is damaged is in the second one's share; both go back."""
    ranks(2, yoso.main, [*FLAGS, "--out", str(copy / "two")])
    last, before = checkpoints(copy / "two" / "checkpoint")
    flip(sorted(last.glob("*.safetensors"))[-1], 2000)
    ranks(2, expect_start, copy / "two", int(before.name))


def expect_start(out, start):
    """What each process of the test above does."""
    assert Run(tiny_config(out)).start == start


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The second is refused by name; a kill gives the folder free."""
    flags = [*TINY, "--iterations", "100000", "--out", tmp_path / "run"]
    first = start(ROOT / "yoso.py", *flags)
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() and first.poll() is None:
        time.sleep(0.1)
    _, error = finish(start(ROOT / "yoso.py", *flags), 2)
    assert "another process is at work in it" in error and error.count("\n") == 1
    first.kill()
    first.communicate()
    run = Run(tiny_config(tmp_path / "run", iterations=100_000, save_every=2))
    run.make_folder()
    assert run.start > 0 and not run.lock.closed
    ranks(2, expect_refusal, tmp_path / "run")


def test_a_folder_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    """Where nothing can be written into it, or a file has the name of one of its folders."""
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")
    run = Run(tiny_config(tmp_path / "run"))
    with monkeypatch.context() as patched, pytest.raises(UserError, match="--out .*No space left"):
        patched.setattr(plumbing.run.tempfile, "TemporaryFile", full)
        run.make_folder()
    for name in ("samples", "pipeline"):
        (tmp_path / "run" / name).write_text("mine")
        with pytest.raises(UserError, match=f"the file {name} is in the way of a folder"):
            run.make_folder()
        (tmp_path / "run" / name).unlink()
    run.make_folder()
    assert not list((tmp_path / "run" / "checkpoint").iterdir())


def expect_refusal(out):
    """What each process of the test above does, the second no less than the first."""
    with pytest.raises(UserError, match="another process is at work in it"):
        Run(tiny_config(out, iterations=100_000)).make_folder()


# Which run goes on from which

def test_another_configuration_is_refused(finished, copy, tmp_path, monkeypatch, capsys):
    """Nothing is overwritten."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    refused = lambda *more: fails(monkeypatch, capsys, yoso, *FLAGS, *more)
    assert "--lr was 0.001, is 0.1" in refused("--out", copy, "--lr", 0.1)
    assert "--iterations was 4, is 80" in refused("--out", copy, "--iterations", 80), "its rate decays"
    assert "another configuration" in refused("--out", tmp_path / "new", "--resume", finished, "--seed", 5)
    assert not (tmp_path / "new").exists()
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_run_goes_on_with_flags_that_change_no_result(tmp_path):
    """In other micro-batches, and longer where no rate decays; --resume only counts in a new folder."""
    config = tiny_config(tmp_path / "a", iterations=2, lr_decay=0.0)
    yoso.train(config)
    more = replace(config, iterations=3, micro_batch=4, log_every=1, gradient_checkpointing=True)
    yoso.train(replace(more, out=str(tmp_path / "b"), resume=str(tmp_path / "a")))
    yoso.train(more)
    a, b = (read_checkpoint(tmp_path / name / "checkpoint") for name in "ab")
    assert a["iteration"] == b["iteration"] == 3 and equal(a["state"], b["state"])
    assert [row["iteration"] for row in metrics(tmp_path / "a")] == [2, 3]
    before = state(tmp_path / "b")
    yoso.train(replace(config, iterations=3, out=str(tmp_path / "b"), resume=str(tmp_path / "absent")))
    assert equal(before, state(tmp_path / "b"))


def test_a_run_that_starts_from_another_can_go_on_alone(finished, tmp_path):
    """Its folder holds the checkpoint before its first iteration."""
    run = Run(tiny_config(tmp_path / "new", resume=str(finished)))
    models = yoso.build(run.config, run)
    run.begin(dict(generator=models.generator.trainable(), discriminator=models.discriminator, ema=models.ema,
                   optimizer_g=models.optimizer_g, optimizer_d=models.optimizer_d))
    run.end()
    assert equal(state(finished), state(tmp_path / "new"))
    assert run.lock.closed, "the folder is free for others"


def test_a_run_from_before_a_flag_was_there_goes_on(copy):
    """With that flag's default, or not at all."""
    for path in checkpoints(copy / "checkpoint"):
        note = json.loads((path / "checkpoint.json").read_text())
        del note["config"]["r1"]
        (path / "checkpoint.json").write_text(json.dumps(note))
    config = tiny_config(copy, save_every=2, r1=yoso.Config.r1)
    assert Run(config).start == 4
    with pytest.raises(UserError, match="--r1 was .*, is 9"):
        Run(replace(config, r1=9.0))


def test_a_run_moves_between_two_three_and_one_processes(tmp_path):
    """Saved on 2, continued on 3, then on 1: the weights and averages of a run that stayed on 1."""
    flags = [*TINY, "--lr-decay", "0", "--batch-size", "24", "--log-every", "1", "--save-every", "1"]
    upto = lambda iterations, out: [*flags, "--iterations", str(iterations), "--out", str(tmp_path / out)]
    ranks(2, yoso.main, upto(1, "moved"))
    ranks(3, yoso.main, upto(2, "moved"))
    yoso.main(upto(3, "moved"))
    yoso.main(upto(3, "stayed"))
    assert [row["iteration"] for row in metrics(tmp_path / "moved")] == [1, 2, 3]
    moved, stayed = state(tmp_path / "moved"), state(tmp_path / "stayed")
    keys = lambda saved: {name: part.keys() for name, part in saved.items()}
    assert keys(moved) == keys(stayed)
    for name in ("generator", "ema"):
        for key in stayed[name]:
            # Rounding, times Adam's sign where D's gradient is almost 0; a lost moment would be 1e-3.
            torch.testing.assert_close(moved[name][key], stayed[name][key], atol=5e-5, rtol=0)
