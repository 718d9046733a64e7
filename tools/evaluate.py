"""Measures pictures: Frechet distance, KID, precision, recall, CLIP and reward scores; drawn shapes are read
back exactly.

    python tools/evaluate.py --run runs/yoso --num 1000 --nfe 1       a run's one-step samples
    python tools/evaluate.py --model assets/mini-sd --steps 25 --guidance 2 --features assets/mini-clip
    python tools/evaluate.py --images FOLDER --dataset FOLDER         one folder of pictures against another

Writes one JSON object (--json FILE, and stdout) that states its protocol. Pictures are measured chunk by
chunk as they are made, so 30,000 of them need no memory; --save FOLDER keeps them as a captioned folder. The
distances are torch-fidelity's, on features named in the output: `random-conv` (RandomConvFeatures below: no
download, sensitive to colours, edges and their layout; its values compare runs of this project with one
another and are no Inception FID), `inception` where its weights can be fetched, or the image embeddings (unit
vectors) of any CLIPModel, by its directory or hub id.
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
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import yoso
from common import Draws, InformativePrior, UserError, ddim_sample, load, load_scorer
from plumbing.cli import SEED, Parser, check_flag, check_writable, read_json, run_command
from plumbing.data import Folder, load_dataset, load_prompts, sample_order, to_floats
from plumbing.files import write_text
from plumbing.grids import save_pictures
from plumbing.run import choose_device
from plumbing.shapes import BACKGROUNDS, COLOURS, HALF, SHAPES, SIZES, coverage

# The largest share of a shape's contrast that the best drawing may leave unexplained. Measured on real
# drawings of 16 x 16: the best triangle for a disc or square leaves 0.21 or more, the best square for a disc
# 0.06 to 0.08. So CLEAN (one shape of one colour on one background) keeps triangles apart from the rest,
# SHARP allows outlines half as wrong, and whether a SHARP picture is a disc or a square hangs on its corners.
CLEAN, SHARP = 0.2, 0.1
REFERENCE_SEED = 10_000  # the reference drawings: a seed that no run uses by default
PROMPT_SEED = 30_000  # the drawings whose captions a text-to-image model is asked for
CHUNK = 250  # pictures of 32 x 32 at once; fewer of larger ones
FEWEST = 5  # pictures that have a distance: precision and recall look at 3 neighbours


def read_shapes(images):
    """The drawing that fits each picture best in the least-squares sense, over all of Shapes' drawing rules.

    images: uint8 [N, 3, S, S]. Returns a dict of tensors [N]: colour, background, shape, scale (indices),
    radius, x, y (picture units), error: ||picture - drawing||^2 / ||drawing - its background||^2, so 0 for a
    perfect drawing, about 1 where the shape is missing; and frame [N, 3], the median colour of the outermost
    pixels, in [0, 1]. Places are searched on a half-pixel grid and five radii, then refined for each shape.
    """
    parts = [_read_chunk(chunk) for chunk in images.split(32)]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def _read_chunk(images):
    n, _, size, _ = images.shape
    images = images.float() / 255
    colours, backgrounds = torch.tensor(list(COLOURS.values())), torch.tensor(list(BACKGROUNDS.values()))
    contrast = colours[:, None] - backgrounds[None]  # [colours, backgrounds, 3]
    over_background = images[:, None] - backgrounds[None, :, :, None, None]  # [N, backgrounds, 3, S, S]
    empty = over_background.square().sum((2, 3, 4))[:, None]  # of the background alone, [N, 1, b]
    correlated = torch.einsum("cbk,nbkhw->ncbhw", contrast, over_background).flatten(3)  # [N, c, b, S * S]
    correlated = correlated.contiguous()  # or the product below takes ten times as long
    energy = contrast.square().sum(2)[None]  # [1, c, b]

    candidates = []
    for shape in range(len(SHAPES)):
        radius, x, y = _places(shape, size)
        masks = coverage(torch.full((len(x),), shape), radius, x, y, size).flatten(1)  # [places, S * S]
        error = empty[..., None] - 2 * correlated @ masks.T + energy[..., None] * masks.square().sum(1)
        best = error.flatten(1).argmin(1)
        place, palette = best % len(x), best // len(x)
        colour, background = palette // len(backgrounds), palette % len(backgrounds)
        refined = _refine(images, colours[colour], backgrounds[background], shape, radius[place], x[place],
                          y[place])
        candidates.append(refined | dict(colour=colour, background=background, shape=torch.full((n,), shape)))
    winner = torch.stack([c["residual"] for c in candidates]).argmin(0)
    chosen = {k: torch.stack([c[k] for c in candidates])[winner, torch.arange(n)] for k in candidates[0]}
    chosen["scale"] = (chosen["radius"] > (SIZES["small"][1] + SIZES["large"][0]) / 2).long()
    chosen["error"] = chosen.pop("residual") / chosen.pop("shape_energy")
    frame = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2)
    return chosen | dict(frame=frame.median(2).values)


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
    residual, energy = (v.gather(1, best)[:, 0] for v in (residual, energy))
    return dict(radius=radius, x=x, y=y, residual=residual, shape_energy=energy)


def shapes_report(images, wanted=None):
    """Share of clean and of sharp pictures; which combinations of colour, shape, background the clean show.

    images: uint8 [N, 3, S, S]. wanted: attributes as Shapes.attributes gives them; then also the share of
    pictures that are clean and have the wanted colour, background, shape and size together, each attribute's
    own share, and how far the frame is from the wanted background's colour (0 to 1, mean over the channels).
    """
    return report_of(read_shapes(images), wanted)


def report_of(read, wanted=None):
    """shapes_report of drawings that read_shapes has read."""
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
        report["right"] = torch.stack([clean, *right.values()]).all(0).float().mean().item()
        asked = torch.tensor(list(BACKGROUNDS.values()))[wanted["background"]]
        report["background_error"] = (read["frame"] - asked).abs().mean().item()
    return report


class RandomConvFeatures(FeatureExtractorBase):
    """140 features of a fixed random convolutional network (seed 0): means over the four quarters of the
    picture, after three layers of 3x3 convolutions of stride 2, and the mean colours of the quarters.
    """

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        weights = (torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i))**0.5
                   for i, o in ((3, 32), (32, 32), (32, 32)))
        self.filters = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)

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
        x = h = to_floats(input)
        for weight in self.filters:
            h = nn.functional.relu(nn.functional.conv2d(h, weight, stride=2, padding=1))
        quarters = [nn.functional.adaptive_avg_pool2d(v, 2).flatten(1) for v in (h, x)]
        return (torch.cat(quarters, 1),)


torch_fidelity.register_feature_extractor("random-conv", RandomConvFeatures)
FEATURES = {"random-conv": ("random-conv", "quarters"), "inception": ("inception-v3-compat", "2048")}


def load_features(name, device="cpu"):
    """"random-conv", "inception" or a CLIPModel -> a function of uint8 pictures [N, 3, H, W] to features.

    Features [N, D] on the CPU. Raises UserError if the weights cannot be had.
    """
    if name in FEATURES:
        extractor, layer = FEATURES[name]
        try:
            network = create_feature_extractor(extractor, [layer], cuda=False, verbose=False).to(device)
        except OSError as error:
            raise UserError(f"--features {name}: its weights cannot be fetched ({error}); "
                            "use --features random-conv")
        return torch.no_grad()(lambda images: network(images.to(device))[0].cpu().float())
    scorer = load_scorer(name, device)
    return torch.no_grad()(lambda images: scorer.images(to_floats(images).to(device)).cpu())


def to_uint8(pictures):
    """[-1, 1] -> uint8, clamped and rounded."""
    return ((pictures.float().clamp(-1, 1) / 2 + 0.5) * 255).round().to(torch.uint8).cpu()


def distances(generated, reference):
    """Frechet distance, KID (mean of 100 subsets of 1,000, or of all), precision and recall (3 neighbours).

    Features [N, D] of the generated and [M, D] of the reference pictures.
    """
    statistics = [fid_features_to_statistics(f.double()) for f in (generated, reference)]
    subset = min(1000, len(generated), len(reference))
    kid = kid_features_to_metric(generated, reference, kid_subsets=100 if subset == 1000 else 1,
                                 kid_subset_size=subset, verbose=False)
    prc = prc_features_to_metric(generated, reference, save_cpu_ram=True, verbose=False)
    return dict(frechet=fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
                kid=kid["kernel_inception_distance_mean"], precision=prc["precision"], recall=prc["recall"])


# Sources of pictures: each yields (uint8 pictures [n, 3, S, S], their captions)

def dataset_chunks(dataset, num, seed=0):
    """num pictures of a dataset in the run's order, less the unreadable ones, which are named on stderr."""
    order, skipped = sample_order(dataset, seed, range(num)), set()
    for first in range(0, num, CHUNK):
        samples = [dataset[i] for i in order[first:first + CHUNK]]
        for name in sorted({name for s in samples for name in s["skipped"]} - skipped):
            skipped.add(name)
            print(f"left out, cannot be read as a picture: {name}", file=sys.stderr)
        # In the place of an unreadable picture the dataset gives the next one, a second time.
        samples = [s for s in samples if not s["skipped"]]
        if samples:
            yield torch.stack([s["image"] for s in samples]), [s["caption"] for s in samples]


def few_step_chunks(sampler, prompts, nfe, seed):
    """Pictures of a yoso.Sampler for the prompts with nfe network calls: predict, add noise, predict."""
    texts = iter(prompts)
    for pictures in yoso.draw_pictures(sampler, prompts, nfe, seed):
        yield to_uint8(pictures), [next(texts) for _ in pictures]


@torch.no_grad()
def many_step_chunks(denoiser, codec, prompts, steps, guidance, seed):
    """A pipeline's pictures for the prompts: DDIM with `steps` steps."""
    chunk = max(1, min(CHUNK, CHUNK * 32**2 // codec.picture_size**2))
    for first in range(0, len(prompts), chunk):
        captions = prompts[first:first + chunk]
        draw = Draws(seed, first, len(captions), slice(None), "cpu")  # the same pictures on any device
        x_T = draw.randn(*codec.shape).to(codec.device)
        null = codec.null(len(captions)) if guidance != 1 else None
        x0 = ddim_sample(denoiser, x_T, steps, codec.cond(captions), null, guidance)
        yield to_uint8(codec.decode(x0)), captions


def measure(chunks, num, embed, scorers, with_shapes, save=None, title="pictures"):
    """Goes once over chunks of pictures; embed: {name: function of uint8 pictures}, scorers: {name: Scorer}.

    save: a folder for them. Returns ({name: features [N, D]}, {scorer's name: mean score}, what read_shapes
    read or None).
    """
    features, scores, read, count = {name: [] for name in embed}, {name: 0.0 for name in scorers}, [], 0
    with tqdm(total=num, desc=title, disable=not sys.stderr.isatty()) as bar:
        for images, captions in chunks:
            for name, function in embed.items():
                features[name].append(function(images))
            for name, scorer in scorers.items():
                with torch.no_grad():
                    values = scorer(to_floats(images).to(scorer.device), scorer.texts(captions))
                scores[name] += values.sum().item()
            if with_shapes:
                read.append(read_shapes(images))
            if save:
                save_pictures(save, images, captions, count)
            count += len(images)
            bar.update(len(images))
    enough(title, count)
    features = {name: torch.cat(chunks) for name, chunks in features.items()}
    scores = {name: score / count for name, score in scores.items()}
    return features, scores, {k: torch.cat([r[k] for r in read]) for k in read[0]} if read else None


def enough(source, number):
    """The number of pictures. Raises UserError if they are too few for a distance."""
    if number < FEWEST:
        raise UserError(f"{source}: too few pictures ({number}), a distance needs at least {FEWEST}")
    return number


def is_from_scratch(run):
    """Whether a run is of yoso.py without --model, of which the checkpoint is sampled, not a pipeline."""
    config = Path(run) / "config.json"
    return config.exists() and not read_json(config).get("model")


def dataset_of(run):
    """The --dataset of a run that leaves a pipeline; None of one that had --prompts in its place."""
    # SwiftBrush v2 has one in the folder of each stage.
    configs = [Path(run) / stage / "config.json" for stage in ("", "a")]
    config = next((read_json(path) for path in configs if path.exists()), {})
    return None if config.get("prompts") else config.get("dataset")


def asked_for(dataset, prompts, codec, num):
    """(num prompts of a file or a dataset, the attributes that those of shapes ask for, else None)."""
    if prompts:
        texts = load_prompts(prompts)
        codec.warn_of_long(texts)
        return [texts[i % len(texts)] for i in range(num)], None
    asked = load_dataset(dataset, codec.picture_size, PROMPT_SEED)
    if dataset in ("shapes", "shapes-rolled"):  # read_shapes knows pictures of one shape
        attributes = asked.attributes(range(num))
        return asked.captions(attributes), asked.shown(attributes)
    return [text for _, captions in dataset_chunks(asked, num, PROMPT_SEED) for text in captions], None


def evaluate(run=None, model=None, images=None, dataset=None, prompts=None, lora="", num=1000, nfe=None,
             steps=25, guidance=1.0, prior=True, seed=0, size=32, features="random-conv", clip=None,
             reward=None, judge=None, save=None, device="auto"):
    """The report, as a dict; the arguments are the command's flags."""
    if images and not Path(images).is_dir():
        raise UserError(f"--images {images}: there is no such folder")
    if save and Path(save).exists():
        raise UserError(f"--save {save}: exists already; choose a new folder")
    device, wanted = choose_device(device), None
    embed = {prefix: load_features(name, device)
             for prefix, name in (("", features), ("judge_", judge)) if name}
    scorers = {name: load_scorer(path, device)
               for name, path in (("clip", clip), ("reward", reward), ("judge", judge)) if path}
    if run and (Path(run) / "pipeline" / "model_index.json").exists() and not is_from_scratch(run):
        dataset = dataset or dataset_of(run)
        run, model, nfe = None, Path(run) / "pipeline", nfe or 1
    if run:
        if prompts or lora:
            raise UserError(f"--prompts, --lora: {run} is a run from scratch; leave them out")
        nfe = nfe or 1
        sampler, config = yoso.load_sampler(run, device)
        yoso.sampling_levels(len(sampler.generator.schedule) - 1, nfe)
        dataset, size = dataset or config.dataset, config.image_size
        chunks = few_step_chunks(sampler, [""] * num, nfe, seed)
        source = dict(run=str(run), nfe=nfe, seed=seed)
    elif model:
        denoiser, codec = load(model, device, lora)
        if guidance != 1 and not codec.guided:
            raise UserError(f"--guidance {guidance}: {model} has no condition; use --guidance 1")
        if prompts and not codec.guided:
            raise UserError(f"--prompts {prompts}: {model} has no condition; leave them out")
        size = codec.picture_size
        if not dataset and size > 64:
            raise UserError(f"--model {model}: draws {size} x {size} pixels; give --dataset FOLDER of real "
                            "pictures to compare with")
        dataset = dataset or "shapes"
        texts, wanted = asked_for(dataset, prompts, codec, num)
        source = dict(model=str(model), seed=seed,
                      prompts=str(prompts) if prompts else f"captions of {dataset}, seed {PROMPT_SEED}")
        if nfe:
            yoso.sampling_levels(len(denoiser.schedule) - 1, nfe)
            start = InformativePrior.read(model, device) if prior else None
            chunks = few_step_chunks(yoso.Sampler(denoiser, codec, start), texts, nfe, seed)
            source |= dict(steps=nfe, sampler="predict and renoise", informative_prior=start is not None)
        else:
            chunks = many_step_chunks(denoiser, codec, texts, steps, guidance, seed)
            source |= dict(steps=steps, sampler="ddim", guidance=guidance)
    else:
        folder = Folder(images, size)
        num = enough(f"--images {images}", min(num, len(folder)))
        chunks, source = dataset_chunks(folder, num), dict(images=str(images))
    reference = load_dataset(dataset, size, REFERENCE_SEED)
    reference_num = num if reference.endless else min(num, len(reference))
    enough(f"--dataset {dataset}", reference_num)
    generated, scores, read = measure(chunks, num, embed, scorers, reference.endless, save and Path(save),
                                      f"--images {images}" if images else "generated")
    real, _, _ = measure(dataset_chunks(reference, reference_num), reference_num, embed, {}, False, None,
                         f"--dataset {dataset}")
    num, reference_num = len(generated[""]), len(real[""])
    order = "first pictures in the order of seed 0"
    if reference.endless:
        order = f"{dataset}, seed {REFERENCE_SEED}"
    report = dict(**source, dataset=str(dataset), size=size, num=num, reference_num=reference_num,
                  reference=order, features=str(features), torch_fidelity=torch_fidelity.__version__)
    for prefix in embed:
        report |= {prefix + name: v for name, v in distances(generated[prefix], real[prefix]).items()}
    report |= {f"{name}_score": score for name, score in scores.items()}
    return report | (report_of(read, wanted) if read else {})


def main(argv):
    """The command line."""
    # Flags that are not given stay out: evaluate() has their defaults.
    parser = Parser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--run", help="a run: its samples with --nfe network calls are measured")
    parser.add_argument("--model", help="a pipeline (directory or hub id): its pictures are measured")
    parser.add_argument("--images", help="a folder of pictures to measure")
    parser.add_argument("--dataset", help="the reference: shapes, shapes-rolled, cifar10 or a folder "
                        "(default: the run's own, or shapes)")
    parser.add_argument("--prompts",
                        help="with --model: a file of prompts, instead of the dataset's captions")
    parser.add_argument("--lora", help="with --model: LoRA weights on top")
    parser.add_argument("--num", type=int, help="number of pictures on both sides")
    parser.add_argument("--nfe", type=int, help="network calls a sample of a one-step model (1 with --run); "
                        "with --model instead of --steps")
    parser.add_argument("--prior", action=argparse.BooleanOptionalAction,
                        help="with --nfe: start from the informative prior where the pipeline has one")
    parser.add_argument("--steps", type=int, help="with --model: DDIM steps")
    parser.add_argument("--guidance", type=float, help="with --model: guidance scale, 1: none")
    parser.add_argument("--seed", type=int, help="of the sampling noise")
    parser.add_argument("--size", type=int,
                        help="with --images: pixels to which both sides are brought")
    parser.add_argument("--features",
                        help="random-conv, inception, or a CLIPModel's directory or hub id")
    parser.add_argument("--clip", help="also the mean CLIP score (cosine) of this CLIPModel: clip, directory "
                        "or hub id")
    parser.add_argument("--reward", help="also the mean score of this reward: pickscore, hps, directory or "
                        "hub id")
    parser.add_argument("--judge", help="a CLIPModel that the model did not optimise: distances in its "
                        "features too, and its score")
    parser.add_argument("--save", help="a new folder to which the pictures and their captions are written")
    parser.add_argument("--device", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", help="write the report to this file too")
    args = vars(parser.parse_args(argv))
    limits = dict(num=dict(least=FEWEST, most=10**6), nfe=dict(least=1), steps=dict(least=1),
                  guidance=dict(least=0), seed=SEED, size=dict(least=1, most=4096))
    for name, value in args.items():
        check_flag(name, value, limits.get(name, dict(needed=True)))
    sources = args.keys() & {"run", "model", "images"}
    if len(sources) != 1 or sources == {"images"} and "dataset" not in args:
        raise UserError("give one of --run RUN, --model PIPELINE, or --images FOLDER with --dataset")
    idle = dict.fromkeys(("prompts", "lora", "nfe", "prior", "seed"), ["images"])  # beside which flags
    idle |= dict(steps=["images", "run", "nfe"], guidance=["images", "run", "nfe"], size=["run", "model"])
    for name, others in idle.items():
        for other in others:
            if name in args and other in args:
                raise UserError(f"--{name}: means nothing beside --{other}; leave it out")
    path = args.pop("json", None)
    if path:
        check_writable(path, "--json")
    if "save" in args and not Path(args["save"]).exists():
        check_writable(args["save"], "--save", deep=True)
    text = json.dumps(evaluate(**args), indent=1)
    print(text)
    if path:
        write_text(path, text)


if __name__ == "__main__":
    run_command(main)
