"""What the supplements do to the mini student's pictures, in figures and in a picture.

    python tools/try_supplements.py sizes         other sizes than the trained one
    python tools/try_supplements.py negative      negative prompts
    python tools/try_supplements.py composition --student runs/two/a/pipeline
                                                  two shapes a picture; of a student trained for them

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
from common import chunks_of, draw_samples, load, one_step
from plumbing.cli import SEED, Parser, check_flags, check_writable, run_command
from plumbing.grids import save_grid
from plumbing.shapes import BACKGROUNDS, COLOURS, HALF, SHAPES, Shapes, TwoShapes, coverage
from supplements.composition import optimised_noise, tokens_of
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
# The seed of the drawings whose captions are composed, as in evaluate.py; updates of the noise, at a rate.
PROMPT_SEED, UPDATES, RATE = 30_000, (0, 5, 10, 30), 200.0
# The largest difference between what is found of two shapes and the asked one, in units of the shape's area;
# drawings of 32 x 32 pixels stay below half of it.
WORST = 0.3


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


def found_shapes(images, colour, shape, background):
    """Whether each picture shows the asked shape in the asked colour: bool [N].

    images: uint8 [N, 3, S, S]; colour, shape, background: indices [N]. The pixels nearer to the colour than
    half the way to the background are one mask. Its area and centre of mass give each kind's drawing of the
    same area and centre, with no search; the kind whose drawing differs least must be the asked one.
    """
    size = images.shape[-1]
    palette, backgrounds = (torch.tensor(list(c.values())) for c in (COLOURS, BACKGROUNDS))
    asked, behind = palette[colour], backgrounds[background]
    near = (images / 255 - asked[:, :, None, None]).norm(dim=1)
    mask = (near < ((asked - behind).norm(dim=1) / 2)[:, None, None]).float()
    area = mask.sum((1, 2)).clamp_min(1)
    place = (torch.arange(size) + 0.5) / size
    x, y = (mask.sum(1) * place).sum(1) / area, (mask.sum(2) * place).sum(1) / area
    radius = (area / torch.pi).sqrt() / size
    differences = []
    for kind in range(len(SHAPES)):
        # A triangle's centre of mass lies a third of half its height below the middle of its box.
        middle = y - radius * HALF[kind] / 3 * (SHAPES[kind] == "triangle")
        drawing = coverage(torch.full_like(shape, kind), radius, x, middle, size)
        differences.append((mask - drawing).abs().sum((1, 2)) / area)
    least, kind = torch.stack(differences).min(0)
    low, high = TwoShapes.RADII
    return (kind == shape) & (least < WORST) & (radius > low * 0.75) & (radius < high * 1.25)


def both_shapes(images, attributes):
    """found_shapes of both shapes that the attributes of TwoShapes ask for: bool [N, 2]."""
    return torch.stack([found_shapes(images, attributes["colour"][:, i], attributes["shape"][:, i],
                                     attributes["background"]) for i in range(2)], 1)


def drawn_composed(student, codec, prompts, seed):
    """{updates: pictures [N, 3, H, W]} for UPDATES, and with noise moved elsewhere, as far as by ten."""
    rows = {name: [] for name in [*(f"{n} updates" for n in UPDATES), "10, at random"]}
    for y, z in chunks_of(prompts, codec, seed):
        cond, tokens = codec.cond(y), [tokens_of(codec.pipe.tokenizer, prompt, SHAPES) for prompt in y]
        noises = [optimised_noise(student, z, cond, tokens, n, RATE) for n in UPDATES]
        step = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        far, near = (x.square().sum((1, 2, 3), keepdim=True).sqrt()
                     for x in (noises[UPDATES.index(10)] - z, step))
        noises.append(z + step * far / near)
        for pictures, noise in zip(rows.values(), noises):
            with torch.no_grad():
                pictures.append(codec.decode(one_step(student, noise, cond)).clamp(-1, 1))
    return {name: torch.cat(pictures) for name, pictures in rows.items()}


def shares_of_composition(student, codec, num, seed):
    """{updates: the shares of pictures with both shapes in their colours, and of shapes that are}."""
    dataset = TwoShapes(codec.picture_size, PROMPT_SEED)
    attributes, shares = dataset.attributes(range(num)), {}
    for name, pictures in drawn_composed(student, codec, dataset.captions(attributes), seed).items():
        right = both_shapes(to_uint8(pictures), attributes).float()
        shares[name] = [right.prod(1).mean().item(), right.mean().item()]
    return shares


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


def grid_of_composition(student, codec, path):
    """Rows: updates of the noise; the first prompts, not chosen."""
    dataset = TwoShapes(codec.picture_size, PROMPT_SEED)
    prompts = dataset.captions(dataset.attributes(range(12)))
    rows = drawn_composed(student, codec, prompts, 0)
    save_grid(torch.cat(list(rows.values())), path, 12, "--grid", rows=list(rows), captions=prompts)


WHAT = dict(sizes=(shares_of_sizes, grid_of_sizes, ["one shape", "one clean shape", "the caption's"]),
            negative=(shares_of_negative, grid_of_negative, ["clean", *COLOURS]),
            composition=(shares_of_composition, grid_of_composition, ["both shapes", "a shape"]))


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHAT, help="the supplement")
    parser.add_argument("--student", default=STUDENT, help="its pipeline [assets/mini-student]")
    parser.add_argument("--num", type=int, default=500, help="pictures a row and seed [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise [0 1 2]")
    parser.add_argument("--grid", default="supplement.png", help="the PNG to write [%(default)s]")
    args = parser.parse_args(argv)
    check_flags(args, num=dict(least=1, most=100_000), seeds=SEED)
    check_writable(args.grid, "--grid", ".png", deep=True)
    shares_of, grid_of, columns = WHAT[args.what]
    student, codec = load(args.student)
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
