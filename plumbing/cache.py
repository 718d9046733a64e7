"""Latents and text conditions, encoded once into files."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from common import chunk_for
from plumbing.data import to_floats
from plumbing.files import (
    check_tensors,
    claim_folder,
    digest,
    note_of,
    open_tensors,
    origin_of,
    write_tensors,
)

CACHED = 500  # samples or prompts a file


class Latents(Dataset):
    """A dataset's latents in the folder that cache_latents has filled.

    A sample is like one of the dataset itself, but "image" is the latent, float [C, h, w].
    """

    endless = False

    def __init__(self, folder, num, origin):
        self.folder, self.num, self.origin = Path(folder), num, origin

    def __len__(self):
        return self.num

    def state(self):
        """A text that changes when a picture or a caption does."""
        return [self.origin]

    def __getitem__(self, index):
        file = open_tensors(self.folder / f"latents-{index // CACHED:06d}.safetensors", self.origin)
        return dict(image=torch.from_numpy(file.get_slice("latents")[index % CACHED]).float(), skipped=[],
                    caption=note_of(file)["captions"][index % CACHED])


@torch.no_grad()
def cache_latents(codec, dataset, folder, made_by):
    """Encodes a dataset's pictures once, float16, into files in the folder -> Latents.

    Each process encodes its share. An endless dataset, or one of a model in pixel space, is returned as it
    is. made_by: a dict of everything beside the data that the latents depend on. Raises UserError if the
    folder holds latents made by something else, or cannot be written.
    """
    if dataset.endless or codec.vae is None:
        return dataset
    made_by = made_by | {"num": len(dataset), "state of the files": digest(dataset.state())}
    names = [f"latents-{i:06d}.safetensors" for i in range(-(-len(dataset) // CACHED))]
    missing, chunk = claim_folder(Path(folder), made_by, names), chunk_for(codec)
    origin = origin_of(made_by)
    for name in shared_out(missing, "latents"):
        first, latents, captions = int(name[8:14]) * CACHED, [], []
        for start in range(first, last := min(first + CACHED, len(dataset)), chunk):
            samples = [dataset[i] for i in range(start, min(start + chunk, last))]
            pictures = torch.stack([s["image"] for s in samples]).to(codec.device)
            latents.append(codec.encode(to_floats(pictures)).half().cpu())
            captions += [s["caption"] for s in samples]
            for path in {path for s in samples for path in s["skipped"]}:
                tqdm.write(f"skipped: {path}", file=sys.stderr)
        latents = dict(latents=torch.cat(latents))
        write_tensors(Path(folder) / name, latents, origin, captions=captions)
    check_tensors(Path(folder), names, origin)
    return Latents(folder, len(dataset), origin)


def cache_conditions(codec, prompts, folder, made_by):
    """Computes the conditions of the prompts and of the empty prompt once, float16, into files in the folder.

    From then on codec.cond reads them there, and the text encoders lie in the main memory. made_by as in
    cache_latents. Raises UserError if the folder holds conditions made by something else.
    """
    if codec.vae is None:
        return
    prompts, like = list(dict.fromkeys(["", *prompts])), codec.cond([""])
    names = [f"conditions-{i:06d}.safetensors" for i in range(-(-len(prompts) // CACHED))]
    made_by = made_by | {"digest of the prompts": digest(prompts)}
    missing, origin = claim_folder(Path(folder), made_by, names), origin_of(made_by)
    for name in shared_out(missing, "conditions"):
        first, conds = int(name[11:17]) * CACHED, []
        for start in range(first, min(first + CACHED, len(prompts)), 16):
            conds.append(flat_cond(codec.cond(prompts[start:min(start + 16, first + CACHED)])))
        joined = {key: torch.cat([cond[key] for cond in conds]).half() for key in conds[0]}
        write_tensors(Path(folder) / name, joined, origin)
    check_tensors(Path(folder), names, origin)
    number = {prompt: i for i, prompt in enumerate(prompts)}

    def read(prompts):
        """The condition of prompts that are in the cache."""
        places = [divmod(number[prompt], CACHED) for prompt in prompts]
        rows = [(open_tensors(Path(folder) / names[i], origin), row) for i, row in places]
        flat = {}
        for key in flat_cond(like):
            # By numpy: on the CPU autocast cannot stack tensors of float16.
            values = np.stack([file.get_slice(key)[row] for file, row in rows])
            flat[key] = torch.from_numpy(values).to(codec.device).float()
        return full_cond(like, flat)

    codec.cache = read
    for name, component in codec.pipe.components.items():
        if name.startswith("text_encoder") and component is not None:
            component.to("cpu")


def cache_pairs(folder, num, chunk, made_by, make):
    """Pairs (z, x0 [num, C, H, W] on the CPU, prompts), made once, in chunks, into files in the folder.

    Each process makes its share. make(i, range of numbers) -> (z, x0, prompts) of the i-th chunk; made_by: a
    dict of everything that the pairs depend on. Raises UserError if the folder holds pairs made by something
    else, or cannot be written.
    """
    chunks = [range(i, min(i + chunk, num)) for i in range(0, num, chunk)]
    names = [f"{numbers.start:06d}-{numbers.stop:06d}.safetensors" for numbers in chunks]
    missing, origin = claim_folder(folder, made_by, names), origin_of(made_by)
    for name in shared_out(missing, "pairs"):
        i = names.index(name)
        z, x0, prompts = make(i, chunks[i])
        write_tensors(folder / name, dict(z=z, x0=x0), origin, prompts=prompts)
    check_tensors(folder, names, origin)
    files = [open_tensors(folder / name, origin) for name in names]
    z, x0 = (torch.cat([torch.from_numpy(file.get_tensor(key)) for file in files]) for key in ("z", "x0"))
    return z, x0, [prompt for file in files for prompt in note_of(file)["prompts"]]


def shared_out(names, title):
    """This process's share of the files that are to be made, with a bar."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return tqdm(names[rank::world], desc=title, disable=rank > 0 or not names)


def flat_cond(cond, prefix=""):
    """A condition's tensors by their path, without the entries that are None."""
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
