"""What the three methods share; nothing here belongs to one of them.

One convention everywhere: x_t = alpha_t x0 + sigma_t eps, with alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alpha_t^2).
x0 is a picture in [-1, 1] or a latent, [B, C, H, W]; t is an integer tensor [B]; coefficients come as [B, 1, 1, 1].

Sections: command line, noise schedule, denoiser, pretrained models, LoRA, sharding, scorers, EMA, data, distances,
forecast, run, one-step students.
"""

import argparse
import copy
import dataclasses
import gc
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm


# Command line

class UserError(Exception):
    """Wrong input, told in one plain line: the flag or file, what is wrong, what to do."""


def flag(default, help):
    """A dataclass field whose help text is also its comment in the source."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_config(config_class, presets, argv, description, preset_of=None):
    """argv -> config_class: every field is a flag (image_size -> --image-size), presets[--preset] gives the defaults.

    --preset defaults to preset_of(the flags given), else to the value of --dataset where a preset has that name, else to its own.
    Raises UserError on an unknown preset; argparse itself ends with exit code 2 on an unknown flag.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for field in dataclasses.fields(config_class):
        kind = dict(type=field.type)
        if field.type is tuple:
            kind = dict(type=type(field.default[0]), nargs="+")
        elif field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        # SUPPRESS keeps absent flags out of the namespace, so that they can fall back to the preset.
        text = f"{field.metadata['help'].replace('%', '%%')} (if no preset says otherwise: {field.default})"
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    dataset = given.get("dataset", config_class.dataset)
    usual = preset_of(given) if preset_of else dataset if dataset in presets else config_class.preset
    preset = given.get("preset", usual)
    if preset not in presets:
        raise UserError(f"--preset {preset}: unknown; choose one of {', '.join(presets)}")
    return config_class(**{**presets[preset], **given, "preset": preset})


def run_command(main):
    """Calls main(argv); a UserError becomes one line on stderr (from one process a machine) and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# Noise schedule

# The entries of a diffusers scheduler config that say what the noise levels are.
BETA_NAMES = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def ddgan_betas(levels=4, beta_min=0.1, beta_max=20.0, eps=1e-3):
    """The few-level VP schedule of DDGAN (Xiao et al., 2022), which YOSO uses from scratch: levels + 1 betas.

    Level 0 is clean data (its beta is 1e-8, as in DDGAN), level `levels` almost pure noise.
    """
    tau = np.linspace(0, 1, levels + 1) * (1 - eps) + eps
    alphas_cumprod = np.exp(-tau**2 * (beta_max - beta_min) / 2 - tau * beta_min)
    return [1e-8, *(1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).tolist()]


def broadcast(values, t, like):
    """values[t] as [B, 1, 1, 1], beside a tensor `like` [B, C, H, W]."""
    return values[t].view(-1, *[1] * (like.ndim - 1))


class NoiseSchedule:
    """alpha_t and sigma_t of x_t = alpha_t x0 + sigma_t eps, as float32 tables over the T timesteps.

    A checkpoint's schedule is fully described by its diffusers scheduler config (betas, trained_betas, beta_schedule,
    rescale_betas_zero_snr), so that config is the only way in.
    """

    def __init__(self, alphas_cumprod):
        alphas_cumprod = alphas_cumprod.double()
        self.alpha = alphas_cumprod.sqrt().float()  # [T]
        self.sigma = (1 - alphas_cumprod).sqrt().float()  # [T]

    @classmethod
    def from_config(cls, config):
        """config: a diffusers scheduler config (a dict or a scheduler's .config), of which only the betas matter."""
        from diffusers import DDPMScheduler
        return cls(DDPMScheduler(**{name: config[name] for name in BETA_NAMES if name in config}).alphas_cumprod)

    def __len__(self):
        return len(self.alpha)

    def to(self, device):
        """Moves the tables to `device`, in place."""
        self.alpha, self.sigma = self.alpha.to(device), self.sigma.to(device)
        return self

    def zero_terminal_snr(self):
        """The schedule rescaled to SNR_T = 0 (Lin et al., 2023, Algorithm 1): alpha_0 kept, alpha_T = 0."""
        alpha = self.alpha.double()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return NoiseSchedule(alpha**2).to(self.alpha.device)

    def up_to(self, timestep):
        """The schedule's timesteps 0..timestep: a one-step student starts at the last one."""
        return NoiseSchedule(self.alpha[:timestep + 1].double()**2).to(self.alpha.device)

    def snr(self, t):
        """SNR(t) = alpha_t^2 / sigma_t^2, [B]; infinite at a level without noise."""
        return (self.alpha[t] / self.sigma[t])**2

    def add_noise(self, x0, eps, t):
        """x_t = alpha_t x0 + sigma_t eps."""
        return broadcast(self.alpha, t, x0) * x0 + broadcast(self.sigma, t, x0) * eps

    def convert(self, prediction, x_t, t, source, target):
        """One prediction type into another, in float32. Types: "sample" (x0), "epsilon", "v_prediction", "score".

        v = alpha eps - sigma x0; score = -eps / sigma. An error in epsilon grows by sigma/alpha in x0 (14.6 at SD's last
        timestep, 157 at PixArt's), and x0 from epsilon is not defined where alpha = 0. Raises ValueError on an unknown type.
        """
        prediction, x_t = prediction.float(), x_t.float()
        if source == target:
            return prediction
        alpha, sigma = broadcast(self.alpha, t, x_t), broadcast(self.sigma, t, x_t)
        match source:
            case "sample":
                x0, eps = prediction, (x_t - alpha * prediction) / sigma
            case "epsilon":
                x0, eps = (x_t - sigma * prediction) / alpha, prediction
            case "v_prediction":
                x0, eps = alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction
            case _:
                raise ValueError(f"unknown prediction type {source}")
        match target:
            case "sample":
                return x0
            case "epsilon":
                return eps
            case "v_prediction":
                return alpha * eps - sigma * x0
            case "score":
                return -eps / sigma
        raise ValueError(f"unknown prediction type {target}")


# Denoiser

class Denoiser:
    """A diffusers network, its schedule and what it predicts, seen as one function of (x_t, t, condition).

    net: UNet2DModel, UNet2DConditionModel or PixArtTransformer2DModel; the condition is a dict of the network's own keyword
    arguments, so that one call serves them all. adapter: the LoRA that is on in this denoiser's calls, of those that add_lora
    gave to the net, or None for the bare weights: several denoisers can share one net.
    """

    def __init__(self, net, schedule, prediction_type, adapter=None):
        self.net, self.schedule, self.prediction_type, self.adapter = net, schedule, prediction_type, adapter

    def predict(self, x_t, t, target="sample", cond=None, null=None, guidance_scale=1.0):
        """The prediction as `target` ("sample", "epsilon", "v_prediction" or "score"), [B, C, H, W].

        Classifier-free guidance: null + guidance_scale (cond - null); the number 1 calls the network once, without null.
        guidance_scale: a number, or [B, 1, 1, 1].
        """
        output = self._forward(x_t, t, cond)
        if torch.is_tensor(guidance_scale) or guidance_scale != 1.0:
            unconditional = self._forward(x_t, t, null)
            output = unconditional + guidance_scale * (output - unconditional)
        return self.schedule.convert(output, x_t, t, self.prediction_type, target)

    def _forward(self, x_t, t, cond):
        with use_lora(self.net, self.adapter):
            # Networks with learned sigma (PixArt) return 2C channels, of which the first C are the prediction.
            return self.net(x_t, timestep=t, **(cond or {})).sample[:, :x_t.shape[1]].float()


@torch.no_grad()
def ddim_sample(denoiser, x_T, steps, cond=None, null=None, guidance_scale=1.0):
    """Deterministic DDIM from x_T [B, C, H, W] to x0 in `steps` steps, spaced like diffusers' "trailing", ending at alpha = 1.

    With one step it is the one-step prediction at the last timestep.
    """
    schedule, T = denoiser.schedule, len(denoiser.schedule)
    timesteps = [round(T - i * T / steps) - 1 for i in range(steps)]
    x_t = x_T
    for i, timestep in enumerate(timesteps):
        t = torch.full((len(x_t),), timestep, device=x_t.device)
        # x0 first: where alpha_T = 0 it cannot be had from eps.
        x0 = denoiser.predict(x_t, t, "sample", cond, null, guidance_scale)
        eps = schedule.convert(x0, x_t, t, "sample", "epsilon")
        x_t = schedule.add_noise(x0, eps, torch.full_like(t, timesteps[i + 1])) if i + 1 < steps else x0
    return x_t


class InformativePrior:
    """Informative prior initialisation (YOSO, section 5.2): the start of sampling where SNR_T is not zero.

    x_T = alpha_T (mean + std eps') + sigma_T eps has the first two moments of the x_T that training saw.
    mean [C, H, W] and std [C, 1, 1] of the data x0 (pictures or latents).
    """

    FILE = "informative_prior.safetensors"

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    @classmethod
    def of(cls, x0):
        """Estimated from data [N, C, H, W]: mean per element, standard deviation around it per channel."""
        mean = x0.mean(0)
        return cls(mean, (x0 - mean).square().mean((0, 2, 3)).sqrt().view(-1, 1, 1))

    def start(self, schedule, eps, eps_prime):
        """x_T [B, C, H, W] from two standard normal draws of that shape."""
        return schedule.alpha[-1] * (self.mean + self.std * eps_prime) + schedule.sigma[-1] * eps

    def save(self, folder):
        """Writes folder/informative_prior.safetensors."""
        save_file(dict(mean=self.mean.cpu().contiguous(), std=self.std.cpu().contiguous()), Path(folder) / self.FILE)

    @classmethod
    def read(cls, folder, device="cpu"):
        """What save() wrote into the folder, or None if there is none."""
        path = Path(folder) / cls.FILE
        return cls(**load_file(path, str(device))) if path.is_file() else None


# Pretrained models

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtAlphaPipeline", "DDPMPipeline", "DDIMPipeline")


def load(path_or_id, device="cpu", lora=""):
    """A pretrained diffusers pipeline, from a directory or the hub -> (Denoiser, Codec), float32, frozen, in eval mode.

    SD 1.5, 2.1, SDXL, PixArt-alpha, this project's exports, or a UNet2DModel in pixel space (`google/ddpm-cifar10-32`; with
    classes, their names lie beside it in classes.json). lora: directory or file of LoRA weights that are merged into the network.
    Raises UserError if it cannot be loaded or is of another class.
    """
    import diffusers
    import transformers
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    local = Path(path_or_id).is_dir()
    if not local and (Path(path_or_id).exists() or str(path_or_id).count("/") != 1 or str(path_or_id).startswith((".", "/"))):
        raise UserError(f"{path_or_id}: there is no such directory")
    if local and not (Path(path_or_id) / "model_index.json").is_file():
        raise UserError(f"{path_or_id}: not a diffusers pipeline, it has no model_index.json; give the directory that holds one")
    try:
        index = diffusers.DiffusionPipeline.load_config(path_or_id)
        name = index["_class_name"]
        if name not in PIPELINES:
            raise UserError(f"{path_or_id}: a {name}, which is not supported; give one of {', '.join(PIPELINES)}")
        parts = [part for part, source in index.items() if isinstance(source, list) and source[0] and part != "safety_checker"]
        missing = [part for part in parts if not (Path(path_or_id) / part).is_dir()]
        if local and missing and name not in ("DDPMPipeline", "DDIMPipeline"):  # google/ddpm-cifar10-32 has no folders
            raise UserError(f"{path_or_id}: a part is missing, the folder {missing[0]}/")
        # The safety checker is a network of its own that training has no use for.
        extra = dict(safety_checker=None, requires_safety_checker=False) if name == "StableDiffusionPipeline" else {}
        pipe = getattr(diffusers, name).from_pretrained(path_or_id, dtype=torch.float32, **extra)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if local:
            raise UserError(f"{path_or_id}: cannot be loaded, a part is missing or damaged ({reason})")
        raise UserError(f"{path_or_id}: neither a local directory nor to be had from the Hugging Face hub ({reason}); "
                        "a local directory works without a network")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()  # from here on; the Codec warns of long prompts itself, once
    if hasattr(pipe, "text_encoder") and len(pipe.tokenizer) < pipe.text_encoder.config.vocab_size // 2:
        raise UserError(f"{path_or_id}: a part is missing or damaged, its tokenizer knows only {len(pipe.tokenizer)} tokens")
    if lora:
        merge_lora_file(pipe, lora)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).eval().requires_grad_(False)
    net = getattr(pipe, "transformer", None) or pipe.unet
    schedule = NoiseSchedule.from_config(pipe.scheduler.config).to(device)
    classes = Path(path_or_id) / "classes.json"
    return (Denoiser(net, schedule, pipe.scheduler.config.get("prediction_type", "epsilon")),
            Codec(pipe, json.loads(classes.read_text()) if classes.is_file() else None))


class Codec:
    """What surrounds a network: prompts -> its condition, pictures <-> its x0.

    pipe: the pipeline (its parts are used: tokenizers, text encoders, VAE). x0 has the shape [B, *self.shape]: latents, or
    the pictures themselves for a pixel-space model, whose condition is the class that a prompt names, or nothing.
    Pictures are [B, 3, H, W] in [-1, 1]; conditions are dicts of the network's keyword arguments.
    """

    def __init__(self, pipe, classes=None):
        self.pipe, self.classes, self.name = pipe, classes, type(pipe).__name__
        net = getattr(pipe, "transformer", None) or pipe.unet
        self.shape = (net.config.in_channels, net.config.sample_size, net.config.sample_size)
        self.vae = getattr(pipe, "vae", None)
        self.picture_size = self.shape[-1] * (pipe.vae_scale_factor if self.vae is not None else 1)
        self.guided = self.name not in ("DDPMPipeline", "DDIMPipeline") or net.config.num_class_embeds is not None
        if self.vae is None and self.guided and classes is None:
            # A published class-conditional network without names: prompts name the class by its number; the last is "none".
            self.classes = [str(i) for i in range(net.config.num_class_embeds - 1)]
        self.has_null = self.guided and (self.vae is not None or net.config.num_class_embeds > len(self.classes))
        self.device = next(net.parameters()).device
        self.cache = None  # see cache_conditions

    @torch.no_grad()
    def cond(self, prompts):
        """Prompts -> the condition, batch B. Raises UserError if a prompt names no class of a class-conditional model."""
        if self.cache:
            return self.cache(prompts)
        arguments = dict(device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        match self.name:
            case "StableDiffusionPipeline":
                return dict(encoder_hidden_states=self.pipe.encode_prompt(prompts, **arguments)[0])
            case "StableDiffusionXLPipeline":
                embeddings, _, pooled, _ = self.pipe.encode_prompt(prompts, **arguments)
                pixels = self.picture_size
                # Micro-conditioning: original size, crop corner, target size.
                time_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=pooled.dtype, device=self.device)
                added = dict(text_embeds=pooled, time_ids=time_ids.expand(len(prompts), -1))
                return dict(encoder_hidden_states=embeddings, added_cond_kwargs=added)
            case "PixArtAlphaPipeline":
                embeddings, mask, _, _ = self.pipe.encode_prompt(prompts, max_sequence_length=self._max_tokens(), **arguments)
                resolution = aspect_ratio = None
                if self.pipe.transformer.config.sample_size == 128:  # the 1024-pixel model is told its size
                    resolution = torch.full((len(prompts), 2), float(self.picture_size), device=self.device)
                    aspect_ratio = torch.ones(len(prompts), 1, device=self.device)
                return dict(encoder_hidden_states=embeddings, encoder_attention_mask=mask,
                            added_cond_kwargs=dict(resolution=resolution, aspect_ratio=aspect_ratio))
        return dict(class_labels=class_labels(prompts, self.classes).to(self.device)) if self.guided else {}

    @torch.no_grad()
    def null(self, n):
        """The empty condition of guidance for a batch of n: the empty prompt, SDXL's zero embeddings, the class "none"."""
        if self.vae is None:
            return dict(class_labels=torch.full((n,), len(self.classes), device=self.device)) if self.guided else {}
        null = self.cond([""])
        if self.pipe.config.get("force_zeros_for_empty_prompt", False):
            null["encoder_hidden_states"] = torch.zeros_like(null["encoder_hidden_states"])
            null["added_cond_kwargs"]["text_embeds"] = torch.zeros_like(null["added_cond_kwargs"]["text_embeds"])
        return map_cond(lambda v: v.expand(n, *v.shape[1:]), null)

    def encode(self, images, noise=None):
        """Pictures -> x0 [B, *shape]; noise [B, *shape] draws from the VAE's posterior, without it its mean; x0 stays what it is."""
        if self.vae is None or images.shape[1:] == self.shape:
            return images
        output = self.vae.encode(images)
        if hasattr(output, "latents"):  # AutoencoderTiny
            return output.latents * self.vae.config.scaling_factor
        posterior = output.latent_dist
        return (posterior.mean if noise is None else posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    def decode(self, x0):
        """x0 -> pictures, with the gradient."""
        return x0 if self.vae is None else self.vae.decode(x0 / self.vae.config.scaling_factor).sample

    def _max_tokens(self):
        return 120 if self.pipe.tokenizer.model_max_length > 120 else self.pipe.tokenizer.model_max_length

    def warn_of_long(self, prompts):
        """One line on stderr if prompts are longer than the text encoder takes; they are cut. Of many, some thousands are looked at."""
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if tokenizer is None:
            return
        limit, shown = self._max_tokens(), list(prompts)[::max(1, len(prompts) // 2000)]
        long = sum(len(ids) > limit for ids in tokenizer(shown).input_ids)
        if long and int(os.environ.get("RANK", 0)) == 0:
            print(f"{long} of {len(shown)} prompts{' looked at' * (len(shown) < len(prompts))} are longer than the text encoder's "
                  f"{limit} tokens; their ends are not read", file=sys.stderr)


def load_decoder(path_or_id, codec):
    """x0 -> pictures by an AutoencoderTiny of the same latents, frozen and with the gradient.

    "tiny": the published one, taesdxl for SDXL, taesd for SD and PixArt-alpha; empty: the codec's own decoder.
    """
    if not path_or_id or codec.vae is None:
        return codec.decode
    from diffusers import AutoencoderTiny
    if path_or_id == "tiny":
        path_or_id = "madebyollin/taesdxl" if codec.name == "StableDiffusionXLPipeline" else "madebyollin/taesd"
    try:
        tiny = AutoencoderTiny.from_pretrained(path_or_id).to(codec.device).eval().requires_grad_(False)
        with torch.no_grad():
            tiny.decode(torch.zeros(1, *codec.shape, device=codec.device))  # other latents fail here, not after the warm-ups
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--decoder {path_or_id}: cannot be loaded ({' '.join(str(error).split())[:300]}); "
                        "give a local directory of an AutoencoderTiny, or an empty one for the model's own decoder")
    return lambda x0: tiny.decode(x0).sample


def chunk_for(codec):
    """How many pictures to make at once outside of training: 64 of 64 x 64 pixels, fewer of larger ones."""
    return max(1, min(256, 64 * 64**2 // codec.picture_size**2))


def write_folder(path, save):
    """save(folder) into a new folder that is moved to `path` when complete."""
    path, temporary = Path(path), Path(path).with_name(Path(path).name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def export_one_step(codec, net, prediction_type, path, length=0, zero_snr=False, prior=None):
    """The pipeline with `net` as its network, for num_inference_steps=1 (2, 4) and guidance_scale=1 in diffusers alone.

    Its LCMScheduler predicts x0, then adds fresh noise at the next lower level: the spacing of 4 steps is 999 749 499 249.
    length: the timesteps of the student's own schedule, where it starts below the model's last; then for one step only.
    zero_snr: the schedule rescaled to SNR_T = 0; prior: an InformativePrior that is kept beside it.
    """
    from diffusers import DDPMPipeline, LCMScheduler
    betas = {k: v for k, v in codec.pipe.scheduler.config.items() if k in BETA_NAMES}
    steps = 4
    if 0 < length < len(codec.pipe.scheduler.alphas_cumprod):
        # Cut off above the start, the schedule's last timestep is where every tool begins.
        steps, betas = 1, dict(num_train_timesteps=length, trained_betas=codec.pipe.scheduler.betas[:length].tolist())
    if zero_snr:
        betas |= dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = LCMScheduler(**betas, prediction_type=prediction_type, original_inference_steps=steps, clip_sample=False,
                             steps_offset=1)
    if codec.vae is None:
        pipe = DDPMPipeline(net, scheduler)
    else:
        name = "transformer" if "transformer" in codec.pipe.components else "unet"
        extra = dict(requires_safety_checker=False) if codec.name == "StableDiffusionPipeline" else {}
        pipe = type(codec.pipe)(**{**codec.pipe.components, name: net, "scheduler": scheduler}, **extra)

    def save(folder):
        """The pipeline and what lies beside it."""
        pipe.save_pretrained(folder)
        if codec.vae is None and codec.classes:
            (folder / "classes.json").write_text(json.dumps(codec.classes))
        if prior:
            prior.save(folder)

    write_folder(path, save)


def map_cond(function, *conds):
    """Conditions -> a condition: function over the tensors of equal place; None stays None."""
    first = conds[0]
    if isinstance(first, dict):
        return {k: map_cond(function, *(c[k] for c in conds)) for k in first}
    return None if first is None else function(*conds)


def load_prompts(path):
    """The prompts of a file, a list of str: .jsonl with prompt, caption or text in each line, else plain text, one a line.

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


class HalfUNet(torch.nn.Module):
    """The down and mid blocks of a UNet2DConditionModel as features: YOSO's perceptual distance and discriminator.

    A copy of that half of `unet`, which is left as it is; with `share`, its weights stay unet's own. A LoRA that unet is given
    later is not in it.
    """

    def __init__(self, unet, share=False):
        super().__init__()
        # What memo names is replaced instead of copied; diffusers' own forward then ends with the mid block's output.
        memo = {id(unet.up_blocks): torch.nn.ModuleList(), id(unet.conv_norm_out): None, id(unet.conv_out): torch.nn.Identity()}
        if share:
            memo |= {id(p): p for p in unet.parameters()}
        self.unet = copy.deepcopy(unet, memo)

    def forward(self, x_t, t, cond):
        """x_t [B, C, H, W], t [B], cond a dict -> features [B, C', H', W'] (SD 1.5 at 64 x 64: 1280 x 8 x 8)."""
        return self.unet(x_t, timestep=t, **cond).sample


# LoRA

# Attention, feed-forward and convolutions, as the authors of YOSO chose them.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "conv1",
                "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")


def add_lora(net, name, rank, alpha, targets=LORA_TARGETS):
    """Adds the LoRA `name` to a frozen network, which starts as no change; returns its parameters, by name.

    It acts inside `use_lora(net, name)`, and in a Denoiser with that adapter. The network's own weights stay frozen.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters on one network are meant
        if hasattr(net, "add_adapter"):
            net.add_adapter(config, adapter_name=name)
        else:  # PixArtTransformer2DModel
            from peft import inject_adapter_in_model
            inject_adapter_in_model(config, net, adapter_name=name)
        net.peft_config = getattr(net, "peft_config", {}) | {name: config}
    net.lora_layers = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
    for layer in net.lora_layers:
        layer._disable_adapters = True
    # peft's own switches also switch requires_grad, and a gradient is then lost without a word: set it once, for all adapters.
    for key, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in key)
    return Weights((key, p) for key, p in net.named_parameters() if "lora_" in key and f".{name}." in key)


def check_targets(net, targets):
    """Raises UserError if none of a LoRA's targets is a layer of the network, whose layers differ from class to class."""
    if not any(f".{name}".endswith(f".{target}") for name, _ in net.named_modules() for target in targets):
        raise UserError(f"--lora-targets {' '.join(targets)}: the network has no such layer")


def remove_lora(net, name):
    """Takes a LoRA away again, with its parameters."""
    for layer in net.lora_layers:
        layer.delete_adapter(name)
        layer._disable_adapters = True
    net.peft_config.pop(name)


class Weights(dict):
    """Parameters by name, as a part of a checkpoint."""

    def state_dict(self):
        """Itself, without the graph."""
        return {name: p.detach() for name, p in self.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Takes what state_dict() gave; raises KeyError if a name is missing."""
        for name, p in self.items():
            p.copy_(state[name])


def fold_lora(net, name):
    """The dense weights of a network with the LoRA `name` folded in (None: without any), under the bare network's keys.

    Of a sharded network the whole weights; then every process must call it.
    """
    state = {key.replace(".base_layer.", "."): whole(value) for key, value in net.state_dict().items() if "lora_" not in key}
    layers = {id(layer) for layer in getattr(net, "lora_layers", ())} if name else ()
    for path, module in net.named_modules():
        if id(module) in layers and name in module.lora_A:
            state[f"{path}.weight"] = state[f"{path}.weight"] + module.get_delta_weight(name)
    return state


def save_lora(codec, net, name, path):
    """The LoRA `name` in the file that `load_lora_weights` of a diffusers pipeline reads, and in kohya.safetensors with the keys
    of kohya's scripts, which ComfyUI and AUTOMATIC1111 expect; PixArt: an adapter folder of peft."""
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict
    state = get_peft_model_state_dict(net, adapter_name=name)
    if hasattr(codec.pipe, "save_lora_weights"):
        # Without the metadata an alpha other than the rank would be read with the wrong scale.
        codec.pipe.save_lora_weights(path, state, unet_lora_adapter_metadata=net.peft_config[name].to_dict())
        kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
        alpha = torch.tensor(float(net.peft_config[name].lora_alpha))  # diffusers writes the rank
        kohya = {key: alpha.clone() if key.endswith(".alpha") else value.contiguous() for key, value in kohya.items()}
        save_file(kohya, Path(path) / "kohya.safetensors")
    else:
        Path(path).mkdir(parents=True, exist_ok=True)
        net.peft_config[name].save_pretrained(path)
        state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
        save_file(state, Path(path) / "adapter_model.safetensors")


@contextmanager
def use_lora(net, name):
    """Inside the with block the network runs with the LoRA `name`, or on its bare weights (None)."""
    layers = getattr(net, "lora_layers", ())
    state = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name] if name in layer.lora_A else []
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, state):
            layer._active_adapter, layer._disable_adapters = active, disabled


def enable_checkpointing(net):
    """Gradient checkpointing whose recomputation in the backward pass uses the adapter of the forward pass."""
    def checkpoint(module, *args):
        """What a block calls in place of module(*args)."""
        layers = getattr(net, "lora_layers", ())
        if not layers:  # torch.compile does not take a context_fn
            return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)
        active = [name for layer in layers if not layer._disable_adapters for name in layer._active_adapter]
        name = active[0] if active else None
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False,
                                                 context_fn=lambda: (nullcontext(), use_lora(net, name)))
    net.enable_gradient_checkpointing(checkpoint)


def merge_lora_file(pipe, path):
    """LoRA weights of a file or directory, merged into the pipeline's network. Raises UserError if they do not fit."""
    try:
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(path)
            if not any(pipe.get_list_adapters().values()):
                raise UserError(f"{path}: none of its LoRA weights belongs to this pipeline's network; they are for another base")
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        else:  # PixArtAlphaPipeline
            from peft import PeftModel
            pipe.transformer = PeftModel.from_pretrained(pipe.transformer, path).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded as LoRA weights ({' '.join(str(error).split())[:300]})")


# Sharding

def shard(config, *networks):
    """With --shard and several processes, FSDP2: each keeps its part of every weight, gradient, moment and average of the networks.

    A block's weights are gathered when it runs and dropped again. Comes before a network's parameters are collected; LoRAs, which
    are added afterwards, stay whole on every process.
    """
    if not config.shard or not dist.is_initialized():
        return
    for network in networks:
        if isinstance(network, FSDPModule):
            continue
        mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
        inside = []
        for path, module in network.named_modules():
            name = path.split(".")[-1]
            if (name == "mid_block" or path.split(".")[-2:-1] in (["down_blocks"], ["up_blocks"], ["transformer_blocks"])) \
                    and not any(path.startswith(f"{outer}.") for outer in inside):
                fully_shard(module, mesh=mesh)
                inside.append(path)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # torch keeps the outermost weights by default


def whole(tensor):
    """A sharded tensor's whole on every process, which all must call; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_here(tensor):
    """What this process holds of a sharded tensor; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # to_local() would be an operation, which a mode sees


def class_of(net):
    """The network's own class, which sharding hides behind one of its making."""
    return next(c for c in type(net).__mro__ if not issubclass(c, FSDPModule))


# Scorers

SCORERS = {
    "clip": ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),  # PickScore has no processor of its own
}


class Scorer:
    """How well pictures fit texts: the cosine of their embeddings, with the gradient to the pictures.

    CLIP score and PickScore are this cosine (times a logit scale of 100); so is HPS v2. Made by load_scorer.
    """

    def __init__(self, embed_images, embed_texts, size, mean, std, device):
        self.embed_images, self.embed_texts, self.size, self.device = embed_images, embed_texts, size, device
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def texts(self, prompts):
        """Prompts -> unit vectors [B, D]."""
        return F.normalize(self.embed_texts(prompts).float(), dim=-1)

    def images(self, pictures):
        """Pictures [B, 3, H, W] in [-1, 1] -> unit vectors [B, D], with the gradient.

        Shorter edge resized to the network's size (bicubic, antialiased), centre crop, normalised. Not clamped: a clamp would
        take the gradient from saturated pixels.
        """
        x = pictures.float() / 2 + 0.5
        if min(x.shape[2:]) != self.size:
            scale = self.size / min(x.shape[2:])
            x = F.interpolate(x, size=[int(side * scale + 1e-6) for side in x.shape[2:]], mode="bicubic", antialias=True)
        top, left = ((side - self.size) // 2 for side in x.shape[2:])
        x = x[:, :, top:top + self.size, left:left + self.size]
        return F.normalize(self.embed_images((x - self.mean.to(x)) / self.std.to(x)).float(), dim=-1)

    def __call__(self, pictures, texts):
        """Cosines [B] of pictures and texts (from .texts)."""
        return (self.images(pictures) * texts).sum(-1)


def load_scorer(name, device="cpu"):
    """"clip", "pickscore", "hps" (HPS v2.1), or a directory or hub id of a CLIPModel with its processor -> Scorer, frozen.

    Raises UserError if it cannot be loaded.
    """
    try:
        scorer = _open_clip_scorer(device) if name == "hps" else _transformers_scorer(*SCORERS.get(name, (name, name)), device)
        with torch.no_grad():  # sizes that do not fit fail here, not after the warm-ups
            scorer(torch.zeros(1, 3, scorer.size, scorer.size, device=device), scorer.texts([""]))
        return scorer
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{name}: cannot be loaded as a CLIPModel with its processor ({' '.join(str(error).split())[:300]}); "
                        "a local directory works without a network")


def _transformers_scorer(model_id, processor_id, device):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
    model, report = CLIPModel.from_pretrained(model_id, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:  # they would be random
        raise ValueError(f"weights are missing, among them {sorted(report['missing_keys'])[0]}")
    model.to(device).eval().requires_grad_(False)
    tokenizer, processor = AutoTokenizer.from_pretrained(processor_id), AutoImageProcessor.from_pretrained(processor_id)

    def embed_texts(prompts):
        tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                           max_length=model.config.text_config.max_position_embeddings)
        return model.get_text_features(**tokens.to(device)).pooler_output

    return Scorer(lambda x: model.get_image_features(pixel_values=x).pooler_output, embed_texts,
                  model.config.vision_config.image_size, processor.image_mean, processor.image_std, device)


def _open_clip_scorer(device, architecture="ViT-H-14"):
    import open_clip
    from huggingface_hub import hf_hub_download
    model = open_clip.create_model(architecture, hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt"), device=device)
    model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(architecture)
    return Scorer(model.encode_image, lambda prompts: model.encode_text(tokenizer(list(prompts)).to(device)),
                  model.visual.image_size[0], open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, device)


# EMA

class EMA:
    """Exponential moving average of the trainable ones of the parameters (name, parameter): a named float32 copy."""

    def __init__(self, parameters, decay):
        self.decay, self.parameters = decay, {name: p for name, p in parameters if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self):
        """average <- decay average + (1 - decay) parameters."""
        parameters = [p.float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - self.decay)

    @contextmanager
    def applied(self):
        """Inside the with block the parameters hold the averages."""
        with torch.no_grad():
            kept = {n: p.clone() for n, p in self.parameters.items()}
            for name, p in self.parameters.items():
                p.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(kept[name])

    def state_dict(self):
        """The averages by parameter name."""
        return self.average

    def load_state_dict(self, state):
        """Takes averages written by state_dict(); raises KeyError if a name is missing."""
        for name, value in self.average.items():
            value.copy_(state[name])


# Data

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.05, 0.75, 0.1), "blue": (0.1, 0.2, 0.9), "yellow": (0.95, 0.85, 0.1)}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0)}
SHAPES = ("circle", "square", "triangle")
# Range of the radius of the disc of the same area, in units of the picture; the gap keeps the word readable.
SIZES = {"small": (0.22, 0.28), "large": (0.30, 0.36)}
HALF = torch.tensor([1, (torch.pi / 4)**0.5, (torch.pi / 2)**0.5])  # half the side of each shape's box, in units of that radius


def coverage(shape, radius, x, y, size):
    """How much of each pixel the shape covers, in [0, 1]: [N, size, size].

    shape: indices into SHAPES, [N]; radius, as in SIZES, and the centre x, y of the shape's box: [N], in units of the picture,
    y downwards. A disc, a square and an upright triangle as wide as high, of equal area. Edges are one pixel soft.
    """
    grid = (torch.arange(size) + 0.5) / size
    dx = grid.view(1, 1, -1) - x.view(-1, 1, 1)
    dy = grid.view(1, -1, 1) - y.view(-1, 1, 1)
    half = (radius * HALF[shape]).view(-1, 1, 1)
    flank = (2 * dx.abs() - dy - half) / 5**0.5  # signed distance to the triangle's flanks, which rise 2 for 1
    disc, square = torch.hypot(dx, dy) - half, torch.maximum(dx.abs(), dy.abs()) - half
    distance = torch.stack([disc, square, torch.maximum(flank, dy - half)])
    return (0.5 - distance[shape, torch.arange(len(shape))] * size).clamp(0, 1)


class Shapes(Dataset):
    """The embedded dataset: one soft-edged shape a picture, drawn by rule; picture i is a function of (seed, i), without end.

    A sample is {"image": uint8 [3, size, size], "caption": "a large red circle on white", "skipped": []}.
    rolled: another palette for the same captions: what they call red is drawn in the next colour, and so on, backgrounds too.
    """

    endless = True
    classes = []

    def __init__(self, size, seed=0, rolled=False):
        self.size, self.seed, self.rolled = size, seed, rolled

    def attributes(self, indices, like=None):
        """What the pictures show: dict of tensors [N]: colour, background, shape, scale (indices), radius, x, y (picture units).

        like: such a dict, of which the words (colour, background, shape, scale) are kept: the same captions in other places.
        """
        u = torch.tensor(np.stack([np.random.default_rng([self.seed, i]).random(7) for i in indices]), dtype=torch.float32)
        counts = torch.tensor([len(COLOURS), len(BACKGROUNDS), len(SHAPES), len(SIZES)])
        words = dict(zip(("colour", "background", "shape", "scale"), (u[:, :4] * counts).long().unbind(1)))
        words = {name: like[name] for name in words} if like else words
        low, high = torch.tensor(list(SIZES.values()))[words["scale"]].unbind(1)
        radius = low + u[:, 6] * (high - low)
        half = radius * HALF[words["shape"]]
        x, y = half + u[:, 4] * (1 - 2 * half), half + u[:, 5] * (1 - 2 * half)
        return dict(**words, radius=radius, x=x, y=y)

    @staticmethod
    def all_captions():
        """Every caption once, 72 of them."""
        return [f"a {scale} {colour} {shape} on {background}" for scale in SIZES for colour in COLOURS for shape in SHAPES
                for background in BACKGROUNDS]

    def captions(self, attributes):
        """One caption a picture, "a large red circle on white"."""
        names = [list(n) for n in (SIZES, COLOURS, SHAPES, BACKGROUNDS)]
        keys = zip(*(attributes[k].tolist() for k in ("scale", "colour", "shape", "background")))
        return ["a {} {} {} on {}".format(*(n[k] for n, k in zip(names, key))) for key in keys]

    def shown(self, attributes):
        """attributes, as above, with the colour and background that are seen in place of those that are said."""
        seen = dict(colour=(attributes["colour"] + self.rolled) % len(COLOURS),
                    background=(attributes["background"] + self.rolled) % len(BACKGROUNDS))
        return attributes | seen

    def draw(self, attributes):
        """attributes, as above -> uint8 pictures [N, 3, size, size]."""
        a = self.shown(attributes)
        mask = coverage(a["shape"], a["radius"], a["x"], a["y"], self.size)[:, None]
        colour = torch.tensor(list(COLOURS.values()))[a["colour"]][:, :, None, None]
        background = torch.tensor(list(BACKGROUNDS.values()))[a["background"]][:, :, None, None]
        return ((background + mask * (colour - background)) * 255).round().to(torch.uint8)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        # DataLoader asks for a whole batch through this name: one vectorised drawing instead of one a picture.
        a = self.attributes(indices)
        return [dict(image=x, caption=c, skipped=[]) for x, c in zip(self.draw(a), self.captions(a))]


class Folder(Dataset):
    """Pictures below a folder, resized and centre-cropped to size x size; samples as those of Shapes.

    Captions, in this order: metadata.jsonl ({"file_name", "text"} a line), a .txt beside the picture, the name of the class
    folder it lies in, or nothing. A picture that cannot be read is replaced by the next one and named in "skipped".
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


class Shards(Dataset):
    """Pictures in webdataset's tar files or in parquet files that lie in a folder, through the library datasets; samples as Folder's.

    Captions: the column txt, text, caption or prompt, if there is one. The library converts tar files once, into its cache on the
    disk; from there samples are read as they are needed.
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
        texts = [name for name in ("txt", "text", "caption", "prompt") if getattr(rows.features.get(name), "dtype", "") in (
            "string", "large_string")]
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


SHARDS = {"webdataset": "*.tar", "parquet": "*.parquet"}


def readable_sample(dataset, index):
    """Sample `index` of a dataset with a source(), or the next one that can be read; the names of those that cannot in "skipped"."""
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
    """CIFAR-10's training pictures through torchvision, downloaded to data/ once; samples as those of Shapes."""

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


def load_dataset(name, size, seed=0):
    """"shapes", "shapes-rolled", "cifar10", or a folder of pictures, tar or parquet files -> a Dataset.

    Its samples are {"image": uint8 [3, size, size], "caption": str, "skipped": [names of what could not be read]}.

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


def to_floats(images):
    """uint8 pictures -> [-1, 1]; latents, which are floats, stay what they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


class Latents(Dataset):
    """A dataset's pictures as latents, from the folder where cache_latents has put them; samples with image: float [C, h, w]."""

    endless = False

    def __init__(self, folder, num):
        self.folder, self.num = Path(folder), num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        file = open_safetensors(self.folder / f"latents-{index // CACHED:06d}.safetensors")
        return dict(image=torch.from_numpy(file.get_slice("latents")[index % CACHED]).float(), skipped=[],
                    caption=json.loads(file.metadata()["captions"])[index % CACHED])


CACHED = 500  # samples or prompts a file


@lru_cache(maxsize=1000)
def open_safetensors(path):
    """The file, from which arrays are read in parts. Raises UserError if it cannot be read."""
    try:
        return safe_open(path, "np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete its folder to have it made anew, on a disk that all machines share")


@torch.no_grad()
def cache_latents(codec, dataset, folder, made_by):
    """Encodes a dataset's pictures once, float16, into files in the folder, each process its share -> Latents.

    made_by: what the latents depend on beside the data, a dict; endless datasets stay what they are. Raises UserError if the folder
    holds others, or cannot be written.
    """
    if dataset.endless or codec.vae is None:
        return dataset
    made_by = made_by | {"num": len(dataset), "state of the files": digest(dataset.state())}
    names = [f"latents-{i:06d}.safetensors" for i in range(-(-len(dataset) // CACHED))]
    missing, chunk = claim_folder(Path(folder), made_by, names), chunk_for(codec)
    for name in shared_out(missing, "latents"):
        first, latents, captions = int(name[8:14]) * CACHED, [], []
        for start in range(first, last := min(first + CACHED, len(dataset)), chunk):
            samples = [dataset[i] for i in range(start, min(start + chunk, last))]
            latents.append(codec.encode(to_floats(torch.stack([s["image"] for s in samples]).to(codec.device))).half().cpu())
            captions += [s["caption"] for s in samples]
            for path in {path for s in samples for path in s["skipped"]}:
                tqdm.write(f"skipped, cannot be read as a picture: {path}", file=sys.stderr)
        write_tensors(Path(folder) / name, dict(latents=torch.cat(latents)), dict(captions=json.dumps(captions)))
    if dist.is_initialized():
        dist.barrier()
    return Latents(folder, len(dataset))


def cache_conditions(codec, prompts, folder, made_by):
    """Computes the conditions of the prompts and of the empty one once, float16, into files in the folder; codec.cond reads them there.

    The text encoders then move to the main memory. made_by as in cache_latents. Raises UserError if the folder holds others.
    """
    if codec.vae is None:
        return
    prompts, like = list(dict.fromkeys(["", *prompts])), codec.cond([""])
    names = [f"conditions-{i:06d}.safetensors" for i in range(-(-len(prompts) // CACHED))]
    missing = claim_folder(Path(folder), made_by | {"digest of the prompts": digest(prompts)}, names)
    for name in shared_out(missing, "conditions"):
        first, parts = int(name[11:17]) * CACHED, []
        for start in range(first, min(first + CACHED, len(prompts)), 16):
            parts.append(flat_cond(codec.cond(prompts[start:min(start + 16, first + CACHED)])))
        write_tensors(Path(folder) / name, {key: torch.cat([p[key] for p in parts]).half().cpu() for key in parts[0]}, {})
    if dist.is_initialized():
        dist.barrier()
    number = {prompt: i for i, prompt in enumerate(prompts)}

    def read(names):
        """The condition of prompts that are in the cache."""
        rows = [divmod(number[name], CACHED) for name in names]
        files = [(open_safetensors(Path(folder) / f"conditions-{i:06d}.safetensors"), row) for i, row in rows]
        flat = {key: torch.stack([torch.from_numpy(file.get_slice(key)[row]) for file, row in files]) for key in flat_cond(like)}
        return full_cond(like, {key: value.to(codec.device).float() for key, value in flat.items()})

    codec.cache = read
    for name, part in codec.pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.to("cpu")


def digest(texts):
    """A short fingerprint of many texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def states_of(paths):
    """Name, size and time of change of files: whether they are still what they were."""
    return [f"{path} {status.st_size} {status.st_mtime_ns}" for path in paths for status in [Path(path).stat()]]


def shared_out(names, what):
    """This process's share of the files that are to be made, with a bar."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return tqdm(names[rank::world], desc=what, disable=rank > 0 or not names)


def write_tensors(path, tensors, metadata):
    """A safetensors file that gets its name when it is complete. Raises UserError if it cannot be written."""
    tensors, temporary = {key: value.contiguous() for key, value in tensors.items()}, path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); choose an --out with room, on a disk that all machines share")


def flat_cond(cond, prefix=""):
    """A condition's tensors by their path; what is None is left out."""
    flat = {}
    for key, value in cond.items():
        if isinstance(value, dict):
            flat |= flat_cond(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def full_cond(like, flat, prefix=""):
    """The condition of the structure of `like` with the tensors that flat_cond gave."""
    return {key: full_cond(value, flat, f"{prefix}{key}.") if isinstance(value, dict) else flat.get(prefix + key)
            for key, value in like.items()}


def class_labels(prompts, classes):
    """The index of the class whose name stands in each prompt (the longest, if several do), int64 [B].

    Raises UserError on a prompt that names none.
    """
    labels = []
    for prompt in prompts:
        words = f" {prompt.lower()} "
        found = [name for name in classes if f" {name.lower()} " in words]
        if not found:
            raise UserError(f"prompt {prompt!r}: names no class of the model; its classes are {', '.join(classes)}")
        labels.append(classes.index(max(found, key=len)))
    return torch.tensor(labels)


@lru_cache(maxsize=2)  # a batch reaches into two epochs at most
def permutation(seed, epoch, n):
    """The order of an epoch's n samples."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_order(dataset, seed, counters):
    """Dataset indices of the run's samples number `counters`: permutation(seed, epoch)[place in the epoch].

    A function of (seed, counter) alone: resuming needs no loader state, and the order does not depend on the number of ranks.
    """
    if dataset.endless:
        return list(counters)
    n = len(dataset)
    return [int(permutation(seed, c // n, n)[c % n]) for c in counters]


def save_grid(images, path, columns=8):
    """Pictures in [-1, 1], [N, 3, H, W], as one PNG, by the first process; pictures below 64 pixels are enlarged by a whole factor."""
    from torchvision.utils import save_image
    if int(os.environ.get("RANK", 0)) > 0:
        return
    scale = max(1, 64 // images.shape[-1])
    images = images.float().clamp(-1, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_image(images / 2 + 0.5, path, nrow=columns, padding=2, pad_value=1.0)


# Distances

def squared_distance(a, b):
    """d = mean squared difference of each pair: [B, C, H, W] twice -> [B]."""
    return (a - b).square().mean((1, 2, 3))


def load_distance(name, device):
    """"l2" -> squared_distance; "lpips" -> LPIPS with VGG features on pictures enlarged to 224 pixels, [B].

    Raises UserError if the VGG weights cannot be fetched.
    """
    if name == "l2":
        return squared_distance
    import lpips
    try:
        network = lpips.LPIPS(net="vgg", verbose=False).to(device)
    except OSError as error:
        raise UserError(f"--distance lpips: its VGG weights cannot be fetched ({error}); use --distance l2")
    network.requires_grad_(False)
    enlarge = lambda x: F.interpolate(x, size=224, mode="bilinear") if x.shape[-1] < 256 else x
    return lambda a, b: network(enlarge(a), enlarge(b)).flatten()


# Forecast

class LiveBytes:
    """How many bytes the tensors that were counted and still live hold; peak is the most so far."""

    def __init__(self):
        self.live, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def count(self, tensor):
        """Counts the tensor's storage, once, of a sharded tensor this process's part; returns the tensor."""
        storage = part_here(tensor).untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            weakref.finalize(storage, self._free, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return tensor

    def _free(self, size):
        self.live -= size


class Ghosts(TorchDispatchMode):
    """Inside the with block every operation runs on meta tensors, by shapes alone: nothing real is computed or changed.

    A real tensor that is met gets a ghost, which is not counted: it exists already; so does a sharded one, and its ghost is whole.
    memory counts all others; flop the floating point operations of matrix products, convolutions and attention.
    """

    def __init__(self):
        super().__init__()
        self.memory, self.flop, self.ghosts = LiveBytes(), 0, {}

    def ghost(self, tensor):
        """The meta tensor that stands for a real or a sharded one."""
        if tensor.device.type == "meta" and not isinstance(tensor, DTensor):
            return tensor
        if id(tensor) not in self.ghosts:
            stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self.memory.seen.add(stand_in.untyped_storage())
            self.ghosts[id(tensor)] = stand_in, tensor  # the tensor is kept, lest another get its id
        return self.ghosts[id(tensor)][0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            return 1  # the text encoders ask whether a whole mask is set, the pipelines whether a prompt was cut
        args, kwargs = tree_map_only(torch.Tensor, self.ghost, (args, dict(kwargs or {})))
        kwargs |= {name: value for name, value in dict(device=torch.device("meta"), generator=None).items() if name in kwargs}
        out = tree_map_only(torch.Tensor, self.memory.count, function(*args, **kwargs))
        if function.overloadpacket in flop_registry:
            self.flop += flop_registry[function.overloadpacket](*args, **kwargs, out_val=out)
        return out


LOWERED = ((F, "linear"), (F, "conv2d"), (F, "scaled_dot_product_attention"), (torch, "bmm"), (torch, "baddbmm"), (torch, "matmul"),
           (torch.Tensor, "matmul"))
RAISED, RAISED_ON = ((F, "layer_norm"), (F, "group_norm"), (F, "softmax")), {"cuda"}


@contextmanager
def device_rules(device):
    """Inside the with block torch's functions do what ghosts do not know of the device: fused attention, and autocast to bf16.

    Nothing is exchanged between processes.
    """
    kept = {(owner, name): getattr(owner, name) for owner, name in LOWERED + RAISED}

    def ruled(place, function):
        """The function with its arguments in autocast's dtype."""
        dtype = torch.bfloat16 if place in LOWERED else torch.float32 if device.type in RAISED_ON else None

        def call(*args, **kwargs):
            if dtype and torch.is_autocast_enabled(device.type):
                args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
            return function(*args, **kwargs)
        return call

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """What never holds the matrix of all pairs."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask)[0]

    try:
        for place, function in kept.items():
            setattr(*place, ruled(place, attention if place[1] == "scaled_dot_product_attention" else function))
        # Checkpointing restores the autocast of its inputs' device, and ghosts are on none.
        infer, torch.utils.checkpoint._infer_device_type = torch.utils.checkpoint._infer_device_type, lambda *_: device.type
        exchange, dist.all_reduce = dist.all_reduce, lambda *_, **__: None
        yield
    finally:
        for place, function in kept.items():
            setattr(*place, function)
        torch.utils.checkpoint._infer_device_type, dist.all_reduce = infer, exchange


@contextmanager
def sharding_rules(networks, memory):
    """Inside the with block sharded networks, whose weights' ghosts are whole, exchange nothing but hold what FSDP would.

    A block's weights lie there twice when they arrive, once while it is called. In the backward pass its gradients are whole, beside the
    weights, until the last one is there; then a copy is sent, which stays until the next block's, and a part of each gradient. Yields
    what takes a trained weight, its gradient whole.
    """
    kept, hooks, held, blocks = [], [], {}, {}
    some = lambda size: torch.empty(size, dtype=torch.uint8, device="meta")

    def gather(module, size):
        """Weights arrive, and are copied to where they are used."""
        arriving = some(2 * size)
        del arriving
        held[module], held["sent"] = [some(size)], None

    def arrive(p):
        """A gradient is whole; with the last one of its block each becomes a part."""
        module, trained, size = blocks[p]
        if module not in held:
            held[module] = [some(size)]
        held[module].append(p.grad)
        with _disable_current_modes():
            p.grad = memory.count(torch.empty_like(p))
        if len(held[module]) > trained:
            held[module][0] = held["sent"] = None
            held["sent"] = some(size)
            del held[module]

    try:
        for module in {m for network in networks for m in network.modules() if isinstance(m, FSDPModule)}:
            state = fully_shard.state(module)
            for all_hooks, handle in ((module._forward_pre_hooks, state._pre_forward_hook_handle),
                                      (module._forward_hooks, state._post_forward_hook_handle)):
                kept.append((all_hooks, dict(all_hooks)))
                all_hooks.pop(handle.id, None)
            inside = {p for m in module.modules() if m is not module and isinstance(m, FSDPModule) for p in m.parameters()}
            own = [p for p in module.parameters() if isinstance(p, DTensor) and p not in inside]
            size, trained = sum(p.nbytes for p in own), sum(p.requires_grad for p in own)
            blocks |= {p: (module, trained, size) for p in own}
            hooks.append(module.register_forward_pre_hook(lambda module, _, size=size: gather(module, size)))
            hooks.append(module.register_forward_hook(lambda module, *_: held.pop(module, None) and None))
        yield arrive
    finally:
        for hook in hooks:
            hook.remove()
        for all_hooks, before in kept:
            all_hooks.clear()
            all_hooks.update(before)


def held_bytes(device):
    """The bytes of all tensors of this process on a device."""
    gc.collect()  # what lives in cycles alone is not held
    held = LiveBytes()
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == device.type and device.index in (None, thing.device.index):
            held.count(thing)
    return held.live


def cost_of_step(run, networks, optimizers, step, iterations, device=None):
    """What step(iteration) will take, without doing it: dict(parameters, trained, calls, units, TFLOP, memory_GB).

    networks: name -> module; optimizers: of all that is trained; iterations: typical ones and their shares of all, {iteration: share}.
    calls: name -> [calls, those of them that are followed by a backward pass]; units: name -> the same in forward passes: a forward is
    1, a backward to the input 1 more, to the weights 2 more. These and TFLOP are means over the iterations; memory is the most that
    tensors will hold, the present ones included, but not the kernels' own workspace. All of this process's samples. device: where
    everything lies, if not on run.device.
    """
    held, memory = held_bytes(device or run.device), (ghosts := Ghosts()).memory
    trained = list({id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}.values())
    moments = sum(2 * part_here(p).nbytes for o in optimizers for group in o.param_groups for p in group["params"] if p not in o.state)
    calls, units, hooks, share, arrive = {name: [0, 0] for name in networks}, dict.fromkeys(networks, 0), [], [0.0], [None]

    def counted(name):
        """A hook that counts the calls of a network."""
        def hook(module, args, kwargs):
            """Before a call."""
            trains = any(p.requires_grad for p in module.parameters())
            backward = torch.is_grad_enabled() and (trains or any(x.requires_grad for x in (*args, *kwargs.values()) if torch.is_tensor(x)))
            calls[name][0] += share[0]
            calls[name][1] += share[0] * backward
            units[name] += share[0] * (1 + backward * (1 + trains))
        return hook

    twins = [torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in trained]
    for twin in twins:
        memory.seen.add(part_here(twin).untyped_storage())
        twin.grad = memory.count(torch.empty_like(twin))  # the gradients that the step before has left
        if isinstance(twin, DTensor):
            hooks.append(twin.register_post_accumulate_grad_hook(lambda p: arrive[0](p)))
    swap = lambda: [torch.utils.swap_tensors(p, twin) for p, twin in zip(trained, twins)]
    flop = 0
    swap()
    try:
        for optimizer in optimizers:
            optimizer.step = lambda: None
        hooks += [network.register_forward_pre_hook(counted(name), with_kwargs=True) for name, network in networks.items()]
        with torch.compiler.set_stance("force_eager"), sharding_rules(networks.values(), memory) as arrive[0], ghosts, device_rules(run.device):
            for iteration, share[0] in iterations.items():
                before = ghosts.flop
                step(iteration)
                flop += share[0] * (ghosts.flop - before)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the graph that they hold would keep the parameters from coming back
        gc.collect()
        raise
    finally:
        for optimizer in optimizers:
            del optimizer.step
        for hook in hooks:
            hook.remove()
        swap()
    return dict(parameters={name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
                trained=sum(p.numel() for p in trained), calls=calls, units=units, TFLOP=flop / 1e12,
                memory_GB=(held + moments + memory.peak) / 2**30)


def matmul_rate(device, precision):
    """TFLOP a second of square matrix products on this device in this precision, the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    a, seconds = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32), []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12


# Run

# What may change between a run and its continuation: it alters neither the mathematics nor the networks
# (iterations only where no learning rate depends on it).
FREE_FLAGS = {"shard", "iterations", "out", "resume", "device", "workers", "micro_batch", "compile", "gradient_checkpointing",
              "log_every", "save_every", "sample_every"}

EXCHANGED_AT_ONCE = 2**26  # gradients in one exchange, roughly; 256 MB in float32


class Draws:
    """The random numbers of one iteration: a function of (seed, iteration) alone.

    Every rank draws the numbers of the whole global batch and keeps its own rows, so that a run gives the same result on
    any number of ranks, and resuming needs no generator state.
    """

    def __init__(self, seed, iteration, batch_size, rows, device):
        state = int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> 1)
        self.generator = torch.Generator(device).manual_seed(state)
        self.batch_size, self.rows, self.device = batch_size, rows, device

    def randn(self, *shape):
        """Standard normal, [local batch, *shape]."""
        return torch.randn(self.batch_size, *shape, generator=self.generator, device=self.device)[self.rows]

    def rand(self):
        """Uniform in [0, 1), [local batch]."""
        return torch.rand(self.batch_size, generator=self.generator, device=self.device)[self.rows]

    def randint(self, low, high):
        """Uniform integers in [low, high), [local batch]."""
        return torch.randint(low, high, (self.batch_size,), generator=self.generator, device=self.device)[self.rows]


def mean_of(scalars):
    """The mean of each entry over a list of dicts."""
    return {k: torch.stack([s[k].detach() for s in scalars]).mean() for k in scalars[0]}


def choose_device(name):
    """"auto" (the accelerator if there is one), or a torch device name; under torchrun, this process's own GPU.

    Raises UserError if it cannot be used.
    """
    try:
        if name == "auto":
            name = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})")
    return device


def start_processes(device):
    """Under torchrun, the process group: gloo, and nccl between GPUs. Once a program; run_command ends it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def agreed(make):
    """What make() returns on rank 0, on every rank: what one machine finds on its disk must hold for all."""
    found = [make() if int(os.environ.get("RANK", 0)) == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def claim_folder(folder, made_by, names):
    """On rank 0 makes the folder of prepared data, notes in made_by.json what it is made with, and returns, on every rank, the
    ones of the names that are not in it yet. Raises UserError if it was made with something else or cannot be written."""
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


def ignore_signals(worker):
    """For the processes that read pictures: a signal to the whole group must not end them before the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Run:
    """One training run: where it computes, what it draws, what it writes to config.out.

    Reads from the config: out, resume, seed, iterations, batch_size (global), micro_batch (in a process; 0: all at once),
    device, precision, workers, log_every, save_every, sample_every. Raises UserError, with nothing written, if one of them
    cannot work.
    micro_multiple: what a micro-batch must be a multiple of; free: the flags in which a continuation may differ.
    """

    def __init__(self, config, micro_multiple=1, free=FREE_FLAGS):
        self.free = free
        self.config, self.out = config, Path(config.out)
        self.checkpoints = self.out / "checkpoint"
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for name in ("iterations", "batch_size", "log_every", "save_every", "sample_every"):
            if getattr(config, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
        self.workers = getattr(config, "workers", 0)
        for name, value in (("seed", config.seed), ("workers", self.workers)):
            if value < 0:
                raise UserError(f"--{name} {value}: must not be negative")
        if config.batch_size % self.world:
            raise UserError(f"--batch-size {config.batch_size}: the global batch is not divisible by {self.world} processes")
        local = config.batch_size // self.world
        micro = config.micro_batch or local
        if micro < 0 or local % micro:
            raise UserError(f"--micro-batch {micro}: does not divide the {local} samples of each process")
        if micro % micro_multiple:
            raise UserError(f"--batch-size {config.batch_size}: gives {micro} samples at once, "
                            f"which must be a multiple of {micro_multiple}")
        if config.precision not in ("fp32", "bf16"):
            raise UserError(f"--precision {config.precision}: unknown; choose fp32 or bf16")
        # Who draws samples: the first process, or all, for the blocks of a sharded network are gathered from all.
        self.shows = self.rank == 0 or getattr(config, "shard", False)
        self.rows = slice(self.rank * local, (self.rank + 1) * local)
        self.micro_batches = [slice(i, i + micro) for i in range(0, local, micro)]
        self.device = choose_device(config.device)
        self.source = self._find_checkpoint()
        self.start = int(self.source.name) if self.source else 0
        self.signal = 0
        start_processes(self.device)
        if self.world > 1:
            starts = [None] * self.world
            dist.all_gather_object(starts, self.start)
            if len(set(starts)) > 1:
                raise UserError(f"--out {config.out}: the processes find different checkpoints; use a disk that all share")
        torch.manual_seed(config.seed)  # the same weights on every rank

    def _find_checkpoint(self):
        # The run's own checkpoint comes first, so that the same command, with or without --resume, continues it.
        source = latest_checkpoint(self.checkpoints)
        if not source and self.config.resume:
            source = latest_checkpoint(Path(self.config.resume) / "checkpoint")
            if not source:
                raise UserError(f"--resume {self.config.resume}: there is no checkpoint in it")
        if not source:
            return None
        saved = {field.name: field.default for field in dataclasses.fields(self.config)} | checkpoint_note(source)["config"]
        differing = [f"--{name.replace('_', '-')} was {saved[name]}, is {value}"
                     for name, value in dataclasses.asdict(self.config).items() if name not in self.free and saved[name] != value]
        if differing:
            raise UserError(f"{source}: belongs to another configuration ({'; '.join(differing)}); "
                            "repeat that run's flags, or choose another --out")
        return source

    def make_folder(self):
        """Makes the run's folder. Raises UserError if it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):
                pass
        except OSError as error:
            raise UserError(f"--out {self.config.out}: cannot write there ({error.strerror}); choose another folder")

    def begin(self, parts):
        """Called once everything is built: makes the folder, loads the checkpoint into parts, catches the signals.

        parts: name -> module, optimiser or EMA; all of them go into checkpoints. Log lines after the checkpoint are dropped.
        """
        self.make_folder()
        if self.source:
            load_parts(self.source, parts)
        elif self.world > 1:
            for part in parts.values():
                if isinstance(part, (torch.nn.Module, Weights, EMA)):
                    for tensor in part.state_dict().values():
                        if not isinstance(tensor, DTensor):
                            dist.broadcast(tensor, 0)
        self.parts = parts
        if self.source and self.source.parent != self.checkpoints:
            self.save(self.start)  # from another run: this one can now be continued on its own
        if self.rank == 0:
            write_text(self.out / "config.json", json.dumps(dataclasses.asdict(self.config), indent=1))
            log = self.out / "metrics.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            # A line that a kill cut short has no closing brace.
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["iteration"] <= self.start]
            if kept != lines:
                write_text(log, "\n".join(kept))
        self.old_handlers = {number: signal.signal(number, lambda number, frame: setattr(self, "signal", number))
                             for number in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.config.iterations, initial=self.start, disable=self.rank > 0, smoothing=0.05,
                        mininterval=0.5 if sys.stderr.isatty() else 30)
        self.window, self.skipped = [], set()
        self.window_start, self.window_iteration = time.perf_counter(), self.start

    def forecast(self, networks, step, iterations=None):
        """Says before the first step what the run will take, on stderr and in OUT/forecast.json. Called after begin.

        networks: name -> module; step: a function of the iteration that does one; iterations: as for cost_of_step, else the last.
        """
        if self.rank > 0:
            return
        optimizers = [part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer)]
        shared = {network: [name for name, other in networks.items() if other is network] for network in networks.values()}
        networks = {" and ".join(names): network for network, names in shared.items()}
        try:
            cost = cost_of_step(self, networks, optimizers, step, iterations or {self.config.iterations - 1: 1.0})
        except Exception as error:  # no run may end for want of its forecast
            tqdm.write(f"no forecast of time and memory: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return
        rate, left = matmul_rate(self.device, self.config.precision), self.config.iterations - self.start
        cost |= dict(matmul_TFLOP_per_second=rate, least_hours=left * cost["TFLOP"] / rate / 3600)
        write_text(self.out / "forecast.json", json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in cost.items()}))
        sizes = ", ".join(f"{name} {size / 1e6:.3g} M" for name, size in cost["parameters"].items())
        calls = ", ".join(f"{name} {forward:.3g} ({backward:.3g})" for name, (forward, backward) in cost["calls"].items())
        tqdm.write(f"parameters: {sizes}; trained: {cost['trained'] / 1e6:.3g} M\n"
                   f"a step calls (those with a backward pass): {calls}; {cost['TFLOP']:.3g} TFLOP for "
                   f"{self.rows.stop - self.rows.start} samples\n"
                   f"memory: about {cost['memory_GB']:.3g} GB of tensors; {left} steps: at least {cost['least_hours']:.2g} hours, "
                   f"at the {rate:.3g} TFLOP/s of matrix products here", file=sys.stderr)
        self.window_start = time.perf_counter()

    def draws(self, iteration):
        """The random numbers of this iteration, for this rank's rows of the batch."""
        return Draws(self.config.seed, iteration, self.config.batch_size, self.rows, self.device)

    def batches(self, dataset):
        """This rank's (x0 in [-1, 1] on the device, captions) of every iteration still to come."""
        size, rows = self.config.batch_size, self.rows
        order = (sample_order(dataset, self.config.seed, range(i * size + rows.start, i * size + rows.stop))
                 for i in range(self.start, self.config.iterations))
        # With a generator of its own the loader leaves the global one alone.
        loader = DataLoader(dataset, batch_sampler=order, num_workers=self.workers, collate_fn=list,
                            generator=torch.Generator(), worker_init_fn=ignore_signals)
        for samples in loader:
            for path in sorted({p for s in samples for p in s["skipped"]} - self.skipped):
                self.skipped.add(path)
                tqdm.write(f"skipped, cannot be read as a picture: {path} ({len(self.skipped)} so far)", file=sys.stderr)
            x0 = torch.stack([s["image"] for s in samples]).to(self.device)
            yield to_floats(x0), [s["caption"] for s in samples]

    def prompts(self, prompts):
        """This rank's prompts, a list, of every iteration still to come, in the order of an endless shuffled pass."""
        size, rows, n = self.config.batch_size, self.rows, len(prompts)
        for i in range(self.start, self.config.iterations):
            counters = range(i * size + rows.start, i * size + rows.stop)
            yield [prompts[permutation(self.config.seed, c // n, n)[c % n]] for c in counters]

    def autocast(self):
        """bf16 for the networks under --precision bf16; weights and losses stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def average_gradients(self, parameters):
        """Mean of the parameters' gradients over the ranks; a sharded network has taken its own in the backward pass."""
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        if self.world == 1:
            return
        # In few exchanges, for in each the ranks wait for each other; but not in one, which would be a copy of all gradients.
        ends = accumulate(g.numel() for g in gradients)
        for _, bucket in groupby(zip(ends, gradients), lambda pair: pair[0] // EXCHANGED_AT_ONCE):
            bucket = [g for _, g in bucket]
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            means = flat.div_(self.world).split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [m.view_as(g) for m, g in zip(means, bucket)])
            del flat, means  # before the next piece is copied

    def finish_iteration(self, iteration, losses):
        """Logs, saves where it is time to, and returns True if the run must stop now (Ctrl-C or SIGTERM on any rank).

        losses: name -> scalar tensor. Raises UserError with the iteration and the loss's name if one was not finite.
        """
        done, config = iteration + 1, self.config
        # The vote is taken on the host: it does not wait for the device.
        vote = torch.tensor(int(self.signal))
        if self.world > 1:
            dist.all_reduce(vote, dist.ReduceOp.MAX)
        self.signal = int(vote)
        saves = done % config.save_every == 0 or done == config.iterations or self.signal > 0
        self._log(done, losses, flush=saves or done % config.log_every == 0)
        if saves:
            self.save(done)
        return self.signal > 0

    def _log(self, done, losses, flush):
        # Between log lines nothing is read from the device; a loss that an iteration does not have leaves no trace in its mean.
        self.window.append((done, {name: value.detach() for name, value in losses.items()}))
        self.bar.update()
        if not flush:
            return
        names = list(dict.fromkeys(name for _, values in self.window for name in values))
        means, first_bad = [], []
        for name in names:
            found = [(n, values[name]) for n, values in self.window if name in values]
            iterations, values = torch.tensor([n for n, _ in found], device=self.device), torch.stack([v for _, v in found]).float()
            means.append(values.mean())
            first_bad.append(torch.where(values.isfinite(), torch.inf, iterations.float()).min())
        means, first_bad = torch.stack(means), torch.stack(first_bad)
        if self.world > 1:
            dist.all_reduce(means)
            dist.all_reduce(first_bad, dist.ReduceOp.MIN)
        first_bad = first_bad.tolist()
        if min(first_bad) < torch.inf:
            self.bar.close()
            name = names[first_bad.index(min(first_bad))]
            last = latest_checkpoint(self.checkpoints)
            kept = f"the checkpoint of iteration {int(last.name)} is kept" if last else "no checkpoint had been written yet"
            raise UserError(f"iteration {int(min(first_bad))}: {name} is not finite, stopped; {kept}; "
                            "lower --lr, or use --precision fp32")
        now, count = time.perf_counter(), done - self.window_iteration
        row = {k: v / self.world for k, v in zip(names, means.tolist())}
        self.bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in row.items()), refresh=False)
        row |= dict(images_per_second=count * self.config.batch_size / (now - self.window_start),
                    peak_memory_gb=self._peak_memory_gb())
        row = dict(iteration=done, **{k: float(f"{v:.6g}") for k, v in row.items()}, skipped_pictures=len(self.skipped))
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        self.window, self.window_start, self.window_iteration = [], now, done

    def _peak_memory_gb(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30

    def save(self, done):
        """Writes the state after `done` iterations into a new folder, moved into place when complete; then the one before it goes.

        Every process writes what it holds, as safetensors; a note beside them, checkpoint.json, lists the files.
        """
        folder, new = self.checkpoints / f"{done:08d}", self.checkpoints / "new"
        if self.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
        try:
            if self.world > 1:
                dist.barrier()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is enough
                dcp.save(flat_state(self.parts), storage_writer=dcp.HuggingFaceStorageWriter(str(new), save_distributed=True))
            if self.rank == 0:
                files = {file.name: file.stat().st_size for file in new.iterdir()}
                write_text(new / "checkpoint.json", json.dumps(dict(config=dataclasses.asdict(self.config), files=files)))
                for path in (*new.iterdir(), new):  # on the disk before it gets its name
                    handle = os.open(path, os.O_RDONLY)
                    os.fsync(handle)
                    os.close(handle)
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
                for old in self.checkpoints.iterdir():
                    if old != folder:
                        shutil.rmtree(old, ignore_errors=True)
        except (OSError, dcp.CheckpointException) as error:
            if isinstance(error, dcp.CheckpointException):
                error = next(iter(error.failures.values()))[0]
            shutil.rmtree(new, ignore_errors=True)
            raise UserError(f"{folder}: iteration {done} cannot be saved ({error}); the one before it is kept")

    def end(self):
        """Closes the run; after a signal, says how to go on and exits with 128 + its number."""
        self.bar.close()
        self.parts = None  # an adaptation's optimiser must not live on through the training
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if self.signal:
            if self.rank == 0:
                print(f"stopped, saved to {self.checkpoints}; the same command continues", file=sys.stderr)
            sys.exit(128 + self.signal)


def write_text(path, text):
    """Writes a file and moves it to `path` when it is complete; a last line break is added where there is text."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_text(text + "\n" if text else "", encoding="utf-8")
    os.replace(temporary, path)


def read_config(config_class, path):
    """The configuration that a run wrote. Raises UserError if it is missing, damaged or another script's."""
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(Path(path).read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the configuration of a run of this script ({error})")


def flat_state(parts):
    """The tensors that a run's parts consist of, by "part.key"; an Adam's are numbered as its parameters."""
    state = {}
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            parameters = [p for group in part.param_groups for p in group["params"]]
            state |= {f"{name}.{i}.{key}": value for i, p in enumerate(parameters) for key, value in part.state.get(p, {}).items()}
        else:
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    return {key: value.view(1) if value.dim() == 0 else value for key, value in state.items()}


def latest_checkpoint(folder):
    """The folder of the last complete checkpoint in a run's checkpoint/, named by its iteration, or None."""
    found = [path for path in Path(folder).glob("[0-9]*") if (path / "checkpoint.json").exists()]
    return max(found, default=None)


def checkpoint_note(path):
    """The note of a checkpoint folder: dict(config, files). Raises UserError if it or a file beside it is damaged."""
    try:
        note = json.loads((path / "checkpoint.json").read_text())
        note["config"] = {k: tuple(v) if isinstance(v, list) else v for k, v in note["config"].items()}
        damaged = [name for name, size in note["files"].items() if (path / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: damaged or not a checkpoint ({error}); delete it to start this run anew")
    if damaged:
        raise UserError(f"{path}: damaged, {damaged[0]} has not the size it was written with; delete it to start this run anew")
    return note


def load_tensors(path, state):
    """Fills a flat state from a checkpoint folder; each process reads what it needs. Raises UserError if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise UserError(f"{path}: damaged or not a checkpoint of this run ({type(error).__name__}); delete it to start this run anew")


def stored_tensors(path):
    """key -> (shape, dtype) of a checkpoint folder. Raises UserError if it is damaged."""
    try:
        tensors = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"{path}: damaged or not a checkpoint ({type(error).__name__}); delete it to start this run anew")
    return {key: (value.size, value.properties.dtype) for key, value in tensors.items()}


def load_parts(path, parts):
    """Puts a checkpoint into a run's parts, whatever the number of processes that wrote it."""
    stored = stored_tensors(path)
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            parameters = [p for group in part.param_groups for p in group["params"]]
            for key in stored:
                if key.startswith(f"{name}."):
                    number, kind = key.removeprefix(f"{name}.").split(".")
                    p = parameters[int(number)]
                    part.state[p][kind] = torch.zeros((), device=p.device) if kind == "step" else torch.zeros_like(p)
    load_tensors(path, flat_state(parts))


def read_checkpoint(folder):
    """The last checkpoint in a run's checkpoint/, in memory: dict(iteration, config, state), state by part and key.

    Raises UserError if it is missing or damaged.
    """
    path = latest_checkpoint(folder)
    if not path:
        raise UserError(f"{folder}: no checkpoint yet; a run writes it every --save-every iterations")
    note = checkpoint_note(path)
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in stored_tensors(path).items()}
    load_tensors(path, tensors)
    state = {}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        state.setdefault(part, {})[name] = value
    return dict(iteration=int(path.name), config=note["config"], state=state)


# One-step students

def last_timestep(student, n, device):
    """t = T - 1 for n samples."""
    return torch.full((n,), len(student.schedule) - 1, device=device)


def one_step(student, z, cond):
    """f_theta(z, y): z [B, C, H, W] -> x0, without guidance."""
    return student.predict(z, last_timestep(student, len(z), z.device), "sample", cond)


def chunks_of(prompts, codec, seed):
    """Yields (prompts, noise [n, C, H, W]) for chunks of pictures; drawn on the CPU, the same on every device."""
    chunk = chunk_for(codec)
    for first in range(0, len(prompts), chunk):
        y = prompts[first:first + chunk]
        yield y, Draws(seed, first, len(y), slice(None), "cpu").randn(*codec.shape).to(codec.device)


@torch.no_grad()
def draw_samples(student, codec, prompts, seed):
    """One-step pictures in [-1, 1], [N, 3, H, W], on the CPU, the same for the same seed."""
    return torch.cat([codec.decode(one_step(student, z, codec.cond(y))).clamp(-1, 1).cpu() for y, z in chunks_of(prompts, codec, seed)])


@torch.no_grad()
def draw_many_steps(teacher, codec, prompts, steps, guidance_scale, seed=0):
    """The same from the same noise by a teacher's DDIM."""
    return torch.cat([codec.decode(ddim_sample(teacher, z, steps, codec.cond(y), codec.null(len(y)), guidance_scale)).clamp(-1, 1).cpu()
                      for y, z in chunks_of(prompts, codec, seed)])


def dense_copy(net, state, device):
    """A network of the same architecture with the weights `state`, in eval mode."""
    new = class_of(net).from_config(net.config)
    new.load_state_dict(state)
    return new.to(device).eval()


def starting_student(student, lora, model, teacher, codec):
    """Where a one-step student starts, as a frozen Denoiser: the flags --student, with --lora, or the teacher itself (--model).

    student: a diffusers pipeline, or a file of network weights for the teacher's architecture (.safetensors, or a checkpoint
    that torch.load reads without unpickling code; local, or on the hub as OWNER/NAME/FILE). Its schedule may end at a lower
    timestep than the teacher's. Raises UserError if it does not fit the teacher.
    """
    if not student and not lora:
        return teacher
    if student.endswith((".safetensors", ".bin", ".pt", ".pth")):
        if lora:
            raise UserError("--lora: goes on a pipeline, not on a file of weights; give --student a directory")
        return Denoiser(_network_of(student, teacher.net, codec.device), teacher.schedule, teacher.prediction_type)
    start, start_codec = load(student or model, codec.device, lora)
    if start_codec.shape != codec.shape:
        raise UserError(f"--student {student}: works on x0 of shape {start_codec.shape}, --model {model} on {codec.shape}")
    shapes = [{k: v.shape for k, v in d.net.state_dict().items()} for d in (start, teacher)]
    if shapes[0] != shapes[1]:
        raise UserError(f"--student {student}: another architecture than --model {model}; give two of the same")
    n = len(start.schedule)
    if n > len(teacher.schedule) or not torch.allclose(start.schedule.alpha, teacher.schedule.alpha[:n], atol=1e-6):
        raise UserError(f"--student {student}: another noise schedule than --model {model}; give two of the same")
    return start


def _network_of(path, net, device):
    try:
        if not Path(path).exists() and path.count("/") >= 2 and not path.startswith((".", "/")):
            from huggingface_hub import hf_hub_download
            owner, name, file = path.split("/", 2)
            path = hf_hub_download(f"{owner}/{name}", file)
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        return dense_copy(net, state, device).requires_grad_(False)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"--student {path}: not weights of --model's network ({' '.join(str(error).split())[:300]})")


def convert(run, codec, start, prediction, prompts):
    """The start as a network that predicts `prediction`: a regression of its x0 at the last timestep onto its old one, clamped.

    At that timestep an epsilon network's x0 carries 1 / alpha_T times its error (14.6 for SD), a v network's x0 is about -v.
    Reads from the run's config: convert_lr, convert_clamp, clip_norm, gradient_checkpointing. Exports to OUT/pipeline.
    """
    config = run.config
    net = dense_copy(start.net, fold_lora(start.net, None), codec.device).requires_grad_(True)
    shard(config, net)
    if config.gradient_checkpointing:
        enable_checkpointing(net)
    student = Denoiser(net, start.schedule, prediction)
    optimizer = torch.optim.AdamW(net.parameters(), config.convert_lr, weight_decay=0.0, fused=True)
    run.begin(dict(student=net, optimizer=optimizer))
    for iteration, y in enumerate(run.prompts(prompts), run.start):
        z, cond = run.draws(iteration).randn(*codec.shape), codec.cond(y)
        optimizer.zero_grad()
        scalars = []
        for rows in run.micro_batches:
            with run.autocast():
                with torch.no_grad():
                    target = one_step(start, z[rows], part_of(cond, rows)).clamp(-config.convert_clamp, config.convert_clamp)
                loss = (one_step(student, z[rows], part_of(cond, rows)) - target).square().mean()
            (loss / len(run.micro_batches)).backward()
            scalars.append(dict(L_convert=loss))
        run.average_gradients(net.parameters())
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
        optimizer.step()
        if run.finish_iteration(iteration, mean_of(scalars)):
            break
    run.end()
    optimizer.zero_grad()
    if run.shows:
        state = fold_lora(net, None)
        if run.rank == 0:
            # A LoRA student's file belongs on top of this.
            export_one_step(codec, dense_copy(net, state, "cpu"), prediction, run.out / "pipeline", len(start.schedule))
    net.requires_grad_(False)
    return student


def export_student(run, codec, student, ema, **more):
    """The averaged student as a pipeline in OUT/pipeline, made on the CPU; a LoRA also as a file of its own.

    more: as for export_one_step. Every process calls it.
    """
    if not run.shows:
        return
    with ema.applied() if student.adapter else nullcontext():
        state = {key: value.cpu() for key, value in fold_lora(student.net, student.adapter).items()}
        if student.adapter and run.rank == 0:
            save_lora(codec, student.net, student.adapter, run.out)
    if not student.adapter:
        state |= {name: whole(average).cpu() for name, average in ema.average.items()}
    if run.rank == 0:
        export_one_step(codec, dense_copy(student.net, state, "cpu"), student.prediction_type, run.out / "pipeline",
                        len(student.schedule), **more)


def load_teacher(model, dataset, device):
    """--model as (Denoiser, Codec); where CIFAR-10's cannot be had, the error says how to train one."""
    try:
        return load(model, device)
    except UserError as error:
        if dataset == "cifar10":
            raise UserError(f"{error}; or train one: python tools/pretrain.py --dataset cifar10 --out runs/teacher, "
                            "then --model runs/teacher")
        raise


def prompts_of(config, codec):
    """The prompts of the run: --prompts, the model's classes, or the captions of --dataset. Raises UserError if there is none."""
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


def part_of(value, rows):
    """The rows of a tensor, a list or a condition; a number stays what it is."""
    if isinstance(value, dict):
        return map_cond(lambda v: v[rows], value)
    return value if isinstance(value, float) else value[rows]
