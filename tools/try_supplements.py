"""What the supplements do to the mini student's pictures, in figures and in a picture.

    python tools/try_supplements.py sizes         other sizes than the trained one
    python tools/try_supplements.py negative      negative prompts

Prints a table: mean and standard deviation over --seeds of shares of --num pictures, in per cent.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import CLEAN, read_shapes, to_uint8

import supplements.sizes
from common import draw_samples, load
from plumbing.cli import SEED, Parser, check_flags, check_writable, run_command
from plumbing.grids import save_grid
from plumbing.shapes import BACKGROUNDS, COLOURS, SHAPES, Shapes
from supplements.negative import steered
from supplements.sizes import resized

STUDENT = Path(__file__).parent.parent / "assets" / "mini-student"
SIZES = [(48, 48), (64, 64), (32, 64)]
PLAIN, RED, SHORT = "a large circle on white", "a large red circle on white", "a circle on white"
STEERED = [(PLAIN, "yellow", (0, 0.2, 0.4, 0.8)), (PLAIN, "red", (0.4, 0.8)), (PLAIN, "square", (0.8,)),
           (RED, "red", (0.2, 0.4, 0.8)), (SHORT, "red", (0, 0.8))]
# A pixel belongs to a shape if a channel differs by this from the frame, of 255; a shape has at least this
# share of the pixels of a square picture as high or wide as the shorter side.
CONTRAST, LEAST = 64, 0.005


def read_single(images):
    """Reads pictures that show exactly one shape, of any size: (whether they do, bool [N], the reading of
    those, as read_shapes has it).

    images: uint8 [N, 3, H, W]. A shape is a set of connected pixels that differ from the median colour of the
    frame. It is cropped so that its size is that of a drawing.
    """
    one, crops = [], [torch.empty(0, 3, 32, 32, dtype=torch.uint8)]
    for image in images.float():
        frame = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1).median(1).values
        shown = image - frame[:, None, None]
        labels, _ = ndimage.label(shown.abs().amax(0) > CONTRAST, np.ones((3, 3)))
        areas = np.bincount(labels.ravel())[1:]
        one.append((areas >= LEAST * min(labels.shape)**2).sum() == 1)
        if one[-1]:
            box = ndimage.find_objects(labels)[areas.argmax()]
            # 0.29, between the radii of small and large drawings.
            side = round((areas.max() / np.pi)**0.5 / 0.29)
            top, left = (round((part.start + part.stop - side) / 2) for part in box)
            shown = TF.resized_crop(shown, top, left, side, side, [32, 32])  # 0, the frame, outside
            crops.append((shown + frame[:, None, None]).round().clamp(0, 255).to(torch.uint8)[None])
    crops = torch.cat(crops)
    return torch.tensor(one), read_shapes(crops) if len(crops) else {"error": torch.empty(0)}


def shares_of_single(images, prompts):
    """The shares of pictures with one shape, with one clean shape, and with that as the caption has it."""
    one, read = read_single(images)
    right = clean = read["error"] < CLEAN
    if one.any():
        words = [prompt.split() for prompt, chosen in zip(prompts, one) if chosen]
        for i, name, names in (2, "colour", COLOURS), (3, "shape", SHAPES), (5, "background", BACKGROUNDS):
            right = right & (read[name] == torch.tensor([list(names).index(word[i]) for word in words]))
    return [hits.sum().item() / len(images) for hits in (one, clean, right)]


def shares_of_sizes(student, codec, num, seed):
    """{size and method: shares_of_single}."""
    prompts = [Shapes.all_captions()[7 * i % 72] for i in range(num)]
    return {name: shares_of_single(to_uint8(pictures), prompts)
            for name, pictures in drawn_at_sizes(student, codec, prompts, seed)}


def drawn_at_sizes(student, codec, prompts, seed):
    """Yields (name, pictures [N, 3, H, W]) of the trained size and of SIZES, plain and re-dilated."""
    yield "32 x 32", draw_samples(student, codec, prompts, seed)
    for height, width in SIZES:
        with resized(student, codec, (height, width)):
            redilated = draw_samples(student, codec, prompts, seed)
        with (patch.object(supplements.sizes, "redilated_layers", lambda unet: ()),
              resized(student, codec, (height, width))):
            yield f"{height} x {width}, plain", draw_samples(student, codec, prompts, seed)
        yield f"{height} x {width}, re-dilated", redilated


def drawn_steered(student, codec, num, seed):
    """Yields (prompt, negative prompt and alpha, pictures [N, 3, 32, 32]) of every row of STEERED."""
    for prompt, negative, alphas in STEERED:
        for alpha in alphas:
            with steered(student, codec, negative, alpha):
                pictures = draw_samples(student, codec, [prompt] * num, seed)
            yield f"{prompt}, not {negative} {alpha}" if alpha else prompt, pictures


def shares_of_negative(student, codec, num, seed):
    """{prompt, negative prompt and alpha: the shares of clean pictures and of the four colours}."""
    shares = {}
    for name, pictures in drawn_steered(student, codec, num, seed):
        read = read_shapes(to_uint8(pictures))
        colours = torch.bincount(read["colour"], minlength=len(COLOURS)) / num
        shares[name] = [(read["error"] < CLEAN).float().mean().item(), *colours.tolist()]
    return shares


def grid_of_sizes(student, codec, path):
    """Rows: sizes and methods; all on gray cells of 64 x 64."""
    prompts = Shapes.all_captions()[::10]
    rows = dict(drawn_at_sizes(student, codec, prompts, 0))
    cells = [F.pad(x, [side for n in (x.shape[3], x.shape[2]) for side in [(64 - n) // 2] * 2], value=0.7)
             for x in rows.values()]
    save_grid(torch.cat(cells), path, len(prompts), "--grid", rows=list(rows), captions=prompts)


def grid_of_negative(student, codec, path):
    """Rows: prompts, negative prompts and alphas, on the same noise."""
    rows = dict(drawn_steered(student, codec, 6, 0))
    save_grid(torch.cat(list(rows.values())), path, 6, "--grid", rows=list(rows))


WHAT = dict(sizes=(shares_of_sizes, grid_of_sizes, ["one shape", "one clean shape", "the caption's"]),
            negative=(shares_of_negative, grid_of_negative, ["clean", *COLOURS]))


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHAT, help="the supplement")
    parser.add_argument("--num", type=int, default=500, help="pictures a row and seed [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise [0 1 2]")
    parser.add_argument("--grid", default="supplement.png", help="the PNG to write [%(default)s]")
    args = parser.parse_args(argv)
    check_flags(args, num=dict(least=1, most=100_000), seeds=SEED)
    check_writable(args.grid, "--grid", ".png", deep=True)
    shares_of, grid_of, columns = WHAT[args.what]
    student, codec = load(STUDENT)
    grid_of(student, codec, args.grid)
    by_seed = [shares_of(student, codec, args.num, seed) for seed in args.seeds]
    print("| " + " | ".join([args.what, *columns]) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name in by_seed[0]:
        shares = 100 * torch.tensor([shares[name] for shares in by_seed])
        cells = [f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")
                 for values in shares.T]
        print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    run_command(main)
