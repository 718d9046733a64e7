"""Latents and text conditions, encoded once into files."""

import json
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from common import UserError, chunk_for
from plumbing.data import claim_folder, digest, to_floats

CACHED = 500  # samples or prompts a file


class Latents(Dataset):
    """A dataset's pictures as latents, from the folder where cache_latents has put them; samples with image:
    float [C, h, w].
    """

    endless = False

    def __init__(self, folder, num):
        self.folder, self.num = Path(folder), num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        file = open_safetensors(self.folder / f"latents-{index // CACHED:06d}.safetensors")
        return dict(image=torch.from_numpy(file.get_slice("latents")[index % CACHED]).float(), skipped=[],
                    caption=json.loads(file.metadata()["captions"])[index % CACHED])


@lru_cache(maxsize=1000)
def open_safetensors(path):
    """The file, from which arrays are read in parts. Raises UserError if it cannot be read."""
    try:
        return safe_open(path, "np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete its folder to have it made anew, on a disk that all machines share")


@torch.no_grad()
def cache_latents(codec, dataset, folder, made_by):
    """Encodes a dataset's pictures once, float16, into files in the folder, each process its share ->
    Latents.

    made_by: what the latents depend on beside the data, a dict; endless datasets stay what they are. Raises
    UserError if the folder holds others, or cannot be written.
    """
    if dataset.endless or codec.vae is None:
        return dataset
    made_by = made_by | {"num": len(dataset), "state of the files": digest(dataset.state())}
    names = [f"latents-{i:06d}.safetensors" for i in range(-(-len(dataset) // CACHED))]
    missing, chunk = claim_folder(Path(folder), made_by, names), chunk_for(codec)
    for name in shared_out(missing, "latents"):
        first, latents, captions = int(name[8:14]) * CACHED, [], []
        for start in range(first, last := min(first + CACHED, len(dataset)), chunk):
            samples = [dataset[i] for i in range(start, min(start + chunk, last))]
            latents.append(codec.encode(to_floats(torch.stack([s["image"] for s in samples]).to(codec.device))).half().cpu())
            captions += [s["caption"] for s in samples]
            for path in {path for s in samples for path in s["skipped"]}:
                tqdm.write(f"skipped, cannot be read as a picture: {path}", file=sys.stderr)
        write_tensors(Path(folder) / name, dict(latents=torch.cat(latents)), dict(captions=json.dumps(captions)))
    if dist.is_initialized():
        dist.barrier()
    return Latents(folder, len(dataset))


def cache_conditions(codec, prompts, folder, made_by):
    """Computes the conditions of the prompts and of the empty one once, float16, into files in the folder;
    codec.cond reads them there.

    The text encoders then move to the main memory. made_by as in cache_latents. Raises UserError if the
    folder holds others.
    """
    if codec.vae is None:
        return
    prompts, like = list(dict.fromkeys(["", *prompts])), codec.cond([""])
    names = [f"conditions-{i:06d}.safetensors" for i in range(-(-len(prompts) // CACHED))]
    missing = claim_folder(Path(folder), made_by | {"digest of the prompts": digest(prompts)}, names)
    for name in shared_out(missing, "conditions"):
        first, parts = int(name[11:17]) * CACHED, []
        for start in range(first, min(first + CACHED, len(prompts)), 16):
            parts.append(flat_cond(codec.cond(prompts[start:min(start + 16, first + CACHED)])))
        write_tensors(Path(folder) / name, {key: torch.cat([p[key] for p in parts]).half().cpu() for key in parts[0]}, {})
    if dist.is_initialized():
        dist.barrier()
    number = {prompt: i for i, prompt in enumerate(prompts)}

    def read(names):
        """The condition of prompts that are in the cache."""
        rows = [divmod(number[name], CACHED) for name in names]
        files = [(open_safetensors(Path(folder) / f"conditions-{i:06d}.safetensors"), row) for i, row in rows]
        flat = {key: torch.stack([torch.from_numpy(file.get_slice(key)[row]) for file, row in files]) for key in flat_cond(like)}
        return full_cond(like, {key: value.to(codec.device).float() for key, value in flat.items()})

    codec.cache = read
    for name, part in codec.pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.to("cpu")


def cache_pairs(folder, num, chunk, made_by, make):
    """Pairs (z, x0 [num, C, H, W] on the CPU, prompts), made in chunks, each process its share, and kept in the folder.

    make(i, range of numbers) -> (z, x0, prompts) of the i-th chunk; made_by: what the pairs depend on, a dict. Raises
    UserError if the folder holds others, or cannot be written.
    """
    chunks = [range(i, min(i + chunk, num)) for i in range(0, num, chunk)]
    names = [f"{numbers.start:06d}-{numbers.stop:06d}.safetensors" for numbers in chunks]
    missing = claim_folder(folder, made_by, names)
    for name in shared_out(missing, "pairs"):
        i = names.index(name)
        z, x0, prompts = make(i, chunks[i])
        write_tensors(folder / name, dict(z=z.cpu(), x0=x0.cpu()), dict(prompts=json.dumps(prompts)))
    if dist.is_initialized():
        dist.barrier()
    files = [open_safetensors(folder / name) for name in names]
    z, x0 = (torch.cat([torch.from_numpy(file.get_tensor(key)) for file in files]) for key in ("z", "x0"))
    return z, x0, [prompt for file in files for prompt in json.loads(file.metadata()["prompts"])]


def shared_out(names, what):
    """This process's share of the files that are to be made, with a bar."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return tqdm(names[rank::world], desc=what, disable=rank > 0 or not names)


def write_tensors(path, tensors, metadata):
    """A safetensors file that gets its name when it is complete. Raises UserError if it cannot be written."""
    tensors, temporary = {key: value.contiguous() for key, value in tensors.items()}, path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); choose an --out with room, on a disk that all machines share")


def flat_cond(cond, prefix=""):
    """A condition's tensors by their path; what is None is left out."""
    flat = {}
    for key, value in cond.items():
        if isinstance(value, dict):
            flat |= flat_cond(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def full_cond(like, flat, prefix=""):
    """The condition of the structure of `like` with the tensors that flat_cond gave."""
    return {
        key: full_cond(value, flat, f"{prefix}{key}.") if isinstance(value, dict) else flat.get(prefix + key)
        for key, value in like.items()
    }
