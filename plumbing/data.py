"""Pictures and prompts: folders, CIFAR-10, tar and parquet files, prompt files; their order; grids; prepared
folders.
"""

import hashlib
import io
import json
import os
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from common import UserError, class_labels
from plumbing.shapes import Shapes


def load_dataset(name, size, seed=0):
    """"shapes", "shapes-rolled", "cifar10", or a folder of pictures, tar or parquet files -> a Dataset.

    Its samples are {"image": uint8 [3, size, size], "caption": str, "skipped": [names of what could not be
    read]}.

    Raises UserError if there is no such dataset, or no readable picture in it.
    """
    if name in ("shapes", "shapes-rolled"):
        return Shapes(size, seed, name == "shapes-rolled")
    if name == "cifar10":
        return Cifar10(size)
    if not Path(name).is_dir():
        raise UserError(f"--dataset {name}: unknown; choose shapes, cifar10 or the path of an existing folder of pictures")
    shards = any(next(Path(name).glob(suffix), None) for suffix in SHARDS.values())
    return Shards(name, size) if shards else Folder(name, size)


class Folder(Dataset):
    """Pictures below a folder, resized and centre-cropped to size x size; samples as those of Shapes.

    Captions, in this order: metadata.jsonl ({"file_name", "text"} a line), a .txt beside the picture, the
    name of the class folder it lies in, or nothing. A picture that cannot be read is replaced by the next one
    and named in "skipped".
    """

    endless = False

    def __init__(self, root, size):
        from torchvision.datasets.folder import IMG_EXTENSIONS
        self.root, self.size, self.classes = root, size, []
        root = Path(root)
        metadata = root / "metadata.jsonl"
        if metadata.is_file():
            try:
                rows = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
                self.samples = [(root / row["file_name"], row.get("text", "")) for row in rows]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"--dataset {root}: metadata.jsonl needs one JSON object a line with file_name and text ({error!r})")
        else:
            paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            texts = set(root.rglob("*.txt"))
            class_name = {p: p.parent.name if p.parent != root else "" for p in paths}
            if not texts:
                self.classes = sorted(set(class_name.values()) - {""})
            self.samples = [(p, p.with_suffix(".txt") if p.with_suffix(".txt") in texts else class_name[p]) for p in paths]
        if not self.samples:
            raise UserError(f"--dataset {root}: no pictures in it; "
                            "give a folder by class, with metadata.jsonl, or with .txt captions")
        self[0]  # a folder without a single readable picture is told now, not in the middle of the run

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return readable_sample(self, index)

    def source(self, index):
        """A sample's name, its picture's file, and its caption."""
        path, caption = self.samples[index]
        return str(path), path, self.caption(caption)

    @staticmethod
    def caption(source):
        """A caption, which may stand in a file."""
        return source.read_text().strip() if isinstance(source, Path) else source

    def all_captions(self):
        """The different captions, sorted; no picture is read."""
        return sorted({self.caption(source) for _, source in self.samples})

    def state(self):
        """Texts that change when a picture or a caption does."""
        written = [caption for _, caption in self.samples if isinstance(caption, Path)]
        return states_of([path for path, _ in self.samples] + written) + [str(caption) for _, caption in self.samples]


SHARDS = {"webdataset": "*.tar", "parquet": "*.parquet"}


class Shards(Dataset):
    """Pictures in webdataset's tar files or in parquet files that lie in a folder, through the library
    datasets; samples as Folder's.

    Captions: the column txt, text, caption or prompt, if there is one. The library converts tar files once,
    into its cache on the disk; from there samples are read as they are needed.
    """

    endless, classes = False, []

    def __init__(self, root, size):
        try:
            import datasets
        except ImportError:
            raise UserError(f"--dataset {root}: to read tar and parquet files: pip install datasets")
        datasets.disable_progress_bars()
        kind, files = next((kind, found) for kind, suffix in SHARDS.items() if (found := sorted(map(str, Path(root).glob(suffix)))))
        try:
            rows = datasets.load_dataset(kind, data_files=files, split="train")
        except (OSError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"--dataset {root}: its {kind} files cannot be read ({' '.join(str(error.__cause__ or error).split())[:300]})")
        pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if not pictures or not len(rows):
            raise UserError(f"--dataset {root}: its {kind} files hold no pictures; their columns are {', '.join(rows.column_names)}")
        texts = [
            name
            for name in ("txt", "text", "caption", "prompt")
            if getattr(rows.features.get(name), "dtype", "") in ("string", "large_string")
        ]
        self.root, self.size, self.files, self.picture, self.text = root, size, files, pictures[0], texts[0] if texts else None
        self.rows = rows.select_columns([self.picture, *texts[:1]]).cast_column(self.picture, datasets.Image(decode=False))
        self[0]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return readable_sample(self, index)

    def source(self, index):
        """A sample's name, its picture's file, and its caption."""
        row = self.rows[index]
        picture = (row[self.picture] or {}).get("bytes") or b""  # a sample may lack its picture: it is skipped like an unreadable one
        return f"{self.root}, sample {index}", io.BytesIO(picture), (row[self.text] or "").strip() if self.text else ""

    def all_captions(self):
        """The different captions, sorted; no picture is read."""
        return sorted({(text or "").strip() for text in self.rows.unique(self.text)}) if self.text else [""]

    def state(self):
        """Texts that change when a file does."""
        return states_of(self.files)


def readable_sample(dataset, index):
    """Sample `index` of a dataset with a source(), or the next one that can be read; the names of those that
    cannot in "skipped".
    """
    from torchvision.transforms.v2 import functional as TF
    skipped = []
    for step in range(len(dataset)):
        name, file, caption = dataset.source((index + step) % len(dataset))
        try:
            with Image.open(file) as picture:
                image = TF.resize(TF.pil_to_tensor(picture.convert("RGB")), dataset.size, antialias=True)
                image = TF.center_crop(image, dataset.size)
            return dict(image=image, caption=caption, skipped=skipped)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            skipped.append(name)
    raise UserError(f"--dataset {dataset.root}: none of its {len(dataset)} pictures can be read")


class Cifar10(Dataset):
    """CIFAR-10's training pictures through torchvision, downloaded to data/ once; samples as those of Shapes.
    """

    endless = False

    def __init__(self, size, root="data"):
        from torchvision.datasets import CIFAR10
        downloads = int(os.environ.get("LOCAL_RANK", 0)) == 0  # one process a machine, the others wait
        if dist.is_initialized() and not downloads:
            dist.barrier()
        try:
            self.data = CIFAR10(root, train=True, download=downloads)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--dataset cifar10: cannot download it to {root}/ ({error}); "
                            "with no network, give a folder with its pictures instead: --dataset FOLDER")
        if dist.is_initialized() and downloads:
            dist.barrier()
        self.size, self.classes = size, self.data.classes

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = torch.from_numpy(self.data.data[index]).permute(2, 0, 1), self.data.targets[index]
        if image.shape[-1] != self.size:
            from torchvision.transforms.v2 import functional as TF
            image = TF.resize(image, self.size, antialias=True)
        return dict(image=image, caption=f"a photo of a {self.data.classes[label]}", skipped=[])

    def all_captions(self):
        """The ten captions."""
        return [f"a photo of a {name}" for name in self.classes]

    def state(self):
        """It does not change."""
        return []


def to_floats(images):
    """uint8 pictures -> [-1, 1]; latents, which are floats, stay what they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def load_prompts(path):
    """The prompts of a file, a list of str: .jsonl with prompt, caption or text in each line, else plain
    text, one a line.

    Raises UserError if there is none, or it is not UTF-8.
    """
    path = Path(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines]
            lines = [next(row[k] for k in ("prompt", "caption", "text") if isinstance(row.get(k), str)) for row in rows]
    except OSError as error:
        raise UserError(f"--prompts {path}: cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: not UTF-8 (byte {error.start}); save it as UTF-8")
    except (ValueError, TypeError, AttributeError, StopIteration):
        raise UserError(f"--prompts {path}: every line must be a JSON object with prompt, caption or text")
    if not lines:
        raise UserError(f"--prompts {path}: has no prompt in it")
    return lines


def prompts_of(config, codec):
    """The prompts of the run: --prompts, the model's classes, or the captions of --dataset. Raises UserError
    if there is none.
    """
    if config.prompts:
        prompts = load_prompts(config.prompts)
        if codec.classes:
            class_labels(prompts, codec.classes)
    elif not codec.guided:
        return [""]
    elif codec.classes:
        return [f"a photo of a {name}" for name in codec.classes]
    else:
        prompts = [caption for caption in load_dataset(config.dataset, codec.picture_size, config.seed).all_captions() if caption]
        if not prompts:
            raise UserError(f"--dataset {config.dataset}: its pictures have no captions; give --prompts FILE")
    codec.warn_of_long(prompts)
    return prompts


@lru_cache(maxsize=2)  # a batch reaches into two epochs at most
def permutation(seed, epoch, n):
    """The order of an epoch's n samples."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_order(dataset, seed, counters):
    """Dataset indices of the run's samples number `counters`: permutation(seed, epoch)[place in the epoch].

    A function of (seed, counter) alone: resuming needs no loader state, and the order does not depend on the
    number of ranks.
    """
    if dataset.endless:
        return list(counters)
    n = len(dataset)
    return [int(permutation(seed, c // n, n)[c % n]) for c in counters]


def save_grid(images, path, columns=8, flag="--out"):
    """Pictures in [-1, 1], [N, 3, H, W], as one PNG, by the first process; small ones are enlarged by a whole factor.

    Raises UserError, naming the flag that chose the path, if it cannot be written.
    """
    from torchvision.utils import save_image
    if int(os.environ.get("RANK", 0)) > 0:
        return
    scale = max(1, 64 // images.shape[-1])
    images = images.float().clamp(-1, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_image(images / 2 + 0.5, path, nrow=columns, padding=2, pad_value=1.0)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot be written ({error})")


def write_text(path, text):
    """Writes a file and moves it to `path` when it is complete; a last line break is added where there is
    text.
    """
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_text(text + "\n" if text else "", encoding="utf-8")
    os.replace(temporary, path)


def agreed(make):
    """What make() returns on rank 0, on every rank: what one machine finds on its disk must hold for all."""
    found = [make() if int(os.environ.get("RANK", 0)) == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def claim_folder(folder, made_by, names):
    """On rank 0 makes the folder of prepared data, notes in made_by.json what it is made with, and returns,
    on every rank, the ones of the names that are not in it yet. Raises UserError if it was made with
    something else or cannot be written."""
    def missing():
        """What rank 0 finds."""
        note = folder / "made_by.json"
        if note.exists() and json.loads(note.read_text()) != json.loads(json.dumps(made_by)):
            raise UserError(f"{folder}: made with other flags, {note.read_text().strip()}; repeat them, or delete the folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(note, json.dumps(made_by))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out")
        return [name for name in names if not (folder / name).exists()]

    return agreed(missing)


def generate_folder(folder, num, made_by, load_artist):
    """A folder of num drawn pictures, a PNG and its caption each, which every process makes its share of -> its name.

    load_artist() -> (prompts, draw, chunk): draw(prompts, number of the first) gives their pictures in [-1, 1], up to
    `chunk` at once; it is only called where something is missing. made_by: what the pictures depend on, a dict.
    Raises UserError if the folder holds others, or more of them.
    """
    names = [f"{i:08d}" for i in range(num)]
    # What can be missing is loaded before the folder is made.
    if agreed(lambda: not all((folder / f"{name}.txt").exists() for name in names)):
        prompts, draw, chunk = load_artist()
    missing = claim_folder(folder, made_by, [f"{name}.txt" for name in names])
    more = agreed(lambda: len(list(folder.glob("*.txt")))) - num + len(missing)
    if more > 0:
        raise UserError(f"--generate {num}: {folder} holds {more} pictures more; raise the number, or delete it")
    if not missing:
        return str(folder)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    firsts = sorted({int(Path(name).stem) // chunk * chunk for name in missing})
    for first in tqdm(firsts[rank::world], desc="pictures", disable=rank > 0):
        y = [prompts[i % len(prompts)] for i in range(first, min(first + chunk, num))]
        pictures = ((draw(y, first) / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for name, picture, caption in zip(names[first:], pictures, y):
            Image.fromarray(picture).save(folder / f"{name}.png")
            write_text(folder / f"{name}.txt", caption)  # second: a caption says that its picture is complete
    if dist.is_initialized():
        dist.barrier()
    return str(folder)


def digest(texts):
    """A short fingerprint of many texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def states_of(paths):
    """Name, size and time of change of files: whether they are still what they were."""
    return [f"{path} {status.st_size} {status.st_mtime_ns}" for path in paths for status in [Path(path).stat()]]
