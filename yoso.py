"""YOSO, You Only Sample Once (Luo et al., arXiv 2403.12931): a denoiser that a GAN makes one-step, from scratch or pretrained.

The idea. A denoiser G(x_t, t) maps a noisy picture to a clean one. From pure noise it can only guess the mean, a blur; a GAN
loss makes it guess a picture instead. Matching noise to data in one leap is a hard GAN problem, so YOSO matches level t to
level t-1: the "real" pictures are G's own one-step samples from a less noisy input, which are a little better than the fake
ones. Level 1 learns from the data, level 2 from level 1, and so on up to pure noise: the generator cooperates with itself.

Algorithm 1; the same numbers stand in train_step:
  1. draw data x0, noise eps, level t in 1..T, latent z; x_t and x_r (r = t-1) share x0, eps and z
  2. fake = G(x_t, t, z), with its graph
  3. target = sg[G(x_r, r, z)], and x0 itself where r = 0
  4. discriminator: L_D = softplus(-D(target, t)) + softplus(D(sg[fake], t))
  5. generator: L_G = lambda_t d(fake, x0) + lambda_con d(fake, target) + softplus(-D(fake, t))
  6. EMA of the generator
Sampling: x_T ~ N(0, I), x0 = G(x_T, T, z). With more calls: add noise at a lower level, predict again.

With --model, the same game fine-tunes a text-to-image model, in its latent space and with its 1,000 levels (Eq. 6; the same
numbers stand in fine_tune_step). One level apart is too little there, so the real side comes from k = 250 levels below, the
consistency target from m = 25 below; G(x, 0) = x by construction, so that the chain still ends at the data. D is half of the
pretrained UNet with a head, the consistency distance is taken in the features of that half, frozen (Eq. 5). Two remedies for a
noise level T that is not pure noise: sampling starts from the informative prior (section 5.2), or --adapt first makes the
network predict v on a schedule that ends in pure noise (section 5.2).

Symbols, paper -> code: x, x_0 -> x0; x_t -> x_t; x_{t-1} -> x_r; sqrt(abar_t) -> alpha_t; G_theta -> generator; D_phi ->
discriminator (returns logits); x^t -> fake; x^{t-1} -> target; lambda_t -> lambda_rec; lambda_t^con -> lambda_con; eta -> lr;
k, m -> real_offset, con_offset; h -> the features of a frozen HalfUNet; v_phi, eps_phi -> the teacher's.

What differs from the paper as printed. The discriminator's second term is log(1 - D(fake)), not -log D(fake), as in any GAN.
The target is under stop-gradient in both places. Both pictures go into D with the fake's t. The generator is diffusers'
UNet2DModel instead of NCSN++: no tanh (samples are clamped instead), no FIR resampling. Fine-tuning: softplus before the mean
over the batch, not after it as in the authors' script; the second stage of the adaptation regresses onto the velocity of the
rescaled schedule, for the printed one would leave noise in a perfect student.

  python yoso.py                                      shapes, 16 x 16: 9 minutes on 2 CPU cores
  python yoso.py --dataset FOLDER --out runs/mine     your pictures at 32 x 32, preset small: about an hour on 2 CPU cores
  torchrun --nproc-per-node 8 yoso.py --dataset cifar10 --out runs/cifar10       the paper's preset, on GPUs
  python yoso.py sample --run runs/yoso --num 64 --nfe 1 --grid grid.png
  python yoso.py --model assets/mini-sd               fine-tunes the mini Stable Diffusion
  torchrun --nproc-per-node 8 yoso.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 64 --dataset FOLDER --out runs/sd15
  python yoso.py merge --base PIXART_512 --high PIXART_1024 --tuned YOSO_512 --out PIPELINE          Eq. 7, 1024 pixels from 512
"""

import argparse
import json
import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDPMPipeline, LCMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from common import (
    EMA,
    Denoiser,
    Draws,
    HalfUNet,
    InformativePrior,
    NoiseSchedule,
    UserError,
    Weights,
    add_lora,
    chunk_for,
    ddgan_betas,
    draw_many_steps,
    enable_checkpointing,
    load,
    load_distance,
    map_cond,
    part_of,
    squared_distance,
)
from plumbing.cache import cache_conditions, cache_latents
from plumbing.checkpoint import read_checkpoint
from plumbing.cli import flag, parse_config, read_config, run_command
from plumbing.data import (
    agreed,
    claim_folder,
    load_dataset,
    prompts_of,
    sample_order,
    save_grid,
    to_floats,
    write_text,
)
from plumbing.run import FREE_FLAGS, Run, choose_device, mean_of, start_processes
from plumbing.shard import shard
from plumbing.students import dense_copy, export_one_step, export_student, fold_lora

# Configuration: the defaults are the paper's CIFAR-10 run, and below its fine-tuning of SD 1.5; a preset changes what it names

@dataclass
class Config:
    """One field a flag; the text is also its --help."""
    dataset: str = flag("shapes", "shapes (drawn by code), cifar10 (downloaded), or a folder of pictures")
    preset: str = flag("small", "defaults of the other flags: shapes, cifar10 or small; the dataset's own where it has one")
    out: str = flag("runs/yoso", "the run's folder; the same command again resumes what lies there")
    resume: str = flag("", "folder of another run of the same configuration, to continue from its checkpoint")
    seed: int = flag(0, "of weights, order of the data, and noise")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("fp32", "fp32, or bf16 for the networks (weights and losses stay fp32)")
    compile: bool = flag(False, "torch.compile the networks; the discriminator only without R1, whose double backward it lacks")
    gradient_checkpointing: bool = flag(False, "recompute the generator's activations: less memory, more time")
    workers: int = flag(0, "processes that read pictures")
    log_every: int = flag(50, "iterations between lines of metrics.jsonl")
    save_every: int = flag(500, "iterations between checkpoints")
    sample_every: int = flag(500, "iterations between grids in samples/")

    iterations: int = flag(200_000, "updates of each network; paper: 200k")
    batch_size: int = flag(256, "global batch, over all processes; paper: 256")
    micro_batch: int = flag(0, "samples a process handles at once, 0: all; changes memory, not the result; costs a forward")
    lr: float = flag(2e-4, "Adam learning rate of the generator, constant; paper: 2e-4")
    lr_d: float = flag(2e-4, "Adam learning rate of the discriminator, constant; paper: 2e-4")
    lr_decay: float = flag(0.0, "share of the iterations, at the end, in which both rates fall linearly to 0; paper: 0")
    ema: float = flag(0.9999, "decay of the generator's average, which is what samples; paper: 0.9999")
    image_size: int = flag(32, "pixels; pictures are resized and centre-cropped")
    flip: bool = flag(True, "mirror the pictures at random, as DDGAN does")

    levels: int = flag(4, "T, noise levels of DDGAN's schedule; paper: 4")
    distance: str = flag("lpips", "d of reconstruction and consistency, lpips or l2; paper: LPIPS")
    lambda_rec: float = flag(1.0, "factor on the reconstruction weight SNR(t); paper: 1")
    lambda_con: float = flag(1.0, "factor on the consistency weight 1 / (1/SNR(t) - 1/SNR(r)); 0: the ablation; paper: 1")
    adversary: str = flag("self", "what is real for D: self (YOSO), data (D_adv(p_d || p_t)), ufogen (noisy pictures)")
    r1: float = flag(0.0, "gamma of R1, gamma/2 |dD/dreal|^2; paper: none named")
    r1_every: int = flag(8, "iterations between R1 steps, which then weigh r1_every times as much")

    channels: tuple = flag((128, 288, 288, 288), "generator, by resolution; 288 gives the paper's 48 M parameters (47.3)")
    layers: int = flag(2, "residual blocks a resolution; NCSN++: 2")
    attention: bool = flag(True, "at the second resolution (16 x 16 of 32) and in the middle, as NCSN++")
    latent_z: int = flag(100, "size of DDGAN's latent z, 0: none; DDGAN: 100")
    channels_d: tuple = flag((128, 256, 512, 512), "discriminator, by resolution; DDGAN: 128 256 512 512, 12.7 M")


PRESETS = {
    "cifar10": dict(),
    # Measured here on earlier sizes of the shapes, one seed each: lr_d 1e-3 diverged in four of four runs within 1,700
    # iterations; the weights' factor 1 gave 11 % clean one-step pictures after 2,000 iterations where 5 gave 39 %. The 20 was
    # chosen by its pictures and not compared with 5 under equal conditions.
    "shapes": dict(
        image_size=16, iterations=6500, batch_size=32, lr=1e-3, lr_d=5e-4, lr_decay=0.5, ema=0.998, flip=False, distance="l2",
        lambda_rec=20.0, lambda_con=20.0, r1=0.02,
        channels=(16, 32, 64, 64), layers=1, attention=False, latent_z=0, channels_d=(16, 32, 64, 128)),
    # The same recipe for a folder of pictures on a CPU. CIFAR-10, one run each: lr 1e-3, lr_d 5e-4, r1 0.02 and the smaller
    # discriminator jumped to L_D 3.1 at iteration 300 and stayed at textures; these rates did not, and gave scenes.
    "small": dict(
        image_size=32, iterations=8000, batch_size=32, lr=5e-4, lr_d=2e-4, lr_decay=0.5, ema=0.999, distance="l2",
        lambda_rec=20.0, lambda_con=20.0, r1=0.05,
        channels=(16, 32, 64, 64), layers=1, attention=False, latent_z=0, channels_d=(32, 64, 128, 128)),
}

@dataclass
class FineTune:
    """The flags with --model; one field a flag, the text is also its --help."""
    model: str = flag("assets/mini-sd", "what is fine-tuned: a diffusers pipeline of SD or PixArt, directory or hub id")
    lora: str = flag("", "LoRA weights merged into it first")
    discriminator: str = flag("", "the pipeline whose UNet gives D and the features; empty: --model; for PixArt: SD 1.5")
    dataset: str = flag("", "captioned pictures: shapes, cifar10 or a folder; or see --generate")
    prompts: str = flag("", "with --generate: file of prompts; empty: the captions of --dataset")
    generate: int = flag(0, "train on that many pictures that --generator draws first into OUT/data, instead of on --dataset")
    generator: str = flag("", "a pipeline of few steps, directory or hub id; YOSO-LoRA: stabilityai/sdxl-turbo")
    generator_lora: str = flag("", "LoRA weights merged into it; the data flywheel: the first LoRA, on the new base")
    nfe: int = flag(1, "its network calls a picture: 1, 2 or 4")
    preset: str = flag("full", "defaults of the other flags: full, lora (with --rank), pixart; for the mini model shapes (with "
                       "--adapt), shapes-epsilon, shapes-lora (with --rank)")
    out: str = flag("runs/yoso_t2i", "the run's folder; the same command again resumes what lies there")
    resume: str = flag("", "folder of another run of the same configuration, to continue from its checkpoint")
    seed: int = flag(0, "of weights, order of the data, and noise")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("fp32", "fp32, or bf16 for the networks (weights and losses stay fp32)")
    compile: bool = flag(False, "torch.compile the networks; not the generator with --rank, whose adapters are switched")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    workers: int = flag(0, "processes that read pictures")
    shard: bool = flag(False, "FSDP2: every process keeps its part of the networks' weights, gradients, moments and averages")
    log_every: int = flag(50, "iterations between lines of metrics.jsonl")
    save_every: int = flag(500, "iterations between checkpoints")
    sample_every: int = flag(500, "iterations between grids in samples/")

    iterations: int = flag(30_000, "updates of each network; paper: up to 30k, LoRA 5k")
    batch_size: int = flag(256, "global batch, over all processes; paper: 256")
    micro_batch: int = flag(0, "samples a process handles at once, 0: all; changes memory, not the result; costs a forward")
    lr: float = flag(2e-5, "AdamW learning rate of the generator, constant; paper: 2e-5")
    lr_d: float = flag(2e-5, "AdamW learning rate of the discriminator, constant; paper: 2e-5")
    weight_decay: float = flag(0.01, "of both; the authors' script: 0.01")
    clip_norm: float = flag(1.0, "gradient norm of the generator; the authors' script: 1")
    ema: float = flag(0.9999, "decay of the generator's average, which is what samples; paper: 0.9999, LoRA 0.999")
    rank: int = flag(0, "train a LoRA of this rank instead of all weights; paper: 64")
    alpha: int = flag(8, "of the LoRA; the authors' script: 8, peft's default")

    real_offset: int = flag(250, "k of Eq. 6: the real side is k of 1,000 timesteps less noisy; paper: 250")
    con_offset: int = flag(25, "m of Eq. 6: the consistency target is m timesteps less noisy; paper: 25")
    adversary: str = flag("self", "what is real for D: self (YOSO), or data (D_adv(p_d || p_t))")
    con_distance: str = flag("latent", "d of the consistency term: latent (Eq. 5), or l2")
    rec_distance: str = flag("l2", "d of the reconstruction term; the authors' script: l2, to save compute")
    lambda_rec: float = flag(0.5, "factor on the reconstruction weight min(SNR(t), limit); the authors' script: 0.5")
    lambda_con: float = flag(2.0, "factor on the consistency weight min(w(t), limit); 0: the ablation; the authors' script: 2")
    con_weight: str = flag("sqrt", "w(t): sqrt, 1 / (SNR(t)^-1/2 - SNR(t-m)^-1/2), of the authors' script, or snr, without the roots")
    weight_limit: float = flag(5.0, "the limit; the authors' script: 5 for both")

    adapt: bool = flag(False, "first adapt the network to v-prediction and zero terminal SNR")
    adapt_iterations: int = flag(500, "of each of its two stages; 0: the direct switch; paper: about 1,000 together")
    adapt_lr: float = flag(2e-5, "AdamW learning rate of the adaptation, constant")
    adapt_clamp: float = flag(4.0, "the teacher's x0 is clamped to +- this: at T an epsilon network's error is amplified")
    cache_latents: bool = flag(False, "encode all pictures and captions once, float16, to OUT/cache; no text encoder on the device")
    prior_num: int = flag(1000, "pictures from which the informative prior is estimated")
    teacher_guidance: float = flag(7.5, "of the original's pictures in OUT/comparison.png; SD: 7.5")


SHAPES = dict(dataset="shapes", iterations=2000, batch_size=32, lr=2e-4, lr_d=2e-4, ema=0.998, lambda_con=0.5, save_every=250,
              adapt_iterations=300, adapt_lr=5e-4, adapt_clamp=3.0, teacher_guidance=2.0)
FINE_TUNE_PRESETS = {
    "full": dict(),
    "lora": dict(rank=64, ema=0.999, iterations=5000),
    "pixart": dict(discriminator="stable-diffusion-v1-5/stable-diffusion-v1-5", adapt=True),
    "shapes": SHAPES,  # measured here, as the next two: README, results
    "shapes-epsilon": SHAPES | dict(lr=5e-5, lr_d=5e-5, lambda_con=2.0),
    "shapes-lora": SHAPES | dict(rank=64, alpha=64, lr=5e-4, iterations=1300),
}


def preset_of(given):
    """The preset that fits the flags given: a real model must not get the mini model's rates."""
    if Path(given.get("model", FineTune.model)) == Path(FineTune.model):
        return "shapes-lora" if given.get("rank") else "shapes" if given.get("adapt") else "shapes-epsilon"
    return "lora" if given.get("rank") else "full"


# Losses

def discriminator_loss(real_logits, fake_logits):
    """L_D, Eq. 4's maximisation over phi: mean softplus(-D(real)) + softplus(D(fake)).

    Logits [B], of pictures under stop-gradient. 2 ln 2 = 1.386 where D cannot tell them apart.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def adversarial_loss(fake_logits):
    """L_adv, the non-saturating generator part of Eq. 4: mean softplus(-D(fake)); logits [B]."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits, real):
    """Mean over the batch of |d D(real) / d real|^2 (Mescheder et al., 2018); real [B, C, H, W] requires grad."""
    gradient, = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def reconstruction_weight(snr_t):
    """lambda_t = SNR(t), [B]: with a squared distance it makes the term a plain error in epsilon (section 4.2)."""
    return snr_t


def consistency_weight(snr_t, snr_r):
    """lambda_t^con = 1 / (1/SNR(t) - 1/SNR(r)), [B] (appendix G.1). At r = 0, SNR(r) is infinite and the weight SNR(t)."""
    return 1 / (1 / snr_t - 1 / snr_r)


def sqrt_consistency_weight(snr_t, snr_r):
    """1 / (SNR(t)^-1/2 - SNR(r)^-1/2), [B], the weight of the authors' fine-tuning script; infinite at t = r, 0 where SNR(t) = 0."""
    return 1 / (snr_t**-0.5 - snr_r**-0.5)


def generator_loss(fake, x0, target, fake_logits, lambda_rec, lambda_con, distance=squared_distance, con_distance=None):
    """L_G, Eq. 4's and 6's minimisation over theta: lambda_t d(fake, x0) + lambda_con d(fake, sg[target]) + softplus(-D(fake)).

    fake, x0, target [B, C, H, W]; fake_logits = D(fake), with its graph to fake, [B]; weights [B]; distance, con_distance (if it
    is another): two batches -> [B]; target None: without consistency. Returns the sum and its three parts.
    """
    L_rec = (lambda_rec * distance(fake, x0)).mean()
    L_con = torch.zeros_like(L_rec) if target is None else (lambda_con * (con_distance or distance)(fake, target.detach())).mean()
    L_adv = adversarial_loss(fake_logits)
    return L_rec + L_con + L_adv, dict(L_rec=L_rec, L_con=L_con, L_adv=L_adv)


def adversarial_pair(adversary, schedule, fake, target, x0, x_r, t, noise):
    """What D compares, and the level it is told: (real, fake, level).

    "self": YOSO, Eq. 3. "data": D_adv(p_d || p_t), Eq. 2. "ufogen": UFOGen's critic in the noisy space at r = t-1, where
    the prediction is noised afresh with `noise` (Xu et al., 2023; reconstruction and consistency stay on clean pictures).
    """
    match adversary:
        case "self":
            return target.detach(), fake, t
        case "data":
            return x0, fake, t
        case "ufogen":
            return x_r, schedule.add_noise(fake, noise, t - 1), t - 1

def boundary(t):
    """(c_skip, c_out), [B] each, of G(x_t, t) = c_skip x_t + c_out x0_prediction: G(x, 0) = x, and the prediction from t = 1 on.

    The consistency models' boundary condition as LCMScheduler has it, so that an exported G samples in diffusers as here.
    """
    scaled = 10.0 * t.float()
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25)**0.5


def adaptation_target(eps, x0, schedule, t):
    """The velocity alpha_t eps - sigma_t x0 on the student's schedule, for the teacher's eps and x0 [B, C, H, W], t [B].

    Stage I of section 5.2: the student's schedule is the teacher's, and this is the teacher's own v. Stage II: the rescaled one;
    with the teacher's coefficients instead, as printed, a perfect student's x0 would keep a share of the noise.
    """
    alpha, sigma = schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
    return alpha * eps - sigma * x0


def adaptation_loss(v, target):
    """Mean squared error of v, weight 1: SNR as the weight would vanish at T, where a one-step model lives; [B, C, H, W] twice."""
    return (v - target).square().mean()


def add_differences(base, high, tuned, alpha, beta):
    """Eq. 7, key by key: base + alpha (high - base) + beta (tuned - base); 1, 1 carries one-step weights to a higher resolution.

    State dicts. What belongs to the resolution alone, missing from one of the others or of another shape there, is high's.
    """
    shared = {key for key, value in high.items()
              if all(key in other and other[key].shape == value.shape for other in (base, tuned))}
    return {key: torch.lerp(base[key], value, alpha) + beta * (tuned[key] - base[key]) if key in shared else value
            for key, value in high.items()}


# Networks

class Generator(nn.Module):
    """G(x_t, t, z) -> x0, [B, 3, H, W]: a UNet2DModel whose identity class embedding carries the mapped latent z."""

    def __init__(self, config):
        super().__init__()
        down, up = ["DownBlock2D"] * len(config.channels), ["UpBlock2D"] * len(config.channels)
        if config.attention:
            down[1], up[-2] = "AttnDownBlock2D", "AttnUpBlock2D"
        has_z = config.latent_z > 0
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(c % g == 0 and c >= 4 * g for c in config.channels))
        self.unet = UNet2DModel(
            sample_size=config.image_size, block_out_channels=config.channels, layers_per_block=config.layers,
            down_block_types=down, up_block_types=up, add_attention=config.attention, norm_num_groups=groups,
            class_embed_type="identity" if has_z else None, resnet_time_scale_shift="scale_shift" if has_z else "default")
        self.mapping = None
        if has_z:
            # DDGAN's mapping network: four layers of width 256, then to the width of the time embedding.
            widths = [config.latent_z, 256, 256, 256, 256]
            layers = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.SiLU())]
            self.mapping = nn.Sequential(*layers, nn.Linear(256, 4 * config.channels[0]))

    def forward(self, x_t, t, z=None):
        """x_t [B, 3, H, W], t [B], z [B, latent_z] or None -> x0 [B, 3, H, W]."""
        # z has unit RMS, as after StyleGAN's PixelNorm.
        style = self.mapping(F.normalize(z, dim=1) * z.shape[1]**0.5) if self.mapping else None
        return self.unet(x_t, t, class_labels=style).sample


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding between them, halving the resolution if `down`, and a skip."""

    def __init__(self, c_in, c_out, c_time, down):
        super().__init__()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time, self.skip = nn.Linear(c_time, c_out), nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x, time):
        """x [B, c_in, H, W], time [B, c_time] -> [B, c_out, H, W] or half of it."""
        h = self.conv1(F.leaky_relu(x, 0.2)) + self.time(time)[:, :, None, None]
        h = self.conv2(self.pool(F.leaky_relu(h, 0.2)))
        return (h + self.skip(self.pool(x))) / 2**0.5


class Discriminator(nn.Module):
    """D(x, t) -> logits [B], time-conditional and residual like DDGAN's: x [B, 3, H, W] clean (noisy for UFOGen), t [B].

    Groups of four neighbours in the batch share a standard deviation as one more feature, so the batch is a multiple of 4.
    The last layer starts at zero: logits 0, L_D = 2 ln 2.
    """

    GROUP = 4

    def __init__(self, config):
        super().__init__()
        widths = config.channels_d
        c_time = 2 * widths[0]
        self.time = nn.Sequential(Timesteps(c_time, flip_sin_to_cos=True, downscale_freq_shift=0),
                                  TimestepEmbedding(c_time, c_time))
        self.start = nn.Conv2d(3, widths[0], 1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(a, b, c_time, down=i > 0)
                                    for i, (a, b) in enumerate(zip((widths[0], *widths), widths)))
        self.final, self.end = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1), nn.Linear(widths[-1], 1)
        for module in self.modules():
            # torch's default initialisation shrinks the signal in every layer: L_D 1.38 after 1,000 iterations against 1.15.
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, a=0.2)
        nn.init.zeros_(self.end.weight), nn.init.zeros_(self.end.bias)

    def forward(self, x, t):
        """x [B, 3, H, W], t [B] -> logits [B]."""
        time, h = F.silu(self.time(t)), self.start(x)
        for block in self.blocks:
            h = block(h, time)
        groups = h.unflatten(0, (-1, self.GROUP))
        deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(self.GROUP)
        h = torch.cat([h, deviation.view(-1, 1, 1, 1).expand(-1, 1, *h.shape[2:])], 1)
        return self.end(F.leaky_relu(self.final(h), 0.2).sum((2, 3)))[:, 0]

class LatentDiscriminator(nn.Module):
    """D(x, t, c) -> logits [B] on latents: half of a pretrained UNet, all of it trainable, then attention pooling and a head.

    The pooling is CLIP's: the mean of the places asks, all places answer. The last layer starts at zero: logits 0, L_D = 2 ln 2.
    """

    def __init__(self, unet, size, width=512):
        super().__init__()
        channels, places = unet.config.block_out_channels[-1], (size // 2**(len(unet.config.block_out_channels) - 1))**2
        self.features = HalfUNet(unet).requires_grad_(True)
        self.norm = nn.GroupNorm(math.gcd(32, channels), channels)
        self.position = nn.Parameter(torch.randn(1 + places, channels) / channels**0.5)
        self.attention = nn.MultiheadAttention(channels, max(1, channels // 16), batch_first=True)
        self.project, self.end = nn.Linear(channels, width), nn.Linear(width, 1)
        nn.init.zeros_(self.end.weight), nn.init.zeros_(self.end.bias)

    def forward(self, x, t, cond):
        """x [B, C, H, W], t [B], cond a dict -> logits [B]."""
        h = F.silu(self.norm(self.features(x, t, cond))).flatten(2).transpose(1, 2)
        h = torch.cat([h.mean(1, keepdim=True), h], 1) + self.position
        h = self.attention(h[:, :1], h, h, need_weights=False)[0]
        return self.end(F.silu(self.project(h)))[:, 0, 0]


# Updates

def train_step(iteration, x0, run, config, schedule, distance, generator, discriminator, optimizer_g, optimizer_d):
    """Steps 1-5 of the algorithm on this rank's x0 [B, 3, H, W]; returns the scalars to log."""
    # 1. Same eps and z for both levels.
    draw = run.draws(iteration)
    batch = dict(t=draw.randint(1, config.levels + 1), eps=draw.randn(*x0.shape[1:]), noise=draw.randn(*x0.shape[1:]))
    batch["x0"] = torch.where(draw.randint(0, 2).bool()[:, None, None, None], x0.flip(3), x0) if config.flip else x0
    batch["z"] = draw.randn(config.latent_z)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in run.micro_batches]

    # 2, 3. One forward of G(x_t, t) serves both updates. With micro-batches that would keep the graphs of all of them, so
    # there the generator's update repeats the forward.
    keep_graph = len(parts) == 1
    for p in parts:
        p["x_t"], p["x_r"] = schedule.add_noise(p["x0"], p["eps"], p["t"]), schedule.add_noise(p["x0"], p["eps"], p["t"] - 1)
        with run.autocast():
            with torch.set_grad_enabled(keep_graph):
                p["fake"] = generator(p["x_t"], p["t"], p["z"]).float()
            with torch.no_grad():
                less_noisy = generator(p["x_r"], p["t"] - 1, p["z"]).float()
        p["target"] = torch.where((p["t"] == 1)[:, None, None, None], p["x0"], less_noisy)

    scalars = update_discriminator(iteration, parts, run, config, schedule, discriminator, optimizer_d)
    return scalars | update_generator(parts, keep_graph, run, config, schedule, distance, generator, discriminator, optimizer_g)


def update_discriminator(iteration, parts, run, config, schedule, discriminator, optimizer):
    """Step 4: one step of D on the detached pictures."""
    with_r1 = config.r1 > 0 and iteration % config.r1_every == 0
    optimizer.zero_grad()
    scalars = []
    for p in parts:
        real, fake, level = adversarial_pair(config.adversary, schedule, p["fake"].detach(), p["target"], p["x0"], p["x_r"],
                                             p["t"], p["noise"])
        real = real.detach().requires_grad_(with_r1)
        with run.autocast():
            logits = discriminator(torch.cat([real, fake]), torch.cat([level, level])).float()
        real_logits, fake_logits = logits.chunk(2)
        L_D = discriminator_loss(real_logits, fake_logits)
        penalty = config.r1 / 2 * config.r1_every * r1_penalty(real_logits, real) if with_r1 else 0.0
        ((L_D + penalty) / len(parts)).backward()
        scalars.append(dict(L_D=L_D, D_real=real_logits.mean(), D_fake=fake_logits.mean()))
    run.average_gradients(discriminator.parameters())
    optimizer.step()
    return mean_of(scalars)


def update_generator(parts, keep_graph, run, config, schedule, distance, generator, discriminator, optimizer):
    """Step 5: one step of G through the just updated, frozen D; the gradient reaches theta through `fake` alone."""
    optimizer.zero_grad()
    discriminator.requires_grad_(False)
    scalars = []
    for p in parts:
        with run.autocast():
            fake = p["fake"] if keep_graph else generator(p["x_t"], p["t"], p["z"]).float()
            _, seen, level = adversarial_pair(config.adversary, schedule, fake, p["target"], p["x0"], p["x_r"],
                                              p["t"], p["noise"])
            fake_logits = discriminator(seen, level).float()
        snr_t, snr_r = schedule.snr(p["t"]), schedule.snr(p["t"] - 1)
        L_G, losses = generator_loss(fake, p["x0"], p["target"], fake_logits, config.lambda_rec * reconstruction_weight(snr_t),
                                     config.lambda_con * consistency_weight(snr_t, snr_r), distance)
        (L_G / len(parts)).backward()
        scalars.append(losses)
    discriminator.requires_grad_(True)
    run.average_gradients(generator.parameters())
    optimizer.step()
    return mean_of(scalars)


def predict_x0(denoiser, x_t, t, cond):
    """G(x_t, t, c) of a pretrained network, whatever it predicts: [B, C, H, W]."""
    c_skip, c_out = (c.view(-1, 1, 1, 1) for c in boundary(t))
    return c_skip * x_t + c_out * denoiser.predict(x_t, t, "sample", cond)


def predict_from(generator, p, t):
    """G's prediction from level t of a part's data and noise."""
    return predict_x0(generator, generator.schedule.add_noise(p["x0"], p["eps"], t), t, p["cond"])


def fine_tune_step(iteration, pictures, captions, run, config, codec, codec_d, generator, discriminator, features, parameters,
                   optimizer_g, optimizer_d):
    """Steps 1-5 in the latent space, on this rank's pictures [B, 3, H, W] and captions; returns the scalars to log.

    codec_d: whose text encoder conditions D and the frozen features; parameters: those of the generator that are trained.
    """
    # 1. Same eps for all three levels.
    draw, schedule = run.draws(iteration), generator.schedule
    cond = codec.cond(captions)
    batch = dict(t=draw.randint(0, len(schedule)), eps=draw.randn(*codec.shape), pictures=pictures, cond=cond,
                 cond_d=cond if codec_d is codec else codec_d.cond(captions))
    parts = [{name: part_of(value, rows) for name, value in batch.items()} for rows in run.micro_batches]
    t_real, t_con = (max(1, round(offset * len(schedule) / 1000)) for offset in (config.real_offset, config.con_offset))

    # 2, 3. As from scratch, one forward of G(x_t, t) serves both updates where its graph can be kept.
    keep_graph = len(parts) == 1
    for p in parts:
        with torch.no_grad():
            p["x0"] = codec.encode(p["pictures"])  # the posterior's mean: D would take its noise for a mark of what is real
        p["t_con"] = (p["t"] - t_con).clamp(min=0)
        with run.autocast():
            with torch.set_grad_enabled(keep_graph):
                p["fake"] = predict_from(generator, p, p["t"])
            with torch.no_grad():
                p["real"] = predict_from(generator, p, (p["t"] - t_real).clamp(min=0)) if config.adversary == "self" else p["x0"]
                p["target"] = predict_from(generator, p, p["t_con"]) if config.lambda_con else None

    scalars = update_latent_discriminator(parts, run, discriminator, optimizer_d)
    return scalars | update_pretrained(parts, keep_graph, run, config, generator, discriminator, features, parameters, optimizer_g)


def update_latent_discriminator(parts, run, discriminator, optimizer):
    """Step 4 in the latent space; both sides go in with the fake's t and caption."""
    optimizer.zero_grad()
    scalars = []
    for p in parts:
        with run.autocast():
            twice = map_cond(lambda v: torch.cat([v, v]), p["cond_d"])
            logits = discriminator(torch.cat([p["real"], p["fake"].detach()]), torch.cat([p["t"], p["t"]]), twice).float()
        real_logits, fake_logits = logits.chunk(2)
        L_D = discriminator_loss(real_logits, fake_logits)
        (L_D / len(parts)).backward()
        scalars.append(dict(L_D=L_D, D_real=real_logits.mean(), D_fake=fake_logits.mean()))
    run.average_gradients(discriminator.parameters())
    optimizer.step()
    return mean_of(scalars)


def update_pretrained(parts, keep_graph, run, config, generator, discriminator, features, parameters, optimizer):
    """Step 5 in the latent space, with the weights' limit."""
    optimizer.zero_grad()
    discriminator.requires_grad_(False)
    weight = sqrt_consistency_weight if config.con_weight == "sqrt" else consistency_weight
    scalars = []
    for p in parts:
        with run.autocast():
            fake = p["fake"] if keep_graph else predict_from(generator, p, p["t"])
            fake_logits = discriminator(fake, p["t"], p["cond_d"]).float()
            # Eq. 5; remembered, for fake's features may serve both terms.
            embed = lru_cache(lambda x: features(x, torch.zeros_like(p["t"]), p["cond_d"]).float())
            distances = dict(l2=squared_distance, latent=lambda a, b: squared_distance(embed(a), embed(b)))
            snr_t, snr_con = generator.schedule.snr(p["t"]), generator.schedule.snr(p["t_con"])
            L_G, losses = generator_loss(
                fake, p["x0"], p["target"], fake_logits,
                config.lambda_rec * reconstruction_weight(snr_t).clamp(max=config.weight_limit),
                config.lambda_con * weight(snr_t, snr_con).clamp(max=config.weight_limit),
                distances[config.rec_distance], distances[config.con_distance])
        (L_G / len(parts)).backward()
        scalars.append(losses)
    discriminator.requires_grad_(True)
    run.average_gradients(parameters.values())
    nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
    optimizer.step()
    return mean_of(scalars)


def adapt_step(iteration, pictures, captions, run, config, codec, teacher, student, optimizer):
    """One regression step of section 5.2: the student's v, on its own schedule, onto the teacher's prediction on the teacher's."""
    draw, cond = run.draws(iteration), codec.cond(captions)
    t, eps = draw.randint(0, len(teacher.schedule)), draw.randn(*codec.shape)
    optimizer.zero_grad()
    scalars = []
    for rows in run.micro_batches:
        c, t_rows = part_of(cond, rows), t[rows]
        with torch.no_grad():  # without autocast: x0 carries 1 / alpha_T times the teacher's error
            x0 = codec.encode(pictures[rows])
            x_t = teacher.schedule.add_noise(x0, eps[rows], t_rows)
            eps_teacher = teacher.predict(x_t, t_rows, "epsilon", c)
            x0_teacher = teacher.schedule.convert(eps_teacher, x_t, t_rows, "epsilon", "sample")
            x0_teacher = x0_teacher.clamp(-config.adapt_clamp, config.adapt_clamp)
            target = adaptation_target(eps_teacher, x0_teacher, student.schedule, t_rows)
        with run.autocast():
            v = student.predict(student.schedule.add_noise(x0, eps[rows], t_rows), t_rows, "v_prediction", c)
        loss = adaptation_loss(v, target)
        (loss / len(run.micro_batches)).backward()
        scalars.append(dict(L_adapt=loss))
    run.average_gradients(student.net.parameters())
    nn.utils.clip_grad_norm_(student.net.parameters(), config.clip_norm)
    optimizer.step()
    return mean_of(scalars)


# Sampling

@torch.no_grad()
def sample(generator, schedule, levels, x_T, z=None, noise=None, limit=1.0):
    """x_T [B, C, H, W] -> x0, one network call a level of `levels` (falling, from T); z: the latent, or a pretrained G's condition.

    noise: one [B, C, H, W] for each level after the first: x_l = alpha_l x0 + sigma_l noise. One level needs none.
    limit: x0 is clamped to +- this, pictures to 1; latents to none.
    """
    x_t = x_T
    for i, level in enumerate(levels):
        if i > 0:
            x_t = schedule.add_noise(x0, noise[i - 1], torch.full_like(t, level))
        t = torch.full((len(x_t),), level, device=x_t.device)
        x0 = generator(x_t, t, z).clamp(-limit, limit)
    return x0


def sampling_levels(T, nfe):
    """nfe levels, falling from T (4 levels: 4; 4 2; 4 3 2 1), as LCMScheduler spaces the exported pipeline's timesteps."""
    if not 1 <= nfe <= T:
        raise UserError(f"--nfe {nfe}: this run has {T} levels, so 1 to {T} network calls")
    return [T - i * (T + 1) // nfe for i in range(nfe)]


def draw_chunks(generator, schedule, config, num, nfe, seed, device, chunk=250):
    """Yields num pictures in [-1, 1] in batches of `chunk`, on the CPU; the same for the same seed and chunk."""
    levels, shape = sampling_levels(config.levels, nfe), (3, config.image_size, config.image_size)
    for first in range(0, num, chunk):
        draw = Draws(seed, first, min(chunk, num - first), slice(None), "cpu")  # drawn on the CPU: the same pictures on any device
        x_T, z = draw.randn(*shape).to(device), draw.randn(config.latent_z).to(device)
        yield sample(generator, schedule, levels, x_T, z, [draw.randn(*shape).to(device) for _ in levels[1:]]).cpu()


def draw_samples(*arguments):
    """draw_chunks in one tensor, [num, 3, H, W]."""
    return torch.cat(list(draw_chunks(*arguments)))


@torch.no_grad()
def draw_pictures(denoiser, codec, prompts, nfe, seed, prior=None, start=0):
    """Yields a pretrained model's few-step pictures for the prompts, in [-1, 1], in chunks, on the CPU.

    prior: an InformativePrior to start from; start: the number of the first picture, which decides its noise.
    """
    levels, chunk = sampling_levels(len(denoiser.schedule) - 1, nfe), chunk_for(codec)
    for first in range(0, len(prompts), chunk):
        y = prompts[first:first + chunk]
        draw = Draws(seed, start + first, len(y), slice(None), "cpu")
        x_T, eps_prime, *noise = (draw.randn(*codec.shape).to(codec.device) for _ in range(1 + nfe))
        if prior:
            x_T = prior.start(denoiser.schedule, x_T, eps_prime)
        x0 = sample(partial(predict_x0, denoiser), denoiser.schedule, levels, x_T, codec.cond(y), noise, limit=math.inf)
        yield codec.decode(x0).clamp(-1, 1).cpu()


def load_generator(run, device="cpu"):
    """The averaged generator of a finished or running run's last checkpoint: (generator, schedule, config)."""
    saved = read_checkpoint(Path(run) / "checkpoint")
    try:
        config = Config(**saved["config"])
    except TypeError as error:
        raise UserError(f"{run}: not a run of this yoso.py ({error})")
    generator = Generator(config).to(device).eval()
    generator.load_state_dict(saved["state"]["ema"])
    return generator, NoiseSchedule.from_config(scheduler_config(config)).to(device), config


# Training

def scheduler_config(config):
    """DDGAN's levels as an LCMScheduler config: timestep k is level k, timestep 0 clean data; the network predicts x0.

    It samples as `sample` does: timestep_scaling switches off LCM's boundary scaling at every level above 0.
    """
    return dict(num_train_timesteps=config.levels + 1, trained_betas=ddgan_betas(config.levels), prediction_type="sample",
                original_inference_steps=config.levels + 1, timestep_scaling=1e4, clip_sample=True)


def check(config):
    """Raises UserError on flags that cannot work."""
    for name, choices in (("distance", ("l2", "lpips")), ("adversary", ("self", "data", "ufogen"))):
        if getattr(config, name) not in choices:
            raise UserError(f"--{name} {getattr(config, name)}: unknown; choose one of {', '.join(choices)}")
    halvings = max(len(config.channels), len(config.channels_d)) - 1
    for name, right, remedy in (
            ("image-size", config.image_size > 0 and config.image_size % 2**halvings == 0, f"a multiple of {2**halvings}"),
            ("channels", all(c >= 4 for c in config.channels), "at least 4 each"),
            ("channels-d", all(c >= 1 for c in config.channels_d), "at least 1 each"),
            ("attention", not config.attention or len(config.channels) > 1, "off where --channels has one resolution"),
            ("levels", config.levels >= 1, "at least 1"), ("r1-every", config.r1_every >= 1, "at least 1"),
            ("latent-z", config.latent_z >= 0, "at least 0"),
            ("lr-decay", 0 <= config.lr_decay <= 1, "between 0 and 1"),
            ("ema", 0 <= config.ema < 1, "at least 0 and below 1")):
        if not right:
            raise UserError(f"--{name} {getattr(config, name.replace('-', '_'))}: must be {remedy}")


def build_networks(config, device):
    """(generator, discriminator) on the device, with --gradient-checkpointing and --compile applied."""
    generator, discriminator = Generator(config).to(device), Discriminator(config).to(device)
    if config.gradient_checkpointing:
        generator.unet.enable_gradient_checkpointing()
    if config.compile:
        generator.compile()
        if config.r1 == 0:
            discriminator.compile()
    return generator, discriminator


def train(config):
    """A whole run, or the rest of one."""
    check(config)
    # With a decaying rate, the number of iterations is part of what a run is.
    run = Run(config, Discriminator.GROUP, FREE_FLAGS - {"iterations"} if config.lr_decay else FREE_FLAGS)
    dataset = load_dataset(config.dataset, config.image_size, config.seed)
    distance = load_distance(config.distance, run.device)
    schedule = NoiseSchedule.from_config(scheduler_config(config)).to(run.device)
    generator, discriminator = build_networks(config, run.device)
    ema = EMA(generator.named_parameters(), config.ema)
    optimizer_g = torch.optim.Adam(generator.parameters(), config.lr, betas=(0.9, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), config.lr_d, betas=(0.0, 0.999), fused=True)
    run.begin(dict(generator=generator, discriminator=discriminator, ema=ema, optimizer_g=optimizer_g, optimizer_d=optimizer_d))

    def save_samples(path):
        if run.rank == 0:
            with ema.applied():
                save_grid(draw_samples(generator, schedule, config, 64, 1, 0, run.device), path)

    def step(iteration, x0):
        """Steps 1 to 6 on this rank's pictures; the scalars to log."""
        losses = train_step(iteration, x0, run, config, schedule, distance, generator, discriminator, optimizer_g, optimizer_d)
        ema.update()  # 6.
        return losses

    for iteration, (x0, _) in enumerate(run.batches(dataset), run.start):
        remaining = (1 - iteration / config.iterations) / config.lr_decay if config.lr_decay else 1.0
        for optimizer, lr in ((optimizer_g, config.lr), (optimizer_d, config.lr_d)):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, remaining)
        losses = step(iteration, x0)
        if (iteration + 1) % config.sample_every == 0:
            save_samples(run.out / "samples" / f"{iteration + 1:07d}.png")
        if run.finish_iteration(iteration, losses):
            break
    else:
        save_samples(run.out / "samples" / "final.png")
        if run.rank == 0:
            export(generator, ema, config, run.out / "pipeline")
            print(f"done: one-step samples in {run.out}/samples/final.png; more with: python yoso.py sample --run {run.out}")
    run.end()


def export(generator, ema, config, path):
    """The averaged generator as a diffusers pipeline: DDPMPipeline.from_pretrained(path)(batch_size=8, num_inference_steps=1).

    With a latent z there is no pipeline class that draws it: then only the UNet is written, to be called with z by hand.
    """
    with ema.applied():
        if config.latent_z:
            generator.unet.save_pretrained(path / "unet")
        else:
            DDPMPipeline(generator.unet, LCMScheduler(**scheduler_config(config))).save_pretrained(path)


# Fine-tuning

def check_fine_tune(config):
    """Raises UserError on flags that cannot work."""
    for name, choices in (("adversary", ("self", "data")), ("con_distance", ("latent", "l2")), ("rec_distance", ("latent", "l2")),
                          ("con_weight", ("sqrt", "snr")), ("nfe", (1, 2, 4))):
        if getattr(config, name) not in choices:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: unknown; choose one of "
                            f"{', '.join(str(c) for c in choices)}")
    for name in ("rank", "lambda_rec", "lambda_con", "weight_decay", "adapt_iterations", "generate"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must not be negative")
    for name in ("alpha", "prior_num", "real_offset", "con_offset"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    for name in ("lr", "lr_d", "clip_norm", "weight_limit", "adapt_lr", "adapt_clamp"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0 and finite")
    if not 0 <= config.ema < 1:
        raise UserError(f"--ema {config.ema}: must be at least 0 and below 1")
    if config.generate and not config.generator:
        raise UserError(f"--generate {config.generate}: needs a --generator that draws the pictures")
    for name in ("generator", "generator_lora", "prompts"):
        if getattr(config, name) and not config.generate:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: only draws pictures with --generate NUMBER")
    if not (config.dataset or config.generate and config.prompts):
        raise UserError("--dataset: give a folder of captioned pictures, or have them drawn by --generate, --generator and --prompts")


def prepare_data(config, device):
    """The folder OUT/data: --generate pictures of --generator, a PNG and its caption each; what is there already is kept."""
    folders = [Path(folder) / "data" for folder in (config.out, config.resume) if folder]
    folder = next((folder for folder in folders if folder.exists()), folders[0])
    names = [f"{i:08d}" for i in range(config.generate)]
    # What can be missing is loaded before the folder is made; where all pictures are there, it is not needed.
    if agreed(lambda: not all((folder / f"{name}.txt").exists() for name in names)):
        generator, codec = load(config.generator, device, config.generator_lora)
        prompts = prompts_of(config, codec)
    missing = claim_folder(folder, {k: getattr(config, k) for k in (
        "generator", "generator_lora", "nfe", "prompts", "dataset", "seed")}, [f"{name}.txt" for name in names])
    more = agreed(lambda: len(list(folder.glob("*.txt")))) - config.generate + len(missing)
    if more > 0:
        raise UserError(f"--generate {config.generate}: {folder} holds {more} pictures more; raise the number, or delete it")
    if not missing:
        return str(folder)
    prior, chunk = InformativePrior.read(config.generator, device), chunk_for(codec)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    firsts = sorted({int(Path(name).stem) // chunk * chunk for name in missing})
    for first in tqdm(firsts[rank::world], desc="pictures", disable=rank > 0):
        y = [prompts[i % len(prompts)] for i in range(first, min(first + chunk, config.generate))]
        pictures = torch.cat(list(draw_pictures(generator, codec, y, config.nfe, config.seed, prior, first)))
        pictures = ((pictures / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for name, picture, caption in zip(names[first:], pictures, y):
            Image.fromarray(picture).save(folder / f"{name}.png")
            write_text(folder / f"{name}.txt", caption)  # second: where there is a caption, the picture is complete
    if world > 1:
        dist.barrier()
    return str(folder)


@torch.no_grad()
def estimate_prior(run, config, codec, dataset):
    """The InformativePrior of the run's first pictures; kept in OUT for a resumed run."""
    prior = InformativePrior.read(config.out, codec.device) if run.start else None
    if not prior:
        chunk, latents = chunk_for(codec), []
        for first in range(0, config.prior_num, chunk):
            order = sample_order(dataset, config.seed, range(first, min(first + chunk, config.prior_num)))
            pictures = to_floats(torch.stack([dataset[i]["image"] for i in order]).to(codec.device))
            latents.append(codec.encode(pictures).cpu())
        prior = InformativePrior.of(torch.cat(latents).to(codec.device))
        prior.save(config.out)
    return prior


def original_pictures(run, config, teacher, codec, captions):
    """What is fine-tuned, as it was: pictures of 1 and of 25 DDIM steps, [2 N, 3, H, W]; kept in OUT for a resumed run."""
    path = Path(config.out) / "original.safetensors"
    if not run.start or not path.exists():
        pictures = [draw_many_steps(teacher, codec, captions, steps, config.teacher_guidance) for steps in (1, 25)]
        if run.rank == 0:
            save_file(dict(pictures=torch.cat(pictures).contiguous()), path)
    return load_file(path)["pictures"] if run.rank == 0 else None


def adapt(config, teacher, codec, dataset):
    """Section 5.2: the teacher as a v-predicting Denoiser with zero terminal SNR, by two regressions; the teacher stays as it is.

    Stage I keeps the schedule (skipped where the teacher predicts v already), stage II rescales it. The result is exported to
    OUT/adapt-2/pipeline, on which a LoRA trained afterwards belongs.
    """
    net = dense_copy(teacher.net, fold_lora(teacher.net, None), codec.device)
    shard(config, net)
    stages = {"adapt-1": teacher.schedule, "adapt-2": teacher.schedule.zero_terminal_snr()}
    if teacher.prediction_type == "v_prediction":
        stages.pop("adapt-1")
    # What the adaptation does not depend on may change.
    free = vars(config).keys() - {
        "model", "lora", "dataset", "prompts", "generate", "generator", "generator_lora", "nfe", "seed", "batch_size", "precision",
        "weight_decay", "clip_norm", "adapt_iterations", "adapt_lr", "adapt_clamp"}
    for stage, schedule in stages.items():
        student = Denoiser(net, schedule, "v_prediction")
        if config.adapt_iterations:
            resume = f"{config.resume}/{stage}" if config.resume and Path(config.resume, stage, "checkpoint").exists() else ""
            run = Run(replace(config, out=f"{config.out}/{stage}", resume=resume, iterations=config.adapt_iterations), free=free)
            net.requires_grad_(True)
            if config.gradient_checkpointing:
                enable_checkpointing(net)
            optimizer = torch.optim.AdamW(net.parameters(), config.adapt_lr, weight_decay=config.weight_decay, fused=True)
            run.begin(dict(student=net, optimizer=optimizer))
            for iteration, (pictures, captions) in enumerate(run.batches(dataset), run.start):
                losses = adapt_step(iteration, pictures, captions, run, config, codec, teacher, student, optimizer)
                if run.finish_iteration(iteration, losses):
                    break
            run.end()
            optimizer.zero_grad()
    net.requires_grad_(False)
    state = fold_lora(net, None)
    if int(os.environ.get("RANK", 0)) == 0:
        export_one_step(codec, dense_copy(net, state, "cpu"), "v_prediction", Path(config.out) / "adapt-2" / "pipeline", zero_snr=True)
    return student


def fine_tune(config):
    """A whole run on a pretrained pipeline: its data where --generate asks for it, the adaptation, the training."""
    check_fine_tune(config)
    device = choose_device(config.device)
    start_processes(device)
    teacher, codec = load(config.model, device, config.lora)
    if codec.vae is None:
        raise UserError(f"--model {config.model}: works on pixels; give an SD, SDXL or PixArt pipeline")
    zero_snr = teacher.schedule.alpha[-1].item() < 1e-3
    if config.adapt and zero_snr:
        raise UserError(f"--adapt: {config.model} has zero terminal SNR already; leave the flag out")
    half, codec_d = load(config.discriminator, device) if config.discriminator else (teacher, codec)
    if not isinstance(half.net, UNet2DConditionModel):
        raise UserError(f"--discriminator: {config.discriminator or config.model} has no UNet to make one from; "
                        "give SD 1.5, which has the same latents")
    latents = [(c.shape[0], c.vae.config.scaling_factor) for c in (codec_d, codec)]
    if latents[0] != latents[1]:
        raise UserError(f"--discriminator {config.discriminator}: its latents have {latents[0][0]} channels and the scale {latents[0][1]}, "
                        f"--model's {latents[1][0]} and {latents[1][1]}; give two of the same VAE")
    run = Run(config)
    dataset = load_dataset(prepare_data(config, device) if config.generate else config.dataset, codec.picture_size, config.seed)
    all_captions = dataset.all_captions() if config.cache_latents else []
    captions = [dataset[i]["caption"] for i in sample_order(dataset, config.seed, range(64))]
    if not any(captions):
        raise UserError(f"--dataset {config.dataset}: its pictures have no captions; add metadata.jsonl, or a .txt beside each")
    for part in {codec, codec_d}:
        part.warn_of_long(captions)
    if config.cache_latents:
        folder, made_by = f"{config.out}/cache", dict(model=config.model, lora=config.lora)
        dataset = cache_latents(codec, dataset, f"{folder}/latents", made_by)
        cache_conditions(codec, all_captions, f"{folder}/conditions", made_by)
        if codec_d is not codec:
            cache_conditions(codec_d, all_captions, f"{folder}/conditions-d", dict(model=config.discriminator))
    # The frozen half shares the weights of a network that stays frozen too.
    features = HalfUNet(half.net, share=bool(config.rank or config.adapt or config.discriminator) and not config.shard)
    discriminator = LatentDiscriminator(half.net, codec.shape[-1]).to(device)
    # What is not called again gives its memory back.
    if half is not teacher:
        (half.net if config.shard else half.net.up_blocks).to("meta")
    shard(config, teacher.net, features, discriminator)
    prior = rows = None
    if run.rank == 0:
        run.make_folder()
        prior = None if config.adapt or zero_snr else estimate_prior(run, config, codec, dataset)
    if run.shows:
        rows = original_pictures(run, config, teacher, codec, captions[:8])
    start = adapt(config, teacher, codec, dataset) if config.adapt else teacher
    if config.adapt and not config.shard:
        (teacher.net.up_blocks if half is teacher else teacher.net).to("meta")
    train_pretrained(run, config, start, codec, features, discriminator, codec_d, dataset, captions, prior, rows)


def make_trainable(config, start):
    """The pretrained Denoiser as what is trained, all of it or a LoRA on it, and the trained parameters by name."""
    if not config.rank:
        return start, Weights(start.net.requires_grad_(True).named_parameters())
    generator = Denoiser(start.net, start.schedule, start.prediction_type, "student")
    return generator, add_lora(start.net, "student", config.rank, config.alpha)


def train_pretrained(run, config, start, codec, features, discriminator, codec_d, dataset, captions, prior, rows):
    """The training on Eq. 6; exports the averaged generator to OUT/pipeline and draws OUT/comparison.png below the rows."""
    generator, parameters = make_trainable(config, start)
    if config.gradient_checkpointing:
        enable_checkpointing(generator.net)
        enable_checkpointing(discriminator.features.unet)
    if config.compile:
        for network in (discriminator, features, *(() if config.rank else (generator.net,))):
            network.compile()
    ema = EMA(parameters.items(), config.ema)
    optimizer_g = torch.optim.AdamW(parameters.values(), config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), config.lr_d, betas=(0.0, 0.999), weight_decay=config.weight_decay,
                                    fused=True)
    run.begin(dict(generator=parameters, discriminator=discriminator, ema=ema, optimizer_g=optimizer_g, optimizer_d=optimizer_d))

    def step(iteration, pictures, texts):
        """Steps 1 to 6 on this rank's pictures and captions; the scalars to log."""
        losses = fine_tune_step(iteration, pictures, texts, run, config, codec, codec_d, generator, discriminator, features, parameters,
                                optimizer_g, optimizer_d)
        ema.update()  # 6.
        return losses

    for iteration, (pictures, texts) in enumerate(run.batches(dataset), run.start):
        losses = step(iteration, pictures, texts)
        if (iteration + 1) % config.sample_every == 0 and run.shows:
            with ema.applied():
                save_grid(torch.cat(list(draw_pictures(generator, codec, captions, 1, 0, prior))),
                          run.out / "samples" / f"{iteration + 1:07d}.png")
        if run.finish_iteration(iteration, losses):
            break
    run.end()
    # A run has a prior just where its SNR_T is not zero.
    export_student(run, codec, generator, ema, zero_snr=prior is None, prior=prior)
    if run.shows:
        with ema.applied():
            ours = [picture for nfe in (1, 2, 4) for picture in draw_pictures(generator, codec, captions[:8], nfe, 0, prior)]
    if run.rank == 0:
        save_grid(torch.cat([rows, *ours]), run.out / "comparison.png")
        print(f"{run.out}/comparison.png, from above: original 1 step, original 25 steps, YOSO 1, 2 and 4 steps\n"
              f"{run.out}/pipeline: a diffusers pipeline for 1, 2 or 4 steps")


# Main

def merge_command(argv):
    """`python yoso.py merge`: Eq. 7 on three pipelines of one architecture, written as a pipeline."""
    parser = argparse.ArgumentParser(prog="yoso.py merge", description="base + alpha (high - base) + beta (tuned - base), key by key.",
                                     allow_abbrev=False)
    parser.add_argument("--base", required=True, help="the pretrained pipeline")
    parser.add_argument("--high", required=True, help="the same at a higher resolution, or any other fine-tune of it")
    parser.add_argument("--tuned", required=True, help="YOSO's, trained from --base")
    parser.add_argument("--alpha", type=float, default=1.0, help="factor on high - base; paper: 1")
    parser.add_argument("--beta", type=float, default=1.0, help="factor on tuned - base; paper: 1")
    parser.add_argument("--out", required=True, help="folder of the merged pipeline, which predicts what --tuned does")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise UserError(f"--out {args.out}: exists already; choose a new folder")
    (base, _), (high, codec), (tuned, _) = (load(path) for path in (args.base, args.high, args.tuned))
    states = [model.net.state_dict() for model in (base, high, tuned)]
    shapes = [{key: value.shape for key, value in state.items()} for state in states]
    # The resolution's own: a table of positions.
    other = [key for key in shapes[0] if key in shapes[1] and shapes[0][key] != shapes[1][key] and "pos_embed" not in key]
    if len({type(model.net) for model in (base, high, tuned)}) > 1 or shapes[0] != shapes[2] or other:
        raise UserError("--base, --high and --tuned: must be of one architecture, --high's resolution aside")
    zero_snr, prior = tuned.schedule.alpha[-1].item() < 1e-3, InformativePrior.read(args.tuned)
    if prior and prior.mean.shape != codec.shape:
        prior = None
    state = add_differences(*states, args.alpha, args.beta)
    export_one_step(codec, dense_copy(high.net, state, "cpu"), tuned.prediction_type, args.out, zero_snr=zero_snr, prior=prior)
    print(f"{args.out}: a diffusers pipeline for 1, 2 or 4 steps")


def sample_command(argv):
    """`python yoso.py sample`: a grid of a finished or running run's samples."""
    parser = argparse.ArgumentParser(prog="yoso.py sample", description="Samples of a finished or running run.", allow_abbrev=False)
    parser.add_argument("--run", default="runs/yoso", help="the run's folder")
    parser.add_argument("--prompts", nargs="+", help="of a fine-tuned model, in turn; default: its dataset's captions")
    parser.add_argument("--prior", action=argparse.BooleanOptionalAction, default=True,
                        help="start a fine-tuned model from its informative prior")
    parser.add_argument("--num", type=int, default=64, help="number of pictures")
    parser.add_argument("--nfe", type=int, default=1, help="network calls a picture")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--grid", default="grid.png", help="the PNG to write")
    args = parser.parse_args(argv)
    for name, least in (("num", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    device = choose_device(args.device)
    settings = Path(args.run) / "config.json"
    if settings.exists() and "model" in json.loads(settings.read_text()):
        images = sample_fine_tuned(args, device)
    elif args.prompts:
        raise UserError(f"--prompts: {args.run} was trained without captions")
    else:
        generator, schedule, config = load_generator(args.run, device)
        images = draw_samples(generator, schedule, config, args.num, args.nfe, args.seed, device)
    try:
        save_grid(images, args.grid)
    except (OSError, ValueError) as error:
        raise UserError(f"--grid {args.grid}: cannot be written ({error})")
    print(f"{args.num} samples with {args.nfe} network call(s): {args.grid}")


def sample_fine_tuned(args, device):
    """Pictures of a finished fine-tuning run, [num, 3, H, W]."""
    if args.nfe not in (1, 2, 4):
        raise UserError(f"--nfe {args.nfe}: choose 1, 2 or 4")
    pipeline = Path(args.run) / "pipeline"
    if not pipeline.exists():
        raise UserError(f"--run {args.run}: not finished; see its samples/ while it runs")
    denoiser, codec = load(pipeline, device)
    prompts = args.prompts or prompts_of(read_config(FineTune, Path(args.run) / "config.json"), codec)
    prior = InformativePrior.read(pipeline, device) if args.prior else None
    return torch.cat(list(draw_pictures(denoiser, codec, [prompts[i % len(prompts)] for i in range(args.num)], args.nfe, args.seed, prior)))


def main(argv):
    """`sample`, `merge` or, by default, `train`: from scratch, or with --model a fine-tuning, which has other flags."""
    if argv[:1] == ["sample"]:
        return sample_command(argv[1:])
    if argv[:1] == ["merge"]:
        return merge_command(argv[1:])
    argv = argv[1:] if argv[:1] == ["train"] else argv
    if any(word.split("=")[0] == "--model" for word in argv):
        return fine_tune(parse_config(FineTune, FINE_TUNE_PRESETS, argv, __doc__.splitlines()[0], preset_of))
    train(parse_config(Config, PRESETS, argv, "From scratch; a pretrained pipeline's flags: yoso.py --model PIPELINE --help."))


if __name__ == "__main__":
    run_command(main)
