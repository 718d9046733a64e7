"""Measures pictures: shapes read back exactly, Frechet distance, precision and recall.

    python tools/evaluate.py --run runs/yoso --num 1000 --nfe 1          a run's one-step samples against its own dataset
    python tools/evaluate.py --images FOLDER --dataset FOLDER            one folder of pictures against another

Writes one JSON object (--json FILE, else stdout). The Frechet distance is computed by torch-fidelity on the features named
in the output: `random-conv` (RandomConvFeatures below: no download, sensitive to colours, edges and their layout; its
values compare runs of this project with one another and are no Inception FID), or `inception` where its weights can be fetched.
"""

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path

import torch
import torch_fidelity
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

sys.path.insert(0, str(Path(__file__).parent.parent))
import yoso
from common import BACKGROUNDS, COLOURS, HALF, SHAPES, SIZES, Folder, Shapes, UserError, coverage, load_dataset, run_command, sample_order

# The largest share of a shape's contrast that the best drawing may leave unexplained. Measured on real drawings of 16 x 16:
# the best triangle for a disc or square leaves 0.21 or more, the best square for a disc 0.06 to 0.08. So CLEAN (one shape of
# one colour on one background) keeps triangles apart from the rest, SHARP allows outlines half as wrong, and whether a SHARP
# picture is a disc or a square hangs on its corners.
CLEAN, SHARP = 0.2, 0.1
REFERENCE_SEED = 10_000  # the reference drawings: a seed that no run uses by default


def read_shapes(images):
    """The drawing that fits each picture best in the least-squares sense, over all of Shapes' drawing rules.

    images: uint8 [N, 3, S, S]. Returns a dict of tensors [N]: colour, background, shape, scale (indices), radius, x, y
    (picture units), and error: ||picture - drawing||^2 / ||drawing - its background||^2, so 0 for a perfect drawing, about 1
    where the shape is missing. Places are searched on a half-pixel grid and five radii, then refined for each shape.
    """
    parts = [_read_chunk(chunk) for chunk in images.split(32)]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def _read_chunk(images):
    n, _, size, _ = images.shape
    images = images.float() / 255
    colours, backgrounds = torch.tensor(list(COLOURS.values())), torch.tensor(list(BACKGROUNDS.values()))
    contrast = colours[:, None] - backgrounds[None]  # [colours, backgrounds, 3]
    over_background = images[:, None] - backgrounds[None, :, :, None, None]  # [N, backgrounds, 3, S, S]
    empty = over_background.square().sum((2, 3, 4))[:, None]  # the error of the background alone, [N, 1, backgrounds]
    correlated = torch.einsum("cbk,nbkhw->ncbhw", contrast, over_background).flatten(3)  # [N, c, b, S * S]
    energy = contrast.square().sum(2)[None]  # [1, c, b]

    candidates = []
    for shape in range(len(SHAPES)):
        radius, x, y = _places(shape, size)
        masks = coverage(torch.full((len(x),), shape), radius, x, y, size).flatten(1)  # [places, S * S]
        error = empty[..., None] - 2 * correlated @ masks.T + energy[..., None] * masks.square().sum(1)
        best = error.flatten(1).argmin(1)
        place, colour, background = best % len(x), best // len(x) // len(backgrounds), best // len(x) % len(backgrounds)
        refined = _refine(images, colours[colour], backgrounds[background], shape, radius[place], x[place], y[place])
        candidates.append(refined | dict(colour=colour, background=background, shape=torch.full((n,), shape)))
    winner = torch.stack([c["residual"] for c in candidates]).argmin(0)
    chosen = {k: torch.stack([c[k] for c in candidates])[winner, torch.arange(n)] for k in candidates[0]}
    chosen["scale"] = (chosen["radius"] > (SIZES["small"][1] + SIZES["large"][0]) / 2).long()
    chosen["error"] = chosen.pop("residual") / chosen.pop("shape_energy")
    return chosen


@lru_cache
def _places(shape, size):
    """The coarse search grid: radius, x, y [places]."""
    grids = []
    for radius in torch.linspace(SIZES["small"][0], SIZES["large"][1], 5).tolist():
        half = radius * HALF[shape].item()
        line = torch.arange(half, 1 - half + 1e-6, 0.5 / size)
        y, x = torch.meshgrid(line, line, indexing="ij")
        grids.append(torch.stack([torch.full_like(x, radius), x, y]).flatten(1))
    return torch.cat(grids, 1).unbind(0)


def _refine(images, colour, background, shape, radius, x, y):
    n, _, size, _ = images.shape
    moves = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)  # of radius, x and y
    for step in (1 / 4, 1 / 4, 1 / 8, 1 / 16, 1 / 32):
        radii = (radius[:, None] + moves[:, 0] * step / size).clamp(SIZES["small"][0], SIZES["large"][1])
        half = radii * HALF[shape]
        xs = torch.clamp(x[:, None] + moves[:, 1] * step / size, half, 1 - half)
        ys = torch.clamp(y[:, None] + moves[:, 2] * step / size, half, 1 - half)
        masks = coverage(torch.full((xs.numel(),), shape), radii.flatten(), xs.flatten(), ys.flatten(), size)
        masks = masks.view(n, -1, 1, size, size)
        shapes = masks * (colour - background)[:, None, :, None, None]
        residual = (images[:, None] - background[:, None, :, None, None] - shapes).square().sum((2, 3, 4))
        best = residual.argmin(1, keepdim=True)
        radius, x, y = (v.gather(1, best)[:, 0] for v in (radii, xs, ys))
    energy = shapes.square().sum((2, 3, 4))
    return dict(radius=radius, x=x, y=y, residual=residual.gather(1, best)[:, 0], shape_energy=energy.gather(1, best)[:, 0])


def shapes_report(images, wanted=None):
    """Share of clean and of sharp pictures, and coverage of the colour x shape x background combinations among the clean.

    images: uint8 [N, 3, S, S]. wanted: attributes as Shapes.attributes gives them; then also the share of pictures that are
    clean and have the wanted colour, background and shape together, and each attribute's own share.
    """
    read = read_shapes(images)
    clean = read["error"] < CLEAN
    total = len(COLOURS) * len(SHAPES) * len(BACKGROUNDS)
    mode = (read["colour"] * len(SHAPES) + read["shape"]) * len(BACKGROUNDS) + read["background"]
    share = torch.bincount(mode[clean], minlength=total) / max(1, int(clean.sum()))
    report = dict(clean=clean.float().mean().item(), sharp=(read["error"] < SHARP).float().mean().item(),
                  modes=int((share > 0).sum()), modes_total=total,
                  mode_imbalance=(share - 1 / total).abs().sum().item() / 2,
                  error_median=read["error"].median().item())
    if wanted is not None:
        right = {k: (read[k] == wanted[k]) for k in ("colour", "background", "shape", "scale")}
        report |= {f"{k}_right": v.float().mean().item() for k, v in right.items()}
        report["right"] = (clean & right["colour"] & right["background"] & right["shape"]).float().mean().item()
    return report


class RandomConvFeatures(FeatureExtractorBase):
    """140 features of a fixed random convolutional network (seed 0): means over the four quarters of the picture, after three
    layers of 3x3 convolutions of stride 2, and the mean colours of the quarters. uint8 [N, 3, H, W] -> ([N, 140],)."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        self.filters = nn.ParameterList(
            nn.Parameter(torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i))**0.5, requires_grad=False)
            for i, o in ((3, 32), (32, 32), (32, 32)))

    @staticmethod
    def get_provided_features_list():
        """The one layer on offer."""
        return ("quarters",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        """The same layer for every metric."""
        return "quarters"

    @staticmethod
    def can_be_compiled():
        """No need."""
        return False

    def forward(self, input):
        """uint8 [N, 3, H, W] -> ([N, 140],)."""
        x = h = input.float() / 127.5 - 1
        for weight in self.filters:
            h = nn.functional.relu(nn.functional.conv2d(h, weight, stride=2, padding=1))
        quarters = [nn.functional.adaptive_avg_pool2d(v, 2).flatten(1) for v in (h, x)]
        return (torch.cat(quarters, 1),)


torch_fidelity.register_feature_extractor("random-conv", RandomConvFeatures)
FEATURES = {"random-conv": "random-conv", "inception": "inception-v3-compat"}


class Pictures(torch.utils.data.Dataset):
    """uint8 [N, 3, H, W] as torch-fidelity reads its input."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def distances(generated, reference, features="random-conv"):
    """Frechet distance, precision and recall (torch-fidelity, 3 neighbours) of uint8 pictures [N, 3, H, W] each.

    Raises UserError if the features' weights cannot be fetched.
    """
    try:
        metrics = torch_fidelity.calculate_metrics(
            input1=Pictures(generated), input2=Pictures(reference), fid=True, prc=True, feature_extractor=FEATURES[features],
            cuda=torch.cuda.is_available(), verbose=False, cache=False, save_cpu_ram=True)
    except OSError as error:
        raise UserError(f"--features {features}: its weights cannot be fetched ({error}); use --features random-conv")
    return dict(frechet=metrics["frechet_inception_distance"], precision=metrics["precision"], recall=metrics["recall"])


def take(dataset, num, seed=0):
    """num pictures of a dataset in the run's order: uint8 [num, 3, S, S]."""
    return torch.stack([dataset[i]["image"] for i in sample_order(dataset, seed, range(num))])


def evaluate(run=None, images=None, dataset=None, num=1000, nfe=1, seed=0, size=32, features="random-conv"):
    """The report of a run's samples, or of a folder of pictures read at size x size, as a dict; see the module's first lines."""
    if num < 5:
        raise UserError(f"--num {num}: a distance needs at least 5 pictures")
    if run:
        generator, schedule, config = yoso.load_generator(run)
        samples = yoso.draw_samples(generator, schedule, config, num, nfe, seed, "cpu")
        generated = ((samples / 2 + 0.5) * 255).round().to(torch.uint8)
        dataset = dataset or config.dataset
        source = dict(run=str(run), nfe=nfe, seed=seed)
    else:
        if not Path(images).is_dir():
            raise UserError(f"--images {images}: there is no such folder")
        folder = Folder(images, size)
        generated = take(folder, min(num, len(folder)))
        source = dict(images=str(images))
    size = generated.shape[-1]
    reference = Shapes(size, REFERENCE_SEED) if dataset == "shapes" else load_dataset(dataset, size)
    real = take(reference, num if reference.endless else min(num, len(reference)))
    report = dict(**source, dataset=str(dataset), num=len(generated), reference_num=len(real), features=features,
                  torch_fidelity=torch_fidelity.__version__, **distances(generated, real, features))
    if dataset == "shapes":
        report |= shapes_report(generated)
    return report


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", help="a run's folder: its samples are measured")
    parser.add_argument("--images", help="a folder of pictures to measure instead")
    parser.add_argument("--dataset", help="the reference: shapes, cifar10 or a folder (default: the run's own)")
    parser.add_argument("--num", type=int, default=1000, help="number of pictures on both sides")
    parser.add_argument("--nfe", type=int, default=1, help="network calls a sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    parser.add_argument("--size", type=int, default=32, help="with --images: pixels to which both sides are brought")
    parser.add_argument("--features", choices=list(FEATURES), default="random-conv", help="of the Frechet distance, precision, recall")
    parser.add_argument("--json", help="write the report to this file too")
    args = vars(parser.parse_args(argv))
    path = args.pop("json")
    if bool(args["run"]) == bool(args["images"]) or (args["images"] and not args["dataset"]):
        raise UserError("give --run RUN, or --images FOLDER with --dataset")
    text = json.dumps(evaluate(**args), indent=1)
    if path:
        Path(path).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run_command(main)
