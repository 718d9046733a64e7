"""Pictures and prompts: folders, CIFAR-10, tar and parquet files, prompt files; their order; grids."""

import codecs
import io
import json
import os
import sys
import tarfile
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common import Draws, InformativePrior, UserError, class_labels, load, one_line, one_step
from plumbing.files import agreed, beside, claim_folder, states_of, write_text, writing
from plumbing.shapes import Shapes, TwoShapes

MOST_PIXELS = 2**26  # of a picture; while so many of a transparent one are put on white they take 1 GB


def load_dataset(name, size, seed=0):
    """The Dataset of a name, shapes, shapes-rolled, shapes-two or cifar10, or of a folder of pictures.

    A folder may hold tar or parquet files of them. A sample is {"image": uint8 [3, size, size], "caption":
    str, "skipped": [unreadable pictures' names, each with the reason in brackets]}. Raises UserError if there
    is no such dataset, or no readable picture in it.
    """
    if name in ("shapes", "shapes-rolled"):
        return Shapes(size, seed, name == "shapes-rolled")
    if name == "shapes-two":
        return TwoShapes(size, seed)
    if name == "cifar10":
        return Cifar10(size)
    if not name or not Path(name).is_dir():
        raise UserError(f"--dataset {name}: unknown; choose shapes, cifar10 or the path of an existing "
                        "folder of pictures")
    shards = any(next(Path(name).glob(suffix), None) for suffix in SHARDS.values())
    return Shards(name, size) if shards else Folder(name, size)


class Folder(Dataset):
    """The pictures below a folder, resized and centre-cropped to size x size.

    A picture's caption stands in metadata.jsonl ({"file_name", "text"} a line), else in a .txt beside the
    picture; where no picture has one, it is the name of the class folder that holds the picture; else it is
    empty. A picture that is unreadable, or whose .txt is, is replaced by the next one and named in "skipped".
    """

    endless = False

    def __init__(self, root, size):
        self.root, self.size, self.classes = root, size, []
        root = Path(root)
        metadata = root / "metadata.jsonl"
        if metadata.is_file():
            def sample(line):
                row = json.loads(line)
                return root / row["file_name"], check_text(row.get("text", ""))
            self.samples = read_lines(metadata, "--dataset", sample,
                                      "a JSON object with file_name and text, both texts that UTF-8 can hold")
        else:
            paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            texts = set(root.rglob("*.txt"))
            written = {p: text for p in paths if (text := p.with_suffix(".txt")) in texts}
            if written:
                self.samples = [(p, written.get(p, "")) for p in paths]
                if len(written) < len(paths):
                    tell_of_uncaptioned(root, len(paths) - len(written), len(paths))
            else:
                self.samples = [(p, p.parent.name if p.parent != root else "") for p in paths]
                self.classes = sorted({name for _, name in self.samples} - {""})
            for name in self.classes:
                try:
                    check_text(name)
                except ValueError:
                    raise UserError(f"--dataset {root}: the name of the class folder {name!r} is not UTF-8; "
                                    "rename it")
        if not self.samples:
            raise UserError(f"--dataset {root}: no pictures in it; "
                            "give a folder by class, with metadata.jsonl, or with .txt captions")
        self[0]  # a folder without a readable picture fails now, not in the middle of the run

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return readable_sample(self, index)

    def name(self, index):
        """What a sample is called in a message."""
        return str(self.samples[index][0])

    def source(self, index):
        """A sample's picture's file and its caption. Raises ValueError if the caption's file is no text."""
        path, caption = self.samples[index]
        return path, self.caption(caption)

    @staticmethod
    def caption(source):
        """A caption, given as a text or as the file that holds it. Raises ValueError if that is no text."""
        if not isinstance(source, Path):
            return source
        try:
            return source.read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"{source}: {reason(error)}")

    def all_captions(self):
        """The different captions, sorted; no picture is read. Raises UserError if a file holds no text."""
        try:
            return sorted({self.caption(source) for _, source in self.samples})
        except ValueError as error:
            raise UserError(f"--dataset {self.root}: the caption {error}; save it as UTF-8, or delete it")

    def state(self):
        """Texts that change when a picture or a caption does."""
        paths, captions = zip(*self.samples)
        written = [caption for caption in captions if isinstance(caption, Path)]
        present = filter(os.path.isfile, [*paths, *written])  # metadata.jsonl may name what is not there
        return states_of(present) + [str(caption) for caption in captions]


@cache  # a run reads its folder more than once
def tell_of_uncaptioned(root, without, number):
    """Says on stderr that so many of a folder's pictures have no caption."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{without} of {number} pictures of {root} have no .txt caption; theirs is empty",
              file=sys.stderr)


SHARDS = {"webdataset": "*.tar", "parquet": "*.parquet"}


class Shards(Dataset):
    """The pictures in a folder's parquet files, or tar files as of webdataset, prepared like those of Folder.

    Captions: the column txt, text, caption or prompt, if there is one. The library datasets reads the files;
    it converts tar files once, into its cache on the disk, and reads samples from there as they are needed.
    """

    endless, classes = False, []

    def __init__(self, root, size):
        try:
            import datasets
        except ImportError:
            raise UserError(f"--dataset {root}: to read tar and parquet files: pip install datasets")
        datasets.disable_progress_bars()
        kind, files = next((kind, found) for kind, suffix in SHARDS.items()
                           if (found := sorted(map(str, Path(root).glob(suffix)))))
        try:
            rows = datasets.load_dataset(kind, data_files=files, split="train")
        except (OSError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"--dataset {root}: its {kind} files cannot be read "
                            f"({one_line(error.__cause__ or error)})")
        pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if not pictures or not len(rows):
            raise UserError(f"--dataset {root}: its {kind} files hold no pictures; their columns are "
                            f"{', '.join(rows.column_names)}")
        texts = [name for name in ("txt", "text", "caption", "prompt")
                 if getattr(rows.features.get(name), "dtype", "") in ("string", "large_string")]
        self.root, self.size, self.files = root, size, files
        self.picture, self.text = pictures[0], texts[0] if texts else None
        rows = rows.select_columns([self.picture, *texts[:1]])
        self.rows = rows.cast_column(self.picture, datasets.Image(decode=False))
        self[0]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return readable_sample(self, index)

    def name(self, index):
        """What a sample is called in a message."""
        return f"{self.root}, sample {index}"

    def source(self, index):
        """A sample's picture's file and its caption. Raises ValueError if the caption is not UTF-8."""
        row = self.rows[index]
        picture = (row[self.picture] or {}).get("bytes") or b""  # a missing picture is an unreadable one
        return io.BytesIO(picture), (row[self.text] or "").strip() if self.text else ""

    def all_captions(self):
        """The different captions, sorted; no picture is read. Raises UserError if one is not UTF-8."""
        try:
            texts = self.rows.unique(self.text) if self.text else [""]
        except ValueError as error:
            raise UserError(f"--dataset {self.root}: a text in the column {self.text} cannot be read "
                            f"({reason(error)}); write the files anew")
        return sorted({(text or "").strip() for text in texts})

    def state(self):
        """Texts that change when a file does."""
        return states_of(self.files)


def readable_sample(dataset, index):
    """Sample `index` of a dataset with a source(), or the next readable one; "skipped" names the others.

    Raises UserError if no sample is readable.
    """
    skipped = []
    for step in range(len(dataset)):
        number = (index + step) % len(dataset)
        try:
            file, caption = dataset.source(number)
            return dict(image=read_picture(file, dataset.size), caption=caption, skipped=skipped)
        except Exception as error:  # on damaged files Pillow's readers raise errors of nearly any kind
            skipped.append(f"{dataset.name(number)} ({reason(error)})")
    raise UserError(f"--dataset {dataset.root}: none of its {len(dataset)} pictures can be read; the first: "
                    f"{skipped[0]}")


def read_picture(file, size):
    """A picture, resized and centre-cropped, upright, on white: uint8 [3, size, size].

    Raises ValueError if it has more than MOST_PIXELS or no known range, and any error if it is damaged.
    """
    with Image.open(file) as picture:
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MOST_PIXELS}")
        picture.load()  # outside of what is suppressed, for damage shows in the first attempt only
        with suppress(Exception):  # the EXIF data may be damaged in a picture that is not
            ImageOps.exif_transpose(picture, in_place=True)
        # Pillow scales PGM's maximum to 65535.
        if picture.mode.startswith("I;16") or (picture.format, picture.mode) == ("PPM", "I"):
            picture = Image.fromarray((np.asarray(picture, np.float32) / 257).round().astype(np.uint8))
        if picture.mode in ("I", "F"):
            raise ValueError(f"mode {picture.mode} has no known range")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        image = TF.pil_to_tensor(picture.convert("RGB"))
    height, width = image.shape[1:]
    # The ends of a strip would be resized only to be cut off, and could take any memory.
    image = TF.center_crop(image, [min(height, 4 * width), min(width, 4 * height)])
    return TF.center_crop(TF.resize(image, size, antialias=True), size)


def reason(error):
    """Why something cannot be read, in one line that is the same each time."""
    if isinstance(error, UnidentifiedImageError):  # its text holds an object's address
        return "not a picture"
    if isinstance(error, UnicodeError):
        return "not UTF-8"
    return getattr(error, "strerror", "") or one_line(error) or type(error).__name__


class Cifar10(Dataset):
    """CIFAR-10's training pictures through torchvision, downloaded to data/ once."""

    endless = False

    def __init__(self, size, root="data"):
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
            image = TF.resize(image, self.size, antialias=True)
        return dict(image=image, caption=f"a photo of a {self.data.classes[label]}", skipped=[])

    def all_captions(self):
        """The ten captions."""
        return [f"a photo of a {name}" for name in self.classes]

    def state(self):
        """Nothing, for CIFAR-10 does not change."""
        return []


def to_floats(images):
    """uint8 pictures -> [-1, 1]; latents, which are floats already, stay as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def check_text(text):
    """The text itself, if a tokenizer can take it; raises ValueError if it is no str or has no UTF-8 form."""
    if not isinstance(text, str):
        raise ValueError(f"a {type(text).__name__} is no text")
    text.encode()
    return text


def read_lines(path, flag, parse, needed):
    """parse(line) of every line of a UTF-8 file that is not blank.

    Raises UserError if the file cannot be read, and, with the line's number, if one is not UTF-8 or parse
    fails because it is not what is needed.
    """
    try:
        # Only \n ends a line: str.splitlines also splits at signs that stand inside texts, such as U+2028.
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror}); give a file that can")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            if line := line.decode().strip():
                found.append(parse(line))
        except UnicodeDecodeError:
            raise UserError(f"{flag} {path}: line {number} is not UTF-8; save the file as UTF-8")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{flag} {path}: line {number} must be {needed}")
    return found


def load_prompts(path):
    """The prompts of a file: .jsonl with prompt, caption or text in each line, else plain text, one a line.

    Blank ones are left out. Raises UserError if there is no prompt in the file, or a line cannot be read.
    """
    def prompt(line):
        row = json.loads(line)
        texts = (row[name] for name in ("prompt", "caption", "text") if isinstance(row.get(name), str))
        return check_text(next(texts, None))

    path = Path(path)
    prompts = read_lines(path, "--prompts", prompt if path.suffix == ".jsonl" else check_text,
                         "a JSON object with prompt, caption or text, a text that UTF-8 can hold")
    prompts = [text for text in prompts if text.strip()]
    if not prompts:
        raise UserError(f"--prompts {path}: has no prompt in it")
    return prompts


def prompts_of(config, codec):
    """The prompts of the run: --prompts, the model's classes, or the captions of --dataset.

    Raises UserError if there is none.
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
        dataset = load_dataset(config.dataset, codec.picture_size, config.seed)
        prompts = [caption for caption in dataset.all_captions() if caption]
        if not prompts:
            raise UserError(f"--dataset {config.dataset}: its pictures have no captions; give --prompts FILE")
    codec.warn_of_long(prompts)
    return prompts


@lru_cache(maxsize=2)  # a batch reaches into two epochs at most
def permutation(seed, epoch, n):
    """The order of an epoch's n samples."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_order(dataset, seed, counters):
    """Dataset indices of the run's samples of these numbers: permutation(seed, epoch)[place in the epoch].

    They depend on the seed and the numbers alone: resuming needs no loader state, and any number of ranks
    gives the same order.
    """
    if dataset.endless:
        return list(counters)
    n = len(dataset)
    return [int(permutation(seed, c // n, n)[c % n]) for c in counters]


class FreshData(Dataset):
    """Latents x0 that --generator draws in one call when a step asks for them; none are stored.

    A sample's prompt and noise depend on its number alone.
    """

    endless = True
    state = all_captions = lambda self: self.prompts

    def __init__(self, config, run, codec):
        self.run, self.root = run, config.prompts or config.dataset
        self.prior = InformativePrior.read(config.generator, run.device)
        self.generator, self.codec = load(config.generator, run.device, config.generator_lora)
        theirs, ours = ((tuple(c.shape), c.vae and c.vae.config.scaling_factor) for c in (self.codec, codec))
        if theirs != ours:
            raise UserError(f"--generator {config.generator}: its latents have shape and scale {theirs}, "
                            f"--model's {ours}; give two of the same VAE, or --generate NUMBER")
        self.prompts = prompts_of(config, self.codec)

    def __getitem__(self, number):
        return self.__getitems__([number])[0]

    @torch.no_grad()
    def __getitems__(self, numbers):  # by which torch's loader asks for a whole batch
        seed, n = self.run.config.seed, len(self.prompts)
        y = [self.prompts[permutation(seed, i // n, n)[i % n]] for i in numbers]
        draws = [Draws(seed, 2**62 + i, 1, slice(None), "cpu") for i in numbers]  # which no iteration is
        noise = [torch.cat([d.randn(*self.codec.shape) for d in draws]).to(self.run.device) for _ in range(2)]
        x_T = self.prior.start(self.generator.schedule, *noise) if self.prior else noise[0]
        micro = self.run.micro_batches[0].stop
        with self.run.autocast():
            x0 = torch.cat([one_step(self.generator, x_T[i:i + micro], self.codec.cond(y[i:i + micro]))
                            for i in range(0, len(y), micro)])
        return [dict(image=x, caption=caption, skipped=[]) for x, caption in zip(x0, y)]


def generate_folder(folder, num, made_by, load_artist):
    """Draws num pictures into a folder, a PNG and its caption each -> the folder's name.

    Only missing pictures are drawn, by each process its share. load_artist() -> (prompts, draw, chunk),
    called only then; draw(prompts, number of the first) gives their pictures in [-1, 1], up to `chunk` at
    once. made_by: a dict of everything that the pictures depend on. Raises UserError if the folder holds
    pictures made by something else, or more than num.
    """
    names = [f"{i:08d}" for i in range(num)]
    # Loading may fail, and then there must be no folder yet.
    if agreed(lambda: not all((folder / f"{name}.txt").exists() for name in names)):
        prompts, draw, chunk = load_artist()
    missing = claim_folder(folder, made_by, [f"{name}.txt" for name in names])
    more = agreed(lambda: len(list(folder.glob("*.txt")))) - num + len(missing)
    if more > 0:
        raise UserError(f"--generate {num}: {folder} holds {more} pictures more; "
                        "raise the number, or delete the folder")
    if not missing:
        return str(folder)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    firsts = sorted({int(Path(name).stem) // chunk * chunk for name in missing})
    for first in tqdm(firsts[rank::world], desc="pictures", disable=rank > 0):
        y = [prompts[i % len(prompts)] for i in range(first, min(first + chunk, num))]
        pictures = ((draw(y, first) / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for name, picture, caption in zip(names[first:], pictures, y):
            with writing(path := folder / f"{name}.png"):
                Image.fromarray(picture).save(beside(path), "PNG")
                os.replace(beside(path), path)
            write_text(folder / f"{name}.txt", caption)  # after its picture, which is then complete
    if dist.is_initialized():
        dist.barrier()
    return str(folder)
