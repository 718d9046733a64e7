"""Files of a run: whole or not at all, and every later change of them shows."""

import json
import os
import shutil
from datetime import timedelta
from itertools import count

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import plumbing.files
from common import UserError
from plumbing.files import (
    beside,
    check_folder,
    check_tensors,
    checksum,
    claim_folder,
    open_tensors,
    silent_ranks,
    write_folder,
    write_tensors,
    write_text,
)


def full(*arguments, **more):
    """In place of a function that writes, on a disk without room."""
    raise OSError(28, "No space left on device")


# Writing

def test_a_text_takes_its_place_when_complete(tmp_path, monkeypatch):
    """A write that fails leaves the one before; two processes do not write one file."""
    path = tmp_path / "note.txt"
    write_text(path, "first")
    with monkeypatch.context() as patched, pytest.raises(UserError, match="note.txt: .*No space left"):
        patched.setattr(os, "replace", full)
        write_text(path, "second")
    assert path.read_text() == "first\n"
    name = beside(path)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert name.parent == tmp_path and name not in (path, beside(path))


def test_a_folder_takes_its_place_when_complete(tmp_path):
    """A write that fails leaves the one before, and nothing else."""
    def save(folder):
        folder.mkdir()
        (folder / "part.txt").write_text("first")

    def fail(folder):
        save(folder)
        full()
    path = tmp_path / "pipeline"
    write_folder(path, save)
    with pytest.raises(UserError, match="pipeline: .*No space left"):
        write_folder(path, fail)
    assert os.listdir(tmp_path) == ["pipeline"] and (path / "part.txt").read_text() == "first"
    check_folder(path)


def test_tensors_take_their_place_when_complete(tmp_path, monkeypatch):
    """A write that fails leaves the one before; also the library's error is told."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, dict(x=torch.zeros(2)), "run")
    before = path.read_bytes()
    for owner, name, function in ((os, "replace", full), (plumbing.files, "save_file", unwritable)):
        with monkeypatch.context() as patched, pytest.raises(UserError, match="x.safetensors: cannot be wr"):
            patched.setattr(owner, name, function)
            write_tensors(path, dict(x=torch.ones(2)), "run")
        assert path.read_bytes() == before


def unwritable(*arguments, **more):
    """In place of safetensors' save_file on a full disk."""
    raise plumbing.files.SafetensorError("Error while serializing: I/O error")


# Checksums

def test_a_checksum_is_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(plumbing.files, "READ_AT_ONCE", 4)
    sums = set()
    for data in (b"0123456789", b"0123456780", b"0123056789", b"01234567", b"0123"):
        (tmp_path / "file").write_bytes(data)
        sums.add(checksum(tmp_path / "file"))
    assert len(sums) == 5


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "deep" / "part.txt").unlink(),
    lambda folder: (folder / "deep" / "part.txt").write_text("other"),
    lambda folder: (folder / "checksums.json").write_text("[]"),
    lambda folder: (folder / "checksums.json").write_text("{"),
])
def test_a_changed_folder_is_refused(tmp_path, spoil):
    """One that others have made, without checksums, is not looked at."""
    def save(folder):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "part.txt").write_text("first")
    write_folder(tmp_path / "pipeline", save)
    spoil(tmp_path / "pipeline")
    with pytest.raises(UserError, match="pipeline: damaged"):
        check_folder(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "checksums.json").unlink()
    check_folder(tmp_path / "pipeline")


# Files of tensors

def written(path, **more):
    """A file of two tensors, its tensors and its note."""
    tensors = dict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.int32))
    write_tensors(path, tensors, "run", **more)
    with safe_open(path, "pt") as file:
        return tensors, json.loads(file.metadata()["note"])


@pytest.mark.parametrize("change", [
    lambda tensors, note: tensors | dict(a=tensors["a"] + 1),
    lambda tensors, note: tensors | dict(a=tensors["a"].view(3, 2)),
    lambda tensors, note: tensors | dict(b=tensors["b"].view(torch.float32)),
    lambda tensors, note: dict(a=tensors["a"], c=tensors["b"]),
    lambda tensors, note: dict(a=tensors["a"]),
    lambda tensors, note: note["captions"].reverse() or tensors,
], ids=["a number", "the shape", "the type", "the name", "one lost", "the note"])
def test_every_change_of_a_file_of_tensors_shows(tmp_path, change):
    path = tmp_path / "x.safetensors"
    tensors, note = written(path, captions=["one", "two"])
    changed = change(tensors, note)
    save_file(changed, path, dict(note=json.dumps(note)))
    with pytest.raises(UserError, match="x.safetensors: damaged, it is not what was written"):
        open_tensors(path, "run")


def test_a_file_of_tensors_belongs_to_its_run_and_name(tmp_path):
    written(tmp_path / "x.safetensors")
    assert open_tensors(tmp_path / "x.safetensors", "run").get_tensor("a").shape == (2, 3)
    shutil.copyfile(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    for name, origin in (("x", "other"), ("y", "run")):
        with pytest.raises(UserError, match=f"{name}.safetensors: belongs to another run"):
            open_tensors(tmp_path / f"{name}.safetensors", origin)


def test_every_file_of_tensors_is_checked(tmp_path, monkeypatch):
    """The last too; and one that another process has found damaged ends this one as well."""
    names = [f"{i}.safetensors" for i in range(3)]
    for name in names:
        written(tmp_path / name)
    check_tensors(tmp_path, names, "run")
    open_tensors.cache_clear()
    (tmp_path / names[-1]).write_bytes(b"")
    with pytest.raises(UserError, match="2.safetensors: cannot be read"):
        check_tensors(tmp_path, names, "run")
    monkeypatch.setattr(plumbing.files, "gathered", lambda damage: [damage, "7.safetensors: damaged", ""])
    with pytest.raises(UserError, match="7.safetensors: damaged"):
        check_tensors(tmp_path, names[:-1], "run")


# Folders of prepared data

def test_what_is_there_is_not_made_again(tmp_path):
    """Of a folder that was made by the same; a damaged note is named."""
    folder = tmp_path / "data"
    assert claim_folder(folder, dict(seed=1), ["a", "b"]) == ["a", "b"]
    (folder / "a").touch()
    assert claim_folder(folder, dict(seed=1), ["a", "b"]) == ["b"]
    with pytest.raises(UserError, match="made with other flags"):
        claim_folder(folder, dict(seed=2), ["a", "b"])
    (folder / "made_by.json").write_text("{")
    with pytest.raises(UserError, match="made_by.json: damaged"):
        claim_folder(folder, dict(seed=1), ["a", "b"])


# Several processes

@pytest.mark.parametrize("answers, seconds, silent, after", [
    ({0: 3, 3: 0}, 40, "2", 10),  # one is missing: soon
    ({0: 3, 3: 25}, 40, "2", 25),  # two are missing until the second has noticed too
    ({0: 3}, 40, "2, 3", 50),
    ({0: 3, 2: 4, 3: 5}, 40, "unknown", 10),
])
def test_who_does_not_answer_is_named(monkeypatch, answers, seconds, silent, after):
    """answers: rank -> the second in which it reports; this process is rank 1."""
    clock = [0.0]

    class Store(dict):
        def set(self, key, value):
            self[key] = value

        def check(self, keys):
            self.update({f"alive/{rank}": "" for rank, second in answers.items() if second <= clock[0]})
            return all(key in self for key in keys)

        def compare_set(self, key, expected, value):
            self.setdefault(key, value.encode())

    store = Store()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(plumbing.files.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(plumbing.files.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    assert silent_ranks(seconds) == silent
    assert abs(clock[0] - after) < 1
    store["lost"] = b"3"  # another has decided
    assert silent_ranks(seconds) == "3"


def test_without_the_store_its_process_is_named(monkeypatch):
    class Lost:
        def set(self, key, value):
            raise torch.distributed.DistNetworkError("recvValue failed")

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", Lost)
    assert silent_ranks() == "0"


def test_the_others_wait_for_the_first(monkeypatch):
    """Each time until it has come as often: not for one another."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch.distributed, "default_pg_timeout", timedelta(seconds=0.2))
    counters = count(), count()  # of the two processes that are played here
    for rank in (0, 1, 0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(plumbing.files, "WAITS", counters[rank])
        plumbing.files.wait_for_first()
    with pytest.raises(torch.distributed.DistError):  # the first has come twice
        plumbing.files.wait_for_first()
