"""Files of a run: written whole or not at all, each with what shows that it is still what was written."""

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import UserError, one_line

CHECKSUMS = "checksums.json"  # of the files of an exported folder
READ_AT_ONCE = 2**24  # bytes of a file
ANSWER_SECONDS = 10  # that the processes have to report after a failed exchange


@contextmanager
def writing(path, remedy="choose a folder that can be written, with room in it"):
    """An error in the with block, where `path` is written, becomes a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', '') or one_line(error)}); "
                        f"{remedy}")


def beside(path):
    """The name under which a file is written until it is complete; another one in every process."""
    return Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")


def write_text(path, text):
    """Writes a file that gets its name when it is complete; a text that is not empty ends in a line break.

    Raises UserError if it cannot be written.
    """
    with writing(path):
        beside(path).write_text(text + "\n" if text else "", encoding="utf-8")
        os.replace(beside(path), path)


def append_line(path, line):
    """Adds a line to a text file. Raises UserError if it cannot be written."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def digest(texts):
    """A short fingerprint of many texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def states_of(paths):
    """Name, size and time of change of files: texts that change when a file does."""
    states = [(path, Path(path).stat()) for path in paths]
    return [f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states]


# Checksums

def checksum(path):
    """The CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(READ_AT_ONCE):
            crc = zlib.crc32(block, crc)
    return crc


def checksums_of(folder, share=slice(None)):
    """The CRC-32 of the files below a folder, or of a share of them, by name."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): checksum(file) for file in files[share]}


def write_folder(path, save):
    """Calls save(folder) on a new folder, which becomes `path` when it is complete, with its checksums.

    Raises UserError if it cannot be written.
    """
    path, temporary = Path(path), beside(path)
    with writing(path):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            save(temporary)
            written = checksums_of(temporary)
            written.pop("README.md", None)  # the card is its owner's to edit
            write_text(temporary / CHECKSUMS, json.dumps(written, indent=1))
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path):
    """Raises UserError if a folder that write_folder made has changed since; others are not looked at."""
    note = Path(path) / CHECKSUMS
    if not note.is_file():
        return
    try:
        written = json.loads(note.read_text())
        changed = [name for name, value in written.items() if checksum(Path(path) / name) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); have it made anew")
    if changed:
        raise UserError(f"{path}: damaged, {changed[0]} is not what was written; have it made anew, "
                        f"or delete {note} if the change was meant")


# Files of tensors

def origin_of(made_by):
    """A short fingerprint of the dict of everything that some prepared data depend on."""
    return digest([json.dumps(made_by, sort_keys=True, default=str)])


def _checksum_of(arrays, note):
    crc = zlib.crc32(json.dumps(note, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), crc)
    return crc


def write_tensors(path, tensors, origin, **note):
    """A safetensors file that gets its name when it is complete.

    Its metadata is the note, with the origin, as of origin_of, and a checksum. Raises UserError if it cannot
    be written.
    """
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    note |= dict(origin=f"{origin} {path.name}")
    note["checksum"] = _checksum_of({name: value.numpy() for name, value in tensors.items()}, note)
    with writing(path, "choose an --out with room, on a disk that all machines share"):
        # One text: safetensors would write several in any order.
        save_file(tensors, beside(path), metadata=dict(note=json.dumps(note)))
        os.replace(beside(path), path)


@lru_cache(maxsize=1000)
def open_tensors(path, origin):
    """A file that write_tensors wrote, open, for rows of its numpy arrays to be read.

    Raises UserError if it is damaged or of another origin.
    """
    try:
        file = safe_open(path, "np")
        note = note_of(file)
        written, found = note.pop("checksum"), {name: file.get_tensor(name) for name in file.keys()}
        intact = written == _checksum_of(found, note)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); delete it to have it made anew, "
                        "on a disk that all machines share")
    if not intact:
        raise UserError(f"{path}: damaged, it is not what was written; delete it to have it made anew")
    if note["origin"] != f"{origin} {path.name}":
        raise UserError(f"{path}: belongs to another run; delete it to have it made anew")
    return file


def note_of(file):
    """The note of an open file of tensors."""
    return json.loads(file.metadata()["note"])


def check_tensors(folder, names, origin):
    """Raises UserError, on every process, if one of these files is damaged; each process reads its share.

    Comes back when all have written and read theirs.
    """
    (rank, world), damage = rank_and_world(), ""
    if dist.is_initialized():
        dist.barrier()
    try:
        for name in names[rank::world]:
            open_tensors(folder / name, origin)
    except UserError as error:
        damage = str(error)
    for found in filter(None, gathered(damage)):
        raise UserError(found)


# Several processes

def rank_and_world():
    """This process's number in the group of processes, and their number."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value):
    """The values of all processes."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def agreed(make):
    """The value of make() on rank 0, for every rank: all must go by the files that one machine finds."""
    found = [make() if int(os.environ.get("RANK", 0)) == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def want_of_a_process(error):
    """Whether an exchange has failed because another process has ended or does not answer."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def silent_ranks(seconds=0):
    """The processes that do not report, as text: asked by all that live when an exchange failed.

    An exchange that has failed does not say for want of whom. Who lives may notice it by so many seconds
    after this process, if it waits for one that has noticed; who decides first decides for all.
    """
    store, now = dist.distributed_c10d._get_default_store(), time.monotonic()
    soon, late = now + ANSWER_SECONDS, now + ANSWER_SECONDS + seconds
    try:
        store.set(f"alive/{dist.get_rank()}", "")
        while not store.check(["lost"]):
            silent = [rank for rank in range(dist.get_world_size()) if not store.check([f"alive/{rank}"])]
            if time.monotonic() > (soon if len(silent) < 2 else late):
                store.compare_set("lost", "", ", ".join(map(str, silent)) or "unknown")
            time.sleep(0.2)
        lost = store.get("lost").decode()
        if dist.get_rank() == 0:
            time.sleep(2)  # it keeps the store, where the others are still looking
        return lost
    except (RuntimeError, dist.DistError):
        return "0"  # it kept the store


WAITS = count()  # of this process for the first


def wait_for_first():
    """Waits for torch's half an hour until the first process has come here as often as this one."""
    store, key = dist.distributed_c10d._get_default_store(), f"first/{next(WAITS)}"
    if dist.get_rank() == 0:
        store.set(key, "")
    else:
        store.wait([key], dist.default_pg_timeout)


def lock(path):
    """Holds a file for this process until the object that it returns is closed or the process ends.

    A process that is killed frees it too. Raises UserError if another process holds it.
    """
    with writing(path):
        file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{Path(path).parent}: another process is at work in it; "
                        "wait for its end, or choose another --out")
    except OSError:
        pass  # a disk without locks: then nothing can be known
    return file


# Folders of prepared data

def claim_folder(folder, made_by, names):
    """On rank 0 makes a folder of prepared data -> on every rank the names of files not yet in the folder.

    made_by, a dict of everything that the data depends on, is noted in made_by.json. Raises UserError if the
    folder was made by something else or cannot be written.
    """
    def missing():
        note = folder / "made_by.json"
        try:
            before = json.loads(note.read_text()) if note.exists() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{note}: damaged ({one_line(error)}); delete the folder")
        if before is not None and before != json.loads(json.dumps(made_by)):
            raise UserError(f"{folder}: made with other flags, {note.read_text().strip()}; "
                            "repeat them, or delete the folder")
        with writing(folder, "choose another --out"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(made_by))
        return [name for name in names if not (folder / name).exists()]

    return agreed(missing)
