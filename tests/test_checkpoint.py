"""Checkpoints: every part comes back, on any number of processes; damage and other flags are named."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers import TINY, equal, fails, metrics, ranks, state, tiny_config

import plumbing.checkpoint
import yoso
from common import EMA, UserError, Weights
from plumbing.checkpoint import (
    checkpoint_note,
    latest_checkpoint,
    load_parts,
    read_checkpoint,
    write_checkpoint,
)
from plumbing.run import Run

FLAGS = [*TINY, "--iterations", "4"]


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
    parts = dict(net=net, other=Weights(other.named_parameters()), ema=EMA(net.named_parameters(), 0.5),
                 optimizer=torch.optim.Adam(groups),
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
        parts["ema"].update()


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

def test_checkpoints_take_their_place_when_complete(tmp_path, monkeypatch):
    """A half-written one is not seen and swept away; only the last is kept; a full disk keeps the one before;
    nothing is unpickled.
    """
    folder = tmp_path / "checkpoint"
    yoso.train(tiny_config(tmp_path, iterations=1))
    assert [path.name for path in folder.iterdir()] == ["00000001"]
    (folder / "new").mkdir()
    (folder / "new" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    (folder / "00000002").mkdir()  # without its note: a kill between the files
    for function in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(function, None)
    run = Run(tiny_config(tmp_path, iterations=1))
    part = torch.nn.Linear(2, 2)
    run.parts = dict(part=part)
    assert run.start == 1

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(plumbing.checkpoint.dcp, "save", full)
        with pytest.raises(UserError, match="iteration 6 cannot be saved.*No space left"):
            run.save(6)
    assert latest_checkpoint(folder).name == "00000001"
    run.save(6)
    assert [path.name for path in folder.iterdir()] == ["00000006"]
    assert torch.equal(read_checkpoint(folder)["state"]["part"]["weight"], part.weight)


def test_a_damaged_checkpoint_is_named(copy, monkeypatch, capsys):
    path = latest_checkpoint(copy / "checkpoint")
    file, note = next(path.glob("*.safetensors")), path / "checkpoint.json"
    whole, text = file.read_bytes(), note.read_text()
    refused = lambda: fails(monkeypatch, capsys, yoso, *FLAGS, "--out", copy)
    file.write_bytes(whole[:-1000])
    assert "has not the size it was written with" in refused()
    file.write_bytes(b"x" * len(whole))
    assert f"{path}: damaged" in refused()
    file.unlink()
    assert f"{path}: damaged" in refused()
    file.write_bytes(whole)
    for damaged in (text[:-9], "[]", '{"config": 1, "files": {}}'):
        note.write_text(damaged)
        assert f"{path}: damaged" in refused()
    note.write_text(text)
    assert checkpoint_note(path)["config"]["channels"] == (8, 16)


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
