"""A run's state, saved by all its processes and read back by any number of them."""

import dataclasses
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from common import UserError, one_line
from plumbing.files import checksums_of, gathered, rank_and_world, write_text

NOTE = "checkpoint.json"


def flat_state(parts):
    """The tensors of a run's parts by "part.key"; those of an Adam are numbered as its parameters."""
    state = {}
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            parameters = [p for group in part.param_groups for p in group["params"]]
            state |= {f"{name}.{i}.{key}": value for i, p in enumerate(parameters)
                      for key, value in part.state.get(p, {}).items()}
        else:
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    return {key: value.view(1) if value.dim() == 0 else value for key, value in state.items()}


def checksums(folder):
    """The checksums of the files in a checkpoint folder, by name; each process reads its share of them."""
    rank, world = rank_and_world()
    try:
        share = checksums_of(folder, slice(rank, None, world))
    except OSError:
        share = {}  # what cannot be read is not what was written, for the other processes too
    shares = gathered(share)
    return {name: value for share in shares for name, value in share.items() if name != NOTE}


def write_checkpoint(folder, done, parts, config, data=""):
    """Writes the parts after `done` iterations to folder/<done>; the one before it stays, older ones go.

    Every process calls this and writes its share of the tensors, as safetensors; a note beside them,
    checkpoint.json, has the config, the fingerprint `data` of what the run was trained on, and the files'
    checksums. The folder gets its name when it is complete. Raises UserError if it cannot be written.
    """
    target, new, first = folder / f"{done:08d}", folder / "new", int(os.environ.get("RANK", 0)) == 0
    if first:
        shutil.rmtree(new, ignore_errors=True)
    try:
        if dist.is_initialized():
            dist.barrier()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is enough
            writer = dcp.HuggingFaceStorageWriter(str(new), save_distributed=True)
            dcp.save(flat_state(parts), storage_writer=writer)
        files = checksums(new)
        if first:
            note = dict(config=dataclasses.asdict(config), data=data, files=files)
            write_text(new / NOTE, json.dumps(note))
            for path in (*new.iterdir(), new):  # on the disk before it gets its name
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            if target.exists():  # damaged, or the run went back behind it
                remove(target)
            new.rename(target)
            sweep(folder, done)
    except (OSError, UserError, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"{target}: iteration {done} cannot be saved ({one_line(error)}); "
                        "the one before it is kept")


def remove(path):
    """Deletes a checkpoint, which loses its name first: a kill leaves none that is half there."""
    old = path.with_name("old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder, done):
    """Deletes what a run has left beside its checkpoint of iteration `done` and the one before that.

    Other files and folders, which the run did not make, stay.
    """
    for name in ("new", "old"):
        shutil.rmtree(folder / name, ignore_errors=True)
    ours = [path for path in checkpoints(folder) if (path / NOTE).exists()]
    kept = [path for path in ours if int(path.name) <= done][:2]
    for path in ours:
        if path not in kept:
            remove(path)


def checkpoints(folder):
    """The checkpoints in a run's checkpoint/, folders named by their iterations, the newest first."""
    found = [path for path in Path(folder).glob("*") if re.fullmatch(r"\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def latest_checkpoint(folder):
    """The newest checkpoint in a run's checkpoint/, sound or not, or None."""
    return next(iter(checkpoints(folder)), None)


def checkpoint_note(path):
    """The note of a checkpoint folder: dict(config, data, files). Raises UserError if it is damaged."""
    try:
        note = json.loads((path / NOTE).read_text())
        note["config"] = {k: tuple(v) if isinstance(v, list) else v for k, v in note["config"].items()}
        return dict(config=note["config"], data=note["data"], files=dict(note["files"]))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged or not a checkpoint ({one_line(error)})")


def sound_checkpoint(folder):
    """(path, note) of the newest checkpoint in a run's checkpoint/ that is not damaged, or None without any.

    A damaged one is named on stderr, and the one before it taken. Every process must call this. Raises
    UserError if all are damaged.
    """
    present = checkpoints(folder)
    for path in present:
        found = checksums(path)
        try:
            note = checkpoint_note(path)
        except UserError as error:
            problem = str(error)
        else:
            damaged = [name for name, value in note["files"].items() if found.get(name) != value]
            if not damaged:
                return path, note
            problem = f"{path}: damaged, {damaged[0]} is not what was written"
        if path == present[-1]:
            raise UserError(f"{problem}; no sound one is left, delete {folder} to start this run anew")
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{problem}; going back to the checkpoint before it", file=sys.stderr)
    return None


def load_tensors(path, state):
    """Fills a flat state from a checkpoint folder, of which each process reads its share.

    Raises UserError if that fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except Exception as error:  # a damaged file can make the reader raise anything
        raise UserError(f"{path}: damaged or not a checkpoint of this run ({type(error).__name__}); "
                        "delete it to start this run anew")


def stored_tensors(path):
    """key -> (shape, dtype) of the tensors in a checkpoint folder. Raises UserError if it is damaged."""
    try:
        tensors = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"{path}: damaged or not a checkpoint ({type(error).__name__}); "
                        "delete it to start this run anew")
    return {key: (value.size, value.properties.dtype) for key, value in tensors.items()}


def load_parts(path, parts):
    """Loads a checkpoint into a run's parts, whatever the number of processes that wrote it."""
    stored = stored_tensors(path)
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            parameters = [p for group in part.param_groups for p in group["params"]]
            for key in stored:
                if key.startswith(f"{name}."):
                    number, kind = key.removeprefix(f"{name}.").split(".")
                    p = parameters[int(number)]
                    scalar = kind == "step"
                    part.state[p][kind] = torch.zeros((), device=p.device) if scalar else torch.zeros_like(p)
    load_tensors(path, flat_state(parts))


def read_checkpoint(folder):
    """The last sound checkpoint in a run's checkpoint/, in memory: dict(iteration, config, state[part][key]).

    Raises UserError if there is none.
    """
    found = sound_checkpoint(folder)
    if not found:
        raise UserError(f"{folder}: no checkpoint yet; a run writes one every --save-every iterations")
    path, note = found
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in stored_tensors(path).items()}
    load_tensors(path, tensors)
    state = {}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        state.setdefault(part, {})[name] = value
    return dict(iteration=int(path.name), config=note["config"], state=state)
