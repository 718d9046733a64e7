"""A run's state, saved by all its processes and read back by any number of them."""

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from common import UserError
from plumbing.files import write_text


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


def write_checkpoint(folder, done, parts, config):
    """Writes the parts after `done` iterations to folder/<done>, then deletes the checkpoint before.

    Every process calls this and writes its share of the tensors, as safetensors; a note beside them,
    checkpoint.json, lists the files. The folder gets its name when it is complete. Raises UserError if it
    cannot be written.
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
        if first:
            files = {file.name: file.stat().st_size for file in new.iterdir()}
            note = dict(config=dataclasses.asdict(config), files=files)
            write_text(new / "checkpoint.json", json.dumps(note))
            for path in (*new.iterdir(), new):  # on the disk before it gets its name
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)
            for old in folder.iterdir():
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"{target}: iteration {done} cannot be saved ({error}); the one before it is kept")


def latest_checkpoint(folder):
    """The last complete checkpoint in a run's checkpoint/: a folder named by its iteration, or None."""
    found = [path for path in Path(folder).glob("[0-9]*") if (path / "checkpoint.json").exists()]
    return max(found, default=None)


def checkpoint_note(path):
    """The note of a checkpoint folder: dict(config, files).

    Raises UserError if the note or a file that it lists is damaged.
    """
    try:
        note = json.loads((path / "checkpoint.json").read_text())
        note["config"] = {k: tuple(v) if isinstance(v, list) else v for k, v in note["config"].items()}
        damaged = [name for name, size in note["files"].items() if (path / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: damaged or not a checkpoint ({error}); delete it to start this run anew")
    if damaged:
        raise UserError(f"{path}: damaged, {damaged[0]} has not the size it was written with; "
                        "delete it to start this run anew")
    return note


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
    """The last checkpoint in a run's checkpoint/, in memory: dict(iteration, config, state[part][key]).

    Raises UserError if there is none, or it is damaged.
    """
    path = latest_checkpoint(folder)
    if not path:
        raise UserError(f"{folder}: no checkpoint yet; a run writes one every --save-every iterations")
    note = checkpoint_note(path)
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in stored_tensors(path).items()}
    load_tensors(path, tensors)
    state = {}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        state.setdefault(part, {})[name] = value
    return dict(iteration=int(path.name), config=note["config"], state=state)
