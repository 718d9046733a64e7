"""The parts that all methods share and a reader of a method needs; a run's machinery is in plumbing/.

One convention everywhere: x_t = alpha_t x0 + sigma_t eps, alpha_t = sqrt(alphas_cumprod[t]), alpha_t^2 +
sigma_t^2 = 1. x0 is a picture in [-1, 1] or a latent, [B, C, H, W]; t is an integer tensor [B]; coefficients
come as [B, 1, 1, 1].

Sections: noise schedule, denoiser, precision, sampling, half-UNet, learning rates, EMA, distances,
conditions, pretrained models, LoRA, scorers.
"""

import copy
import json
import os
import re
import sys
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel


class UserError(Exception):
    """Wrong input, told in one plain line: the flag or file, what is wrong, what to do."""


# Noise schedule

# The entries of a diffusers scheduler config that define the noise levels.
BETA_NAMES = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
              "rescale_betas_zero_snr")


def broadcast(values, t, like):
    """values[t] as [B, 1, 1, 1], beside a tensor `like` [B, C, H, W]."""
    return values[t].view(-1, *[1] * (like.ndim - 1))


class NoiseSchedule:
    """alpha_t and sigma_t of x_t = alpha_t x0 + sigma_t eps, as float32 tables over the T timesteps.

    A checkpoint's schedule is fully described by its diffusers scheduler config (betas, trained_betas,
    beta_schedule, rescale_betas_zero_snr), so that config is the only way in.
    """

    def __init__(self, alphas_cumprod):
        alphas_cumprod = alphas_cumprod.double()
        self.alpha = alphas_cumprod.sqrt().float()  # [T]
        self.sigma = (1 - alphas_cumprod).sqrt().float()  # [T]

    @classmethod
    def from_config(cls, config):
        """From a diffusers scheduler config (a dict or a scheduler's .config); only its betas matter."""
        betas = {name: config[name] for name in BETA_NAMES if name in config}
        return cls(diffusers.DDPMScheduler(**betas).alphas_cumprod)

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
        """One prediction type into another, in float32. Types: "sample" (x0), "epsilon", "v_prediction".

        v = alpha eps - sigma x0. An error in epsilon grows by sigma / alpha in x0 (14.6 at SD's last
        timestep, 157 at PixArt's), and x0 from epsilon is not defined where alpha = 0. Raises ValueError on
        an unknown type.
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
        raise ValueError(f"unknown prediction type {target}")


# Denoiser

class Denoiser:
    """A diffusers network, its schedule and its prediction type, as one function of (x_t, t, condition).

    net: UNet2DModel, UNet2DConditionModel or PixArtTransformer2DModel; the condition is a dict of the
    network's own keyword arguments, so that one call serves them all. adapter: the LoRA that is on in this
    denoiser's calls, or None for the bare weights. Several denoisers can share one net: a frozen teacher and
    a trained one are the same weights with the adapter off and on.
    """

    def __init__(self, net, schedule, prediction_type, adapter=None):
        self.net, self.schedule, self.prediction_type, self.adapter = net, schedule, prediction_type, adapter

    def predict(self, x_t, t, target="sample", cond=None, null=None, guidance_scale=1.0):
        """The prediction as `target` ("sample", which is x0, "epsilon" or "v_prediction"), [B, C, H, W].

        Classifier-free guidance: null + guidance_scale (cond - null), a number or [B, 1, 1, 1]; the number 1
        calls the network once, without null.
        """
        output = self._forward(x_t, t, cond)
        if torch.is_tensor(guidance_scale) or guidance_scale != 1.0:
            unconditional = self._forward(x_t, t, null)
            output = unconditional + guidance_scale * (output - unconditional)
        return self.schedule.convert(output, x_t, t, self.prediction_type, target)

    def _forward(self, x_t, t, cond):
        with use_lora(self.net, self.adapter):
            # Networks with learned sigma (PixArt) return 2C channels, of which the first C are the
            # prediction.
            return self.net(x_t, timestep=t, **(cond or {})).sample[:, :x_t.shape[1]].float()

    def with_lora(self, name, rank, alpha, targets=None, init="default"):
        """A Denoiser of the same net with a new LoRA on, which is trainable and starts as no change.

        This Denoiser goes on running on the bare weights, which are frozen from here on. init: see add_lora.
        """
        add_lora(self.net, name, rank, alpha, targets or LORA_TARGETS, init)
        return Denoiser(self.net, self.schedule, self.prediction_type, name)

    def trainable(self):
        """The trained weights by name: those of the adapter, or those of the net that are not frozen."""
        return Weights((name, p) for name, p in self.net.named_parameters() if p.requires_grad
                       and (f".{self.adapter}." in name if self.adapter else "lora_" not in name))


@contextmanager
def frozen(network):
    """Inside the with block no parameter of the network gets a gradient, but its input still does."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@torch.no_grad()
def ddim_sample(denoiser, x_T, steps, cond=None, null=None, guidance_scale=1.0):
    """Deterministic DDIM from x_T [B, C, H, W] to x0 in `steps` steps.

    They are spaced like diffusers' "trailing" and end at alpha = 1. One step is the one-step prediction at
    the last timestep. Raises UserError if there are fewer timesteps than steps.
    """
    schedule, T = denoiser.schedule, len(denoiser.schedule)
    if not 1 <= steps <= T:
        raise UserError(f"DDIM of {steps} steps: the model has {T} timesteps")
    timesteps = [round(T - i * T / steps) - 1 for i in range(steps)]
    x_t = x_T
    for i, timestep in enumerate(timesteps):
        t = torch.full((len(x_t),), timestep, device=x_t.device)
        # x0 first: where alpha_T = 0 it cannot be had from eps.
        x0 = denoiser.predict(x_t, t, "sample", cond, null, guidance_scale)
        eps = schedule.convert(x0, x_t, t, "sample", "epsilon")
        x_t = schedule.add_noise(x0, eps, torch.full_like(t, timesteps[i + 1])) if i + 1 < steps else x0
    return x_t


def one_step(student, z, cond):
    """f_theta(z, y), the one-step picture: z ~ N(0, I) [B, C, H, W] -> x0, at the last timestep, unguided."""
    t = torch.full((len(z),), len(student.schedule) - 1, device=z.device)
    return student.predict(z, t, "sample", cond)


# Precision

def hold_in_bf16(*networks):
    """Rounds frozen networks to bf16, in which they run from here on, with or without autocast around them.

    That halves their memory, and spares the rounding in each call. It is for networks that only judge: what
    is trained, averaged or exported stays float32. Their outputs are bf16.
    """
    for network in networks:
        network.to(torch.bfloat16)
        device_type = next(network.parameters()).device.type
        for name in ("forward", "decode", "get_image_features", "get_text_features",
                     "encode_image", "encode_text"):
            if hasattr(network, name):
                # One context each: it keeps what to go back to, so that it cannot be entered twice.
                setattr(network, name, torch.autocast(device_type, torch.bfloat16)(getattr(network, name)))


# Sampling

class Draws:
    """The random numbers of one iteration, in sampling of one chunk: a function of (seed, iteration) alone.

    Every rank draws the numbers of the whole global batch and keeps its own rows, so that a run gives the
    same result on any number of ranks, and resuming needs no generator state.
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
        shape = (self.batch_size,)
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)[self.rows]


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
        tensors = dict(mean=self.mean.cpu().contiguous(), std=self.std.cpu().contiguous())
        save_file(tensors, Path(folder) / self.FILE)

    @classmethod
    def read(cls, folder, device="cpu"):
        """The prior that save() wrote into the folder, or None if there is none.

        Raises UserError if it is damaged.
        """
        path = Path(folder) / cls.FILE
        try:
            return cls(**load_file(path, str(device))) if path.is_file() else None
        except (OSError, TypeError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})")


def chunk_for(codec):
    """How many pictures to make at once outside of training: 64 of 64 x 64 pixels, fewer of larger ones."""
    return max(1, min(256, 64 * 64**2 // codec.picture_size**2))


def chunks_of(prompts, codec, seed):
    """Yields (prompts, noise [n, C, H, W]) of chunks; noise drawn on the CPU, the same on every device."""
    chunk = chunk_for(codec)
    for first in range(0, len(prompts), chunk):
        y = prompts[first:first + chunk]
        yield y, Draws(seed, first, len(y), slice(None), "cpu").randn(*codec.shape).to(codec.device)


@torch.no_grad()
def draw_samples(student, codec, prompts, seed):
    """One-step pictures in [-1, 1], [N, 3, H, W], on the CPU, the same for the same seed."""
    pictures = [codec.decode(one_step(student, z, codec.cond(y))) for y, z in chunks_of(prompts, codec, seed)]
    return torch.cat([p.clamp(-1, 1).cpu() for p in pictures])


@torch.no_grad()
def draw_many_steps(teacher, codec, prompts, steps, guidance_scale, seed=0):
    """The pictures that a teacher's DDIM draws from the noise of draw_samples.

    A teacher with fewer timesteps than `steps` takes one step a timestep.
    """
    pictures, steps = [], min(steps, len(teacher.schedule))
    for y, z in chunks_of(prompts, codec, seed):
        x0 = ddim_sample(teacher, z, steps, codec.cond(y), codec.null(len(y)), guidance_scale)
        pictures.append(codec.decode(x0).clamp(-1, 1).cpu())
    return torch.cat(pictures)


# Features of half a UNet

class HalfUNet(torch.nn.Module):
    """The down and mid blocks of a UNet2DConditionModel, as features for YOSO's distance and discriminator.

    The half is a copy, and `unet` is left as it is; with `share`, the weights stay unet's own. A LoRA that
    unet is given later is not in the half.
    """

    def __init__(self, unet, share=False):
        super().__init__()
        # deepcopy replaces the parts in memo instead of copying them; diffusers' own forward then ends with
        # the mid block's output.
        memo = {id(unet.up_blocks): torch.nn.ModuleList(), id(unet.conv_norm_out): None,
                id(unet.conv_out): torch.nn.Identity()}
        if share:
            memo |= {id(p): p for p in unet.parameters()}
        self.unet = copy.deepcopy(unet, memo)

    def forward(self, x_t, t, cond):
        """x_t [B, C, H, W], t [B], cond -> features [B, C', H', W'] (SD 1.5 at 64 x 64: 1280 x 8 x 8)."""
        return self.unet(x_t, timestep=t, **cond).sample


# Learning rates

def warmup_share(iteration, lr_warmup):
    """The share of its learning rate that an optimiser has: (iteration + 1) / lr_warmup, up to 1."""
    return min(1.0, (iteration + 1) / lr_warmup) if lr_warmup else 1.0


def set_rates(share, *optimizers):
    """Gives every optimiser this share of the learning rate that it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * optimizer.defaults["lr"]


# EMA

class EMA:
    """Exponential moving average, in float32, of the trainable ones among (name, parameter) pairs.

    ramp: let the decay rise to its value, as diffusers' EMAModel does. At a constant 0.9999, 37 % of the
    average would still be the weights of the start after 10,000 updates.
    """

    def __init__(self, parameters, decay, ramp=False):
        self.decay, self.ramp = decay, ramp
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    def decay_of(self, n):
        """The decay of update n, from 0: with the ramp 0 at first, then min(decay, (1 + n) / (10 + n))."""
        return min(self.decay, (1 + n) / (10 + n) if n else 0.0) if self.ramp else self.decay

    @torch.no_grad()
    def update(self, n):
        """Update n, from 0: average <- decay average + (1 - decay) parameters."""
        parameters = [p.float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - self.decay_of(n))

    @contextmanager
    def applied(self):
        """Inside the with block the parameters hold the averages, and this EMA cannot be asked for them.

        The two, both of float32, change places tensor by tensor: a copy of all would take the memory of one
        more network.
        """
        # So that whoever asks inside fails, rather than take, or save, the weights for the averages.
        averages, self.average, exchanged = self.average, None, []

        @torch.no_grad()
        def exchange(name):
            p, average = self.parameters[name], averages[name]
            kept = p.clone()
            p.copy_(average)
            average.copy_(kept)

        try:
            for name in averages:
                exchange(name)
                exchanged.append(name)
            yield
        finally:
            for name in exchanged:
                exchange(name)
            self.average = averages

    def state_dict(self):
        """The averages by parameter name."""
        return self.average

    def load_state_dict(self, state):
        """Takes averages written by state_dict(); raises KeyError if a name is missing."""
        for name, value in self.average.items():
            value.copy_(state[name])


# Distances

def squared_distance(a, b):
    """d = mean squared difference of each pair: [B, C, H, W] twice -> [B]."""
    return (a - b).square().mean((1, 2, 3))


def load_distance(name, device):
    """"l2" or "lpips" (VGG, of pictures enlarged to 224 pixels) -> (features, distance).

    d(a, b) [B] is distance(features(a), features(b)); a picture's features may serve several distances.
    Raises UserError if the VGG weights cannot be fetched.
    """
    if name == "l2":
        return (lambda x: x), squared_distance
    try:
        import lpips
    except ImportError:
        raise UserError("LPIPS: pip install lpips, or choose the distance l2")
    try:
        network = lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    except OSError as error:
        raise UserError(f"LPIPS: its VGG weights cannot be fetched ({error}); choose the distance l2")

    def features(x):
        """x [B, 3, H, W] -> the unit vectors of each layer's places."""
        enlarged = F.interpolate(x, size=224, mode="bilinear") if x.shape[-1] < 256 else x
        return [lpips.normalize_tensor(h.float()) for h in network.net(network.scaling_layer(enlarged))]

    def distance(a, b):
        """Squared differences, weighted by channel, averaged over places, summed over layers: [B]."""
        with torch.autocast(a[0].device.type, enabled=False):  # a layer's weighting is a convolution
            return sum(layer((x - y)**2).mean((1, 2, 3)) for layer, x, y in zip(network.lins, a, b))

    return features, distance


def x0_weight(f, x0_reference):
    """1 / mean |f - x0_reference| of each sample, without gradient: [B, C, H, W] twice -> [B, 1, 1, 1].

    The weight that SiD (Zhou et al., 2024) and DMD (Yin et al., 2024) put on a difference of x0 predictions,
    so that all noise levels count about alike. An unweighted difference of noise predictions hardly counts at
    high noise, from where a one-step model draws.
    """
    return 1 / (f - x0_reference).detach().abs().mean((1, 2, 3), keepdim=True)


# Conditions

def map_cond(function, *conds):
    """Conditions -> a condition: function over the tensors of equal place; None stays None."""
    first = conds[0]
    if isinstance(first, dict):
        return {k: map_cond(function, *(c[k] for c in conds)) for k in first}
    return None if first is None else function(*conds)


def part_of(value, rows):
    """The rows of a tensor, a list or a condition; a number or None is returned as it is."""
    if isinstance(value, dict):
        return map_cond(lambda v: v[rows], value)
    return value if value is None or isinstance(value, float) else value[rows]


def class_labels(prompts, classes):
    """The index of the class whose name stands in each prompt (the longest, if several do), int64 [B].

    Words and marks are compared one by one, in lower case. Raises UserError on a prompt that names none.
    """
    # Marks count, for they may be all that tells two names apart, and some scripts write vowels as marks.
    word = re.compile(r"\w+|[^\w\s]")
    spaced = lambda text: f" {' '.join(word.findall(text.lower()))} "
    names, labels = {name: spaced(name) for name in classes}, []
    for prompt in prompts:
        words = spaced(prompt)
        found = [name for name in classes if names[name] in words]
        if not found:
            raise UserError(f"prompt {prompt!r}: names no class of the model; its classes are "
                            f"{one_line(', '.join(classes))}")
        labels.append(classes.index(max(found, key=len)))
    return torch.tensor(labels)


# Pretrained models

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtAlphaPipeline", "DDPMPipeline",
             "DDIMPipeline")
PIXELS = PIPELINES[3:]
# The errors that the libraries raise where a part is damaged or missing.
LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError)


def one_line(error):
    """An error's message in one line, cut at 300 characters."""
    return " ".join(str(error).split())[:300]


def load(path_or_id, device="cpu", lora=""):
    """A pretrained diffusers pipeline, a directory or a hub id -> (Denoiser, Codec), frozen float32.

    SD 1.5, 2.1, SDXL, PixArt-alpha, this project's exports, or a UNet2DModel in pixel space
    (`google/ddpm-cifar10-32`; with classes, their names stand beside the pipeline in classes.json). lora:
    directory or file of LoRA weights that are merged into the network. All parts are in eval mode. Raises
    UserError if the pipeline cannot be loaded or is of another class.
    """
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    name, encoders = pipeline_class(path_or_id)
    # The safety checker is a network of its own, of no use for training.
    no_checker = dict(safety_checker=None, requires_safety_checker=False)
    classes = Path(path_or_id) / "classes.json"
    try:
        # transformers fills what is missing with random numbers, diffusers with none; neither fails.
        parts = {part: complete(getattr(transformers, encoder), path_or_id, subfolder=part)
                 for part, encoder in encoders.items()}
        pipe = getattr(diffusers, name).from_pretrained(
            path_or_id, dtype=torch.float32, **parts,
            **(no_checker if name == "StableDiffusionPipeline" else {}))
        for part, module in pipe.components.items():
            check_weights(part, module)
        names = [str(name) for name in json.loads(classes.read_text())] if classes.is_file() else None
    except LOAD_ERRORS as error:
        raise cannot_load(path_or_id, error)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()  # from here on; the Codec warns of long prompts itself, once
    if hasattr(pipe, "text_encoder") and len(pipe.tokenizer) < pipe.text_encoder.config.vocab_size // 2:
        raise UserError(f"{path_or_id}: a part is missing or damaged, its tokenizer knows only "
                        f"{len(pipe.tokenizer)} tokens")
    if lora:
        merge_lora_file(pipe, lora)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).eval().requires_grad_(False)
    net = getattr(pipe, "transformer", None) or pipe.unet
    schedule = NoiseSchedule.from_config(pipe.scheduler.config).to(device)
    return (Denoiser(net, schedule, pipe.scheduler.config.get("prediction_type", "epsilon")),
            Codec(pipe, names))


def complete(model_class, path_or_id, **where):
    """A transformers model of float32, pretrained. Raises ValueError if weights are missing."""
    model, report = model_class.from_pretrained(path_or_id, dtype=torch.float32, output_loading_info=True,
                                                **where)
    if report["missing_keys"]:  # they would be random
        raise ValueError(f"{where.get('subfolder', 'the model')} lacks the weights "
                         f"{' '.join(sorted(report['missing_keys']))}")
    return model


def check_weights(name, module):
    """Raises ValueError if weights of a diffusers network are missing."""
    parameters = module.named_parameters() if isinstance(module, torch.nn.Module) else ()
    missing = [key for key, p in parameters if p.is_meta]
    if missing:
        raise ValueError(f"{name} lacks the weights {' '.join(missing)}")


def pipeline_class(path_or_id):
    """The name of a pipeline's class and those of its text encoders, by part, from its model_index.json.

    Raises UserError on a pipeline that `load` cannot load.
    """
    local, name = Path(path_or_id).is_dir(), str(path_or_id)
    if not local and (Path(path_or_id).exists() or name.count("/") != 1 or name.startswith((".", "/"))):
        raise UserError(f"{path_or_id}: there is no such directory; give that of a diffusers pipeline, "
                        "or a hub id, OWNER/NAME")
    if local and not (Path(path_or_id) / "model_index.json").is_file():
        raise UserError(f"{path_or_id}: not a diffusers pipeline, it has no model_index.json; "
                        "give the directory that holds one")
    try:
        index = diffusers.DiffusionPipeline.load_config(path_or_id)
        name = index["_class_name"]
    except LOAD_ERRORS as error:
        raise cannot_load(path_or_id, error)
    if name not in PIPELINES:
        raise UserError(f"{path_or_id}: a {name}, which is not supported; give one of {', '.join(PIPELINES)}")
    parts = [part for part, source in index.items()
             if isinstance(source, list) and source[0] and part != "safety_checker"]
    missing = [part for part in parts if not (Path(path_or_id) / part).is_dir()]
    if local and missing and name not in PIXELS:  # google/ddpm-cifar10-32 has no folders
        raise UserError(f"{path_or_id}: a part is missing, the folder {missing[0]}/")
    return name, {part: index[part][1] for part in parts if part.startswith("text_encoder")}


def cannot_load(path_or_id, error):
    """The UserError for a pipeline that a library could not load."""
    if Path(path_or_id).is_dir():
        return UserError(f"{path_or_id}: cannot be loaded, a part is missing or damaged ({one_line(error)})")
    return UserError(f"{path_or_id}: neither a local directory nor to be had from the Hugging Face hub "
                     f"({one_line(error)}); a local directory works without a network")


class Codec:
    """The input and output sides of a network: prompts -> its condition, pictures <-> its x0.

    pipe: the pipeline (its parts are used: tokenizers, text encoders, VAE). x0 has the shape [B,
    *self.shape]: latents, or the pictures themselves for a pixel-space model, whose condition is the class
    that a prompt names, or nothing. Pictures are [B, 3, H, W] in [-1, 1]; conditions are dicts of the
    network's keyword arguments.
    """

    def __init__(self, pipe, classes=None):
        self.pipe, self.classes, self.name = pipe, classes, type(pipe).__name__
        net = getattr(pipe, "transformer", None) or pipe.unet
        self.shape = (net.config.in_channels, net.config.sample_size, net.config.sample_size)
        self.vae = getattr(pipe, "vae", None)
        self.picture_size = self.shape[-1] * (pipe.vae_scale_factor if self.vae is not None else 1)
        self.guided = self.name not in PIXELS or net.config.num_class_embeds is not None
        if self.vae is None and self.guided and classes is None:
            # A published class-conditional network without names: prompts name a class by its number, and the
            # last class is "none".
            self.classes = [str(i) for i in range(net.config.num_class_embeds - 1)]
        self.has_null = self.guided and (self.vae is not None
                                         or net.config.num_class_embeds > len(self.classes))
        self.device = next(net.parameters()).device
        self.cache = None  # see cache_conditions
        # A tokenizer that has been used would be exported with its last padding and truncation.
        folders = {name: Path(part.name_or_path) for name, part in pipe.components.items()
                   if name.startswith("tokenizer") and part.name_or_path}
        self.tokenizer_files = {f"{name}/{file.name}": file.read_bytes() for name, folder in folders.items()
                                if folder.is_dir() for file in folder.iterdir() if file.is_file()}

    @torch.no_grad()
    def cond(self, prompts):
        """Prompts -> the condition, batch B.

        Raises UserError if a prompt names no class of a class-conditional model.
        """
        if self.cache:
            return self.cache(prompts)
        arguments = dict(device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        match self.name:
            case "StableDiffusionPipeline":
                return dict(encoder_hidden_states=self.pipe.encode_prompt(prompts, **arguments)[0])
            case "StableDiffusionXLPipeline":
                embeddings, _, pooled, _ = self.pipe.encode_prompt(prompts, **arguments)
                pixels = self.picture_size // max(self.shape[1:])
                size = [side * pixels for side in self.shape[1:]]  # not square under sample --size
                # Micro-conditioning: original size, crop corner, target size.
                time_ids = torch.tensor([[*size, 0, 0, *size]]).to(pooled)
                added = dict(text_embeds=pooled, time_ids=time_ids.expand(len(prompts), -1))
                return dict(encoder_hidden_states=embeddings, added_cond_kwargs=added)
            case "PixArtAlphaPipeline":
                arguments["max_sequence_length"] = self._max_tokens()
                embeddings, mask, _, _ = self.pipe.encode_prompt(prompts, **arguments)
                resolution = aspect_ratio = None
                if self.pipe.transformer.config.sample_size == 128:  # the 1024-pixel model is told its size
                    resolution = torch.full((len(prompts), 2), float(self.picture_size), device=self.device)
                    aspect_ratio = torch.ones(len(prompts), 1, device=self.device)
                return dict(encoder_hidden_states=embeddings, encoder_attention_mask=mask,
                            added_cond_kwargs=dict(resolution=resolution, aspect_ratio=aspect_ratio))
        return dict(class_labels=class_labels(prompts, self.classes).to(self.device)) if self.guided else {}

    @torch.no_grad()
    def null(self, n):
        """The empty condition for guidance, of a batch of n.

        It is the empty prompt, for SDXL zero embeddings, for classes the class "none".
        """
        if self.vae is None:
            none = torch.full((n,), len(self.classes or ()), device=self.device)
            return dict(class_labels=none) if self.guided else {}
        null = self.cond([""])
        if self.pipe.config.get("force_zeros_for_empty_prompt", False):
            added = null["added_cond_kwargs"]
            null["encoder_hidden_states"] = torch.zeros_like(null["encoder_hidden_states"])
            added["text_embeds"] = torch.zeros_like(added["text_embeds"])
        return map_cond(lambda v: v.expand(n, *v.shape[1:]), null)

    def encode(self, images):
        """Pictures -> x0 [B, *shape], the mean of the VAE's posterior; an x0 is returned as it is."""
        if self.vae is None or images.shape[1:] == self.shape:
            return images
        output = self.vae.encode(images)
        # AutoencoderTiny has no distribution.
        mean = output.latents if hasattr(output, "latents") else output.latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor

    def decode(self, x0):
        """x0 -> pictures, with the gradient."""
        return x0 if self.vae is None else self.vae.decode(x0 / self.vae.config.scaling_factor).sample.float()

    def _max_tokens(self):
        return 120 if self.pipe.tokenizer.model_max_length > 120 else self.pipe.tokenizer.model_max_length

    def warn_of_long(self, prompts):
        """One line on stderr if prompts are longer than the text encoder takes, which cuts them.

        Of many prompts, some thousands are looked at.
        """
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if tokenizer is None:
            return
        limit, shown = self._max_tokens(), list(prompts)[::max(1, len(prompts) // 2000)]
        long = sum(len(ids) > limit for ids in tokenizer(shown).input_ids)
        if long and int(os.environ.get("RANK", 0)) == 0:
            seen = f"{len(shown)} prompts{' looked at' * (len(shown) < len(prompts))}"
            print(f"{long} of {seen} are longer than the text encoder's {limit} tokens; "
                  "their ends are not read", file=sys.stderr)


def load_decoder(path_or_id, codec, precision="fp32"):
    """x0 -> pictures by an AutoencoderTiny of the same latents, frozen and with the gradient.

    "tiny": the published one, taesdxl for SDXL, taesd for SD and PixArt-alpha; empty: the codec's own
    decoder. The former is held in the precision.
    """
    if not path_or_id or codec.vae is None:
        return codec.decode
    if path_or_id == "tiny":
        path_or_id = f"madebyollin/{'taesdxl' if codec.name == 'StableDiffusionXLPipeline' else 'taesd'}"
    try:
        tiny = diffusers.AutoencoderTiny.from_pretrained(path_or_id)
        check_weights("the decoder", tiny)
        tiny.to(codec.device).eval().requires_grad_(False)
        if precision == "bf16":
            hold_in_bf16(tiny)
        with torch.no_grad():  # other latents fail here, not after the warm-ups
            tiny.decode(torch.zeros(1, *codec.shape, device=codec.device))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--decoder {path_or_id}: cannot be loaded ({one_line(error)}); give a local "
                        "directory of an AutoencoderTiny, or an empty one for the model's own decoder")
    return lambda x0: tiny.decode(x0).sample.float()


# LoRA

# Attention, feed-forward and convolutions, as the authors of YOSO chose them.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
                "time_emb_proj", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
                "upsamplers.0.conv")


class MergingLora:
    """A LoRA layer of peft that runs on W + scaling B A, summed anew in each call, where that is less work.

    The work of peft's own forward, W x + scaling B (A x), grows with the places of x, that of B A does not.
    """

    def forward(self, x):
        """As peft's forward, but for rounding."""
        names, base = [] if self.disable_adapters else self.active_adapters, self.base_layer
        if len(names) != 1:
            return super().forward(x)
        A, B = (matrices[names[0]].weight.flatten(1) for matrices in (self.lora_A, self.lora_B))
        # In bf16 the sum would be rounded otherwise than the bare W, and SwiftBrush's gradient, which is the
        # difference of the two networks, would have an error in its mean that is up to twice as large.
        if torch.is_autocast_enabled(x.device.type) or not x.dtype == A.dtype == base.weight.dtype:
            return super().forward(x)
        (rank, n_in), n_out, places = A.shape, len(B), x.numel() // self.in_features
        unmerged, merged = places * rank * (n_in + n_out), rank * n_in * n_out
        if torch.is_grad_enabled() and A.requires_grad:
            # Backward, either does its products twice more; A's and B's gradients come from that of the sum.
            unmerged, merged = 3 * unmerged, 3 * merged + places * n_in * n_out
        if unmerged <= merged:
            return super().forward(x)
        weight = torch.addmm(base.weight.flatten(1), B, A, alpha=self.scaling[names[0]]).view_as(base.weight)
        layer = F.linear if isinstance(base, torch.nn.Linear) else base._conv_forward
        return layer(x, weight, base.bias)


class MergingLinear(MergingLora, LoraLinear):
    """A linear layer with LoRAs."""


class MergingConv2d(MergingLora, LoraConv2d):
    """A convolution with LoRAs."""


def add_lora(net, name, rank, alpha, targets=LORA_TARGETS, init="default"):
    """Adds the LoRA `name` to a network, whose own weights it freezes; returns the LoRA's parameters by name.

    The LoRA starts as no change, B = 0, and acts inside `use_lora(net, name)` and in a Denoiser with that
    adapter. init: of A, whose size is that of the first updates of B A: "default", peft's, has a standard
    deviation of 1 / sqrt(3 inputs) at any rank, "gaussian" one of 1 / rank.
    """
    init = "gaussian" if init == "gaussian" else True
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=init, target_modules=list(targets))
    config._register_custom_module({torch.nn.Linear: MergingLinear, torch.nn.Conv2d: MergingConv2d})
    with warnings.catch_warnings():
        # Several adapters on one network are meant.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        if hasattr(net, "add_adapter"):
            net.add_adapter(config, adapter_name=name)
        else:  # PixArtTransformer2DModel
            inject_adapter_in_model(config, net, adapter_name=name)
        net.peft_config = getattr(net, "peft_config", {}) | {name: config}
    net.lora_layers = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
    for layer in net.lora_layers:
        layer._disable_adapters = True
    # peft's own switches also switch requires_grad, and a gradient is then lost without a word: requires_grad
    # is set here once, for all adapters. On a network that is held in bf16, peft has rounded them too.
    for key, parameter in net.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.float()
        parameter.requires_grad_("lora_" in key)
    return Weights((key, p) for key, p in net.named_parameters() if "lora_" in key and f".{name}." in key)


def check_targets(net, targets):
    """Raises UserError if no target of a LoRA is in the network, or one is no linear layer or convolution.

    Layers have other names in other classes of networks.
    """
    found = {target: module for name, module in net.named_modules() for target in targets
             if f".{name}".endswith(f".{target}")}
    if not found:
        raise UserError(f"--lora-targets {' '.join(targets)}: the network has no such layer")
    for target, module in found.items():
        if not isinstance(getattr(module, "base_layer", module), torch.nn.Linear | torch.nn.Conv2d):
            raise UserError(f"--lora-targets {target}: a {type(module).__name__}, on which no LoRA fits")


def remove_lora(net, name):
    """Takes a LoRA away again, with its parameters."""
    with warnings.catch_warnings():
        # peft makes another adapter the active one; use_lora sets its own.
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
        for layer in net.lora_layers:
            layer.delete_adapter(name)
            layer._disable_adapters = True
    net.peft_config.pop(name)


class Weights(dict):
    """Parameters by name, as a part of a checkpoint."""

    def state_dict(self):
        """The parameters by name, without the graph."""
        return {name: p.detach() for name, p in self.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Copies the values that state_dict() gave; raises KeyError if a name is missing."""
        for name, p in self.items():
            p.copy_(state[name])


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
    """Gradient checkpointing whose recomputation in the backward pass uses the forward pass's adapter."""
    def checkpoint(module, *args):
        """Blocks call this in place of module(*args)."""
        layers = getattr(net, "lora_layers", ())
        if not layers:  # torch.compile does not take a context_fn
            return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)
        active = [name for layer in layers if not layer._disable_adapters for name in layer._active_adapter]
        name = active[0] if active else None
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False,
                                                 context_fn=lambda: (nullcontext(), use_lora(net, name)))
    net.enable_gradient_checkpointing(checkpoint)


def merge_lora_file(pipe, path):
    """Merges the LoRA weights of a file or directory into the pipeline's network.

    Raises UserError if they do not fit.
    """
    try:
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(path)
            if not any(pipe.get_list_adapters().values()):
                raise UserError(f"{path}: none of its LoRA weights belongs to this pipeline's network; "
                                "they are for another base")
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        else:  # PixArtAlphaPipeline
            pipe.transformer = PeftModel.from_pretrained(pipe.transformer, path).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded as LoRA weights ({one_line(error)})")


# Scorers

SCORERS = {
    "clip": ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    # PickScore has no processor of its own.
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
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

        Shorter edge resized to the network's size (bicubic, antialiased), centre crop, normalised. Not
        clamped: a clamp would take the gradient from saturated pixels.
        """
        x = pictures.float() / 2 + 0.5
        if min(x.shape[2:]) != self.size:
            scale = self.size / min(x.shape[2:])
            size = [int(side * scale + 1e-6) for side in x.shape[2:]]
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
        top, left = ((side - self.size) // 2 for side in x.shape[2:])
        x = x[:, :, top:top + self.size, left:left + self.size]
        return F.normalize(self.embed_images((x - self.mean.to(x)) / self.std.to(x)).float(), dim=-1)

    def __call__(self, pictures, texts):
        """Cosines [B] of pictures and texts (from .texts)."""
        return (self.images(pictures) * texts).sum(-1)


def load_scorer(name, device="cpu", precision="fp32"):
    """The Scorer, frozen, of "clip", "pickscore", "hps" (HPS v2.1), or a CLIPModel with its processor.

    The latter is given by directory or hub id. Its network is held in the precision, "fp32" or "bf16". Raises
    UserError if the model cannot be loaded.
    """
    try:
        if name == "hps":
            scorer = _open_clip_scorer(device, precision=precision)
        else:
            scorer = _transformers_scorer(*SCORERS.get(name, (name, name)), device, precision)
        with torch.no_grad():  # sizes that do not fit fail here, not after the warm-ups
            scorer(torch.zeros(1, 3, scorer.size, scorer.size, device=device), scorer.texts([""]))
        return scorer
    except LOAD_ERRORS as error:
        raise UserError(f"{name}: cannot be loaded as a CLIPModel with its processor ({one_line(error)}); "
                        "a local directory works without a network")


def _transformers_scorer(model_id, processor_id, device, precision):
    model = complete(CLIPModel, model_id)
    model.to(device).eval().requires_grad_(False)
    if precision == "bf16":
        hold_in_bf16(model)
    tokenizer = AutoTokenizer.from_pretrained(processor_id)
    processor = AutoImageProcessor.from_pretrained(processor_id)

    def embed_texts(prompts):
        tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                           max_length=model.config.text_config.max_position_embeddings)
        return model.get_text_features(**tokens.to(device)).pooler_output

    return Scorer(lambda x: model.get_image_features(pixel_values=x).pooler_output, embed_texts,
                  model.config.vision_config.image_size, processor.image_mean, processor.image_std, device)


def _open_clip_scorer(device, architecture="ViT-H-14", precision="fp32"):
    try:
        import open_clip
    except ImportError:
        raise UserError("hps: its network is open_clip's: pip install open_clip_torch")
    from huggingface_hub import hf_hub_download
    weights = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    model = open_clip.create_model(architecture, weights, device=device)
    model.eval().requires_grad_(False)
    if precision == "bf16":
        hold_in_bf16(model)
    tokenizer = open_clip.get_tokenizer(architecture)
    embed_texts = lambda prompts: model.encode_text(tokenizer(list(prompts)).to(device))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return Scorer(model.encode_image, embed_texts, model.visual.image_size[0], mean, std, device)
