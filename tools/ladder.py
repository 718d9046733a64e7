"""What fits in a GPU: the memory of one step of every method on SD 1.5, SD 2.1, PixArt-alpha and SDXL.

    python tools/ladder.py                          the table; some minutes, a gigabyte, no GPU
    python tools/ladder.py --processes 8            each of 8 GPUs that share the states by --shard
    python tools/ladder.py --arms "SDXL, Diff-Instruct*" --samples 1 2 4

The networks of the published configurations exist without numbers, as torch's fake tensors, and the methods'
own steps run on them (tools/forecast.py). Networks in bf16, weights, moments and averages in float32, as
--precision bf16 has it. What the allocator, the kernels and CUDA itself need comes on top.
"""

import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
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
from torch.utils._python_dispatch import _disable_current_modes
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
from common import Codec, Denoiser, NoiseSchedule, Scorer, UserError
from plumbing.cli import Parser, check_flags, check_writable, parse_config, run_command
from plumbing.files import write_text

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
    "PixArt 512, YOSO, all weights": ("yoso", ["--model", "pixart", "--discriminator", "sd15"]),
    "SD 2.1, SwiftBrush v2, student A": ("swiftbrush_v2", ["--model", "sd21", "--stage", "a"]),
    "SD 2.1, SwiftBrush v2, student B": ("swiftbrush_v2", ["--model", "sd21", "--stage", "b"]),
    "SDXL, Diff-Instruct*": ("diff_instruct_star", ["--model", "sdxl"]),
    "SDXL, Diff-Instruct*, LoRA assistant": (
        "diff_instruct_star", ["--model", "sdxl", "--assistant", "lora"]),
}
PRESET = dict(yoso="full", swiftbrush_v2="sd21", diff_instruct_star="sdxl")


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
    pipeline_class, network_class, config, encoders = BACKBONES[name]
    net = network_class(**config).eval().requires_grad_(False)
    vae = AutoencoderKL(**VAE, sample_size=8 * config["sample_size"]).eval().requires_grad_(False)
    text = [kind(settings(**values)).eval().requires_grad_(False) for kind, settings, values in encoders]
    schedule = NoiseSchedule.from_config(DDPMScheduler(**BETAS).config)
    return Denoiser(net, schedule, "epsilon"), EmptyCodec(pipeline_class, net, vae, text)


def empty_scorer(name, device):
    """What common.load_scorer gives for a published CLIPModel, without numbers."""
    model = CLIPModel(CLIPConfig(**PICTURE_CLIPS[name])).eval().requires_grad_(False)
    texts = lambda prompts: torch.empty(len(prompts), model.config.projection_dim)
    images = lambda x: model.get_image_features(pixel_values=x).pooler_output
    return Scorer(images, texts, 224, (0.5,) * 3, (0.5,) * 3, "cpu")


def empty_decoder(name, codec):
    """TAESD, without numbers; its default configuration is the published one."""
    tiny = AutoencoderTiny().eval().requires_grad_(False)
    return lambda x0: tiny.decode(x0).sample


def move(module, device=None, **kwargs):
    """Module.to for networks without numbers: they are where they should be, or go away, to "meta"."""
    if device == "meta":
        for part in module.modules():
            for name, p in part.named_parameters(recurse=False):
                gone = torch.empty(p.shape, device="meta")
                setattr(part, name, torch.nn.Parameter(gone, requires_grad=False))
    return module


def copied(tensor, memo):
    """Tensor.__deepcopy__ for fake tensors; torch's own would copy the mode that they belong to as well."""
    new = torch.empty_like(tensor)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    return memo.setdefault(id(tensor), new)


def raised(function):
    """The function in float32 under autocast, as on CUDA; on the CPU it would be in bf16."""
    def call(x, *args, **kwargs):
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)
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
        (torch.nn.Module, "to"): move, (torch.Tensor, "__deepcopy__"): copied,
        (plumbing.shard, "init_device_mesh"): init_device_mesh,
        (plumbing.run, "gathered"): lambda value: [value],  # the other processes do not exist
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


# The table

def memory_of(arm, samples, checkpointing, folder, processes=1):
    """(GB of one step of an arm on so many samples, GB of the states alone, TFLOP of the step).

    The states are weights, gradients, moments and averages. processes: of which each keeps its part of the
    states and has so many samples (--shard).
    """
    method, flags = ARMS[arm]
    script = forecast.SCRIPTS[f"{method}.py"]
    flags = [*flags, "--preset", PRESET[method], "--dataset", "shapes", "--batch-size", str(samples),
             "--precision", "bf16", "--device", "cpu", "--out", str(folder)]
    flags += ["--gradient-checkpointing"] * checkpointing + ["--shard"] * (processes > 1)
    config = parse_config(script.Config, script.PRESETS, flags, "")
    (_, config), = forecast.trainings_of(script, config)
    with forecast.processes_that_share(processes), empty_networks(script):
        run, networks, optimizers, step, iterations = forecast.step_of(script, config)
        trained = [plumbing.shard.part_here(p) for o in optimizers for group in o.param_groups
                   for p in group["params"]]
        # What is there, and for all that is trained a gradient and two moments.
        states = forecast.held_bytes(run.device) + 3 * sum(p.nbytes for p in trained)
        cost = forecast.cost_of_step(run, networks, optimizers, step, iterations)
    return cost["memory_GB"], states / 2**30, cost["TFLOP"]


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="default: all")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4],
                        help="samples at once on one GPU, --micro-batch")
    parser.add_argument("--processes", type=int, default=1,
                        help="GPUs that share the states by --shard; the figures are of each")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args(argv)
    check_flags(args, processes=dict(least=1), samples=dict(least=1, most=100_000))
    if args.json is not None:
        check_writable(args.json, "--json")
    if unknown := set(args.arms) - set(ARMS):
        raise UserError(f"--arms {unknown.pop()}: unknown; choose of {', '.join(ARMS)}")
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
