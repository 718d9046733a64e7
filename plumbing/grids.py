"""Pictures as files: grids with labels, and folders of single pictures with their captions."""

import json
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

from plumbing.files import beside, writing

PADDING, LINE = 2, 12  # pixels between pictures, and of a line of the labels


def save_grid(images, path, columns=8, flag="--out", rows=(), captions=()):
    """The first process writes pictures in [-1, 1], [N, 3, H, W], as one PNG; small ones are enlarged.

    rows: a label for each row, to the left of it; captions: one for each column, above it. Raises UserError,
    naming the flag that chose the path, if the file cannot be written.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    scale = max(1, 64 // images.shape[-1])
    levels = to_levels(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = TF.to_pil_image(make_grid(levels, nrow=columns, padding=PADDING, pad_value=255))
    width, height = (side * scale + PADDING for side in (images.shape[3], images.shape[2]))
    with writing(f"{flag} {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        labelled(grid, width, height, rows, captions).save(path, "PNG")


def to_levels(images):
    """Pictures in [-1, 1] -> uint8."""
    return ((images.float().clamp(-1, 1) / 2 + 0.5) * 255).round().byte()


def labelled(grid, width, height, rows, captions):
    """The grid, whose cells have this width and height, with the labels in a margin to the left and above."""
    if not rows and not captions:
        return grid
    font = ImageFont.load_default(10)
    wrapped = [textwrap.wrap(caption, max(8, width // 6)) for caption in captions]
    left = max((int(font.getlength(label)) for label in rows), default=0) + 8 * bool(rows)
    top = LINE * max(map(len, wrapped), default=0) + 4 * bool(captions)
    canvas = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    canvas.paste(grid, (left, top))
    draw = ImageDraw.Draw(canvas)
    for i, label in enumerate(rows):
        draw.text((4, top + i * height + height // 2 - LINE // 2), label, "black", font)
    for i, lines in enumerate(wrapped):
        for k, line in enumerate(lines):
            draw.text((left + i * width + PADDING, 2 + k * LINE), line, "black", font)
    return canvas


def save_pictures(folder, images, captions, first=0):
    """Adds uint8 pictures [N, 3, H, W] and their captions to a folder that --dataset reads.

    first: the number of the first picture. Raises UserError if they cannot be written.
    """
    folder, rows = Path(folder), []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, (image, caption) in enumerate(zip(images, captions), first):
            path = folder / f"{number:06d}.png"
            TF.to_pil_image(image).save(beside(path), "PNG")
            os.replace(beside(path), path)
            rows.append(json.dumps(dict(file_name=path.name, text=caption)) + "\n")
        with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
            file.writelines(rows)


def save_samples(args, images, captions, columns=8):
    """Writes what `sample` drew: --grid, and with --save single pictures with their captions."""
    save_grid(images, args.grid, columns, "--grid")
    if args.save:
        save_pictures(args.save, to_levels(images), captions)
