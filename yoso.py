"""YOSO, You Only Sample Once (Luo et al., arXiv 2403.12931): a GAN makes a denoiser one-step, from scratch or
pretrained.

The idea. A denoiser G(x_t, t) maps a noisy picture to a clean one. From pure noise it can only guess the
mean, a blur; a GAN loss makes it guess a picture instead. Matching noise to data in one leap is a hard GAN
problem, so YOSO matches level t to a less noisy level: the "real" pictures are G's own one-step samples from
there, which are a little better than the fake ones. Level 1 learns from the data, level 2 from level 1, and
so on up to pure noise: the generator cooperates with itself.

Algorithm 1 with Eq. 6; the same numbers stand in train_step:
  1. draw data x0, noise eps, level t in 1..T; all levels of a sample share x0 and eps
  2. fake = G(x_t, t), with its graph
  3. real = sg[G(x_{t-k}, t-k)], target = sg[G(x_{t-m}, t-m)]; at level 0 both are the data x0 itself
  4. discriminator: L_D = softplus(-D(real, t)) + softplus(D(sg[fake], t))
  5. generator: L_G = lambda_t d(fake, x0) + lambda_con d(fake, target) + softplus(-D(fake, t))
  6. EMA of the generator
Sampling: x_T ~ N(0, I), x0 = G(x_T, T). With more calls: add noise at a lower level, predict again.

From scratch (Eq. 4) there are T = 4 levels and k = m = 1, G also gets a latent z, and D is a network of its
own. With --model the same step fine-tunes a text-to-image model in its latent space: T = 999, k = 250, m = 25
(Eq. 6), D is half of the pretrained UNet with a head, and the consistency distance d is taken in the features
of that half, frozen (Eq. 5). Two remedies where level T is not pure noise: sampling starts from the
informative prior (section 5.2), or --adapt first makes the network predict v on a schedule that ends in pure
noise (section 5.2).

Symbols, paper -> code: x, x_0 -> x0; sqrt(abar_t) -> alpha_t; G_theta -> generator; D_phi -> discriminator,
which returns logits; x^t -> fake; x^{t-1} -> real, target; k, m -> real_offset, con_offset, in thousandths of
the schedule; lambda_t -> lambda_rec * reconstruction_weight; lambda_t^con -> lambda_con * consistency_weight;
h -> half, a HalfUNet.

What differs from the paper as printed. The discriminator's second term is log(1 - D(fake)), not -log D(fake),
as in any GAN. The real side and the target are under stop-gradient in both places. Real and fake go into D
with the fake's t. From scratch the generator is diffusers' UNet2DModel instead of NCSN++: no tanh (samples
are clamped instead), no FIR resampling. The second stage of the adaptation regresses onto the velocity of the
rescaled schedule, for the printed one would leave noise in a perfect student. What differs from the authors'
fine-tuning script. It averages D's logits over the batch before the softplus, and the reconstruction error
over the whole batch before it weights it, so E[w] E[error] stands where E[w error] is meant. With both
undone, its step is this one (tests/reference.py). It lets G(x_t, t) fade into x_t at the lowest levels,
c_skip(1) = 0.0025; here level 0 is the data itself, and t is drawn from 1.

  python yoso.py                                      shapes, 16 x 16: 9 minutes on 2 CPU cores python yoso.py
  --dataset FOLDER --out runs/mine     your pictures at 32 x 32: about an hour on 2 CPU cores torchrun
  --nproc-per-node 8 yoso.py --dataset cifar10 --out runs/cifar10       the paper's preset, on GPUs python
  yoso.py sample --run runs/yoso --num 64 --nfe 1 --grid grid.png python yoso.py --model assets/mini-sd
  fine-tunes the mini Stable Diffusion torchrun --nproc-per-node 8 yoso.py --model
  stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 64 --dataset FOLDER python yoso.py merge --base
  PIXART_512 --high PIXART_1024 --tuned YOSO_512 --out PIPELINE        Eq. 7
"""

import argparse
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, LCMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors.torch import load_file, save_file
from torch import nn

from common import (EMA, Codec, Denoiser, Draws, HalfUNet, InformativePrior, NoiseSchedule, UserError, chunk_for,
                    draw_many_steps, enable_checkpointing, frozen, load, load_distance, map_cond, squared_distance)
from plumbing.cache import cache_conditions, cache_latents
from plumbing.checkpoint import read_checkpoint
from plumbing.cli import (RunFlags, bound_flags, check_sample_flags, flag, parse_config, read_config, run_command,
                          sample_flags)
from plumbing.data import generate_folder, load_dataset, prompts_of, sample_order, save_grid, to_floats
from plumbing.run import Run, choose_device
from plumbing.shard import shard, whole
from plumbing.students import dense_copy, export_one_step, export_student, fold_lora


# Configuration: the defaults are the paper's CIFAR-10 run; a preset changes what it names

@dataclass
class Config(RunFlags):
    """One field a flag; the text is also its --help."""
    out: str = flag("runs/yoso", "the run's folder; the same command again resumes what lies there", "run")

    preset: str = flag("shapes", "defaults of the other flags; if not given, the one that --model, --dataset, --rank and "
                       "--adapt call for", "data")
    model: str = flag("", "what is fine-tuned: a diffusers pipeline of SD or PixArt; empty: train from scratch", "data")
    lora: str = flag("", "LoRA weights merged into --model first", "data")
    discriminator: str = flag("", "the pipeline whose UNet gives D and the features; empty: --model; for PixArt: SD 1.5",
                              "data")
    dataset: str = flag("shapes", "shapes (drawn by code), cifar10 (downloaded), or a folder of pictures", "data")
    image_size: int = flag(32, "from scratch: pixels; pictures are resized and centre-cropped", "data", least=1)
    flip: bool = flag(True, "mirror the pictures at random, as DDGAN does", "data")
    prompts: str = flag("", "with --generate: file of prompts; empty: the captions of --dataset", "data")
    generate: int = flag(0, "train on that many pictures that --generator draws first into OUT/data", "data", least=0)
    generator: str = flag("", "a pipeline of few steps, directory or hub id; YOSO-LoRA: stabilityai/sdxl-turbo", "data")
    generator_lora: str = flag("", "LoRA weights merged into it; the data flywheel: the first LoRA, on the new base", "data")
    nfe: int = flag(1, "its network calls a picture", "data", choices=(1, 2, 4))

    iterations: int = flag(200_000, "updates of each network; paper: 200k, fine-tuning up to 30k, LoRA 5k", least=1)
    batch_size: int = flag(256, "global batch, over all processes; paper: 256", least=1)
    lr: float = flag(2e-4, "learning rate of the generator; paper: 2e-4, fine-tuning 2e-5", above=0)
    lr_d: float = flag(2e-4, "learning rate of the discriminator; paper: 2e-4, fine-tuning 2e-5", above=0)
    lr_decay: float = flag(0.0, "share of the iterations, at the end, in which both rates fall linearly to 0; paper: 0",
                           least=0, most=1)
    weight_decay: float = flag(0.0, "AdamW's, of both; the authors' fine-tuning script: 0.01", least=0)
    clip_norm: float = flag(math.inf, "limit of the generator's gradient norm; the authors' fine-tuning script: 1",
                            above=0, infinite=True)
    ema: float = flag(0.9999, "decay of the generator's average, which is what samples; paper: 0.9999, LoRA 0.999",
                      least=0, below=1)
    rank: int = flag(0, "fine-tune a LoRA of this rank instead of all weights; paper: 64", least=0)
    alpha: int = flag(8, "of the LoRA; the authors' script: 8, peft's default", least=1)

    levels: int = flag(4, "from scratch: T, noise levels of DDGAN's schedule; paper: 4", least=1)
    real_offset: int = flag(1, "k in thousandths of the schedule, one level at least: so much less noisy is the real "
                            "side; paper: one level, fine-tuning 250", least=1)
    con_offset: int = flag(1, "m, likewise: so much less noisy is the consistency target; paper: one level, fine-tuning 25",
                           least=1)
    adversary: str = flag("self", "what is real for D: self (YOSO), data (D_adv(p_d || p_t)), ufogen (noisy pictures)",
                          choices=("self", "data", "ufogen"))
    rec_distance: str = flag("lpips", "d of the reconstruction term; latent: Eq. 5; paper: lpips, the authors' fine-tuning "
                             "script l2, to save compute", choices=("lpips", "l2", "latent"))
    con_distance: str = flag("lpips", "d of the consistency term; paper: lpips, fine-tuning latent",
                             choices=("lpips", "l2", "latent"))
    lambda_rec: float = flag(1.0, "factor on the reconstruction weight min(SNR(t), limit); the authors' fine-tuning "
                             "script: 0.5", least=0)
    lambda_con: float = flag(1.0, "factor on the consistency weight min(w(t), limit); 0: the ablation; the authors' "
                             "fine-tuning script: 2", least=0)
    con_weight: str = flag("snr", "w(t): snr, 1 / (1/SNR(t) - 1/SNR(t-m)), the paper's; sqrt, of the roots, the authors' "
                           "fine-tuning script's", choices=("snr", "sqrt"))
    weight_limit: float = flag(math.inf, "the limit of both weights; the authors' fine-tuning script: 5", above=0,
                               infinite=True)
    r1: float = flag(0.0, "gamma of R1, gamma/2 |dD/dreal|^2; paper: none named", least=0)
    r1_every: int = flag(8, "iterations between R1 steps, which then weigh r1_every times as much", least=1)

    channels: tuple = flag((128, 288, 288, 288), "from scratch: generator, by resolution; 288 gives the paper's 48 M "
                           "parameters (47.3)", least=4)
    layers: int = flag(2, "residual blocks a resolution; NCSN++: 2", least=1)
    attention: bool = flag(True, "at the second resolution (16 x 16 of 32) and in the middle, as NCSN++")
    latent_z: int = flag(100, "from scratch: size of DDGAN's latent z, 0: none; DDGAN: 100", least=0)
    channels_d: tuple = flag((128, 256, 512, 512), "from scratch: discriminator, by resolution; DDGAN: 128 256 512 512",
                             least=1)

    adapt: bool = flag(False, "first adapt --model to v-prediction and zero terminal SNR")
    adapt_iterations: int = flag(500, "of each of its two stages; 0: the direct switch; paper: about 1,000 together", least=0)
    adapt_lr: float = flag(2e-5, "learning rate of the adaptation, constant", above=0)
    adapt_clamp: float = flag(4.0, "the teacher's x0 is clamped to +- this: at T an epsilon network's error is amplified",
                              above=0)
    prior_num: int = flag(1000, "pictures from which the informative prior is estimated", least=1)
    teacher_guidance: float = flag(7.5, "of the original's pictures in OUT/comparison.png; SD: 7.5", least=0)


SMALL = dict(
    batch_size=32, lr_decay=0.5, rec_distance="l2", con_distance="l2", lambda_rec=20.0, lambda_con=20.0,
    channels=(16, 32, 64, 64), layers=1, attention=False, latent_z=0)
SCRATCH = {
    "cifar10": dict(dataset="cifar10"),
    # Measured here on earlier sizes of the shapes, one seed each: lr_d 1e-3 diverged in four of four runs
    # within 1,700 iterations; the weights' factor 1 gave 11 % clean one-step pictures after 2,000 iterations
    # where 5 gave 39 %. The 20 was chosen by its pictures and not compared with 5 under equal conditions.
    "shapes": SMALL | dict(
        image_size=16, iterations=6500, lr=1e-3, lr_d=5e-4, ema=0.998, flip=False, r1=0.02, channels_d=(16, 32, 64, 128)),
    # The same recipe for a folder of pictures on a CPU. CIFAR-10, one run each: lr 1e-3, lr_d 5e-4, r1 0.02
    # and the smaller discriminator jumped to L_D 3.1 at iteration 300 and stayed at textures; these rates did
    # not, and gave scenes.
    "small": SMALL | dict(iterations=8000, lr=5e-4, lr_d=2e-4, ema=0.999, r1=0.05, channels_d=(32, 64, 128, 128)),
}
FULL = dict(
    out="runs/yoso_t2i", dataset="", flip=False, iterations=30_000, lr=2e-5, lr_d=2e-5, weight_decay=0.01, clip_norm=1.0,
    real_offset=250, con_offset=25, latent_z=0, rec_distance="l2", con_distance="latent", lambda_rec=0.5, lambda_con=2.0, con_weight="sqrt", weight_limit=5.0)
MINI = FULL | dict(
    model="assets/mini-sd", dataset="shapes", iterations=2000, batch_size=32, ema=0.998, save_every=250,
    adapt_iterations=300, adapt_lr=5e-4, adapt_clamp=3.0, teacher_guidance=2.0)
FINE_TUNE = {
    "full": FULL,
    "lora": FULL | dict(rank=64, ema=0.999, iterations=5000),
    "pixart": FULL | dict(discriminator="stable-diffusion-v1-5/stable-diffusion-v1-5", adapt=True),
    # Of assets/mini-sd, measured here: README, results.
    "mini": MINI | dict(lr=2e-4, lr_d=2e-4, lambda_con=0.5),
    "mini-epsilon": MINI | dict(lr=5e-5, lr_d=5e-5),
    "mini-lora": MINI | dict(rank=64, alpha=64, lr=5e-4, lr_d=2e-4, lambda_con=0.5, iterations=1300),
}
PRESETS = SCRATCH | FINE_TUNE


def preset_of(given):
    """The preset that fits the flags given: a real model must not get the mini model's rates."""
    if not given.get("model"):
        dataset = given.get("dataset", Config.dataset)
        return dataset if dataset in SCRATCH else "small"
    if Path(given["model"]) == Path(MINI["model"]):
        return "mini-lora" if given.get("rank") else "mini" if given.get("adapt") else "mini-epsilon"
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
    """Mean over the batch of |d D(real) / d real|^2 (Mescheder et al., 2018); real [B, C, H, W] requires
    grad.
    """
    with torch.autocast(real.device.type, enabled=False):
        gradient, = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def reconstruction_weight(snr_t):
    """lambda_t = SNR(t), [B]: with a squared distance it makes the term a plain error in epsilon (section
    4.2).
    """
    return snr_t


def consistency_weight(snr_t, snr_r):
    """lambda_t^con = 1 / (1/SNR(t) - 1/SNR(r)), [B] (appendix G.1). At r = 0, SNR(r) is infinite and the
    weight SNR(t).
    """
    return 1 / (1 / snr_t - 1 / snr_r)


def sqrt_consistency_weight(snr_t, snr_r):
    """1 / (SNR(t)^-1/2 - SNR(r)^-1/2), [B], the weight of the authors' fine-tuning script; infinite at t = r,
    0 where SNR(t) = 0.
    """
    return 1 / (snr_t**-0.5 - snr_r**-0.5)


def generator_loss(fake_logits, d_rec, d_con, lambda_rec, lambda_con):
    """L_G, Eq. 4's and 6's minimisation over theta: lambda_t d(fake, x0) + lambda_con d(fake, sg[target]) +
    softplus(-D(fake)).

    All [B]: fake_logits = D(fake), d_rec = d(fake, x0), d_con = d(fake, target), each with its graph to fake
    alone, and the weights. d_con None: without consistency. Returns the sum and its three parts.
    """
    L_rec = (lambda_rec * d_rec).mean()
    L_con = torch.zeros_like(L_rec) if d_con is None else (lambda_con * d_con).mean()
    L_adv = adversarial_loss(fake_logits)
    return L_rec + L_con + L_adv, dict(L_rec=L_rec, L_con=L_con, L_adv=L_adv)


def weights_of(config, schedule, t, t_con):
    """The weights of reconstruction and consistency with their factors and their limit, [B] each."""
    snr_t, snr_con = schedule.snr(t), schedule.snr(t_con)
    weight = sqrt_consistency_weight if config.con_weight == "sqrt" else consistency_weight
    return (config.lambda_rec * reconstruction_weight(snr_t).clamp(max=config.weight_limit),
            config.lambda_con * weight(snr_t, snr_con).clamp(max=config.weight_limit))


def adversarial_pair(adversary, schedule, p, fake):
    """What D compares, and the level it is told: (real, fake, level), of a part p of train_step.

    "self": YOSO, Eq. 3: G's less noisy prediction is real, and D is told the fake's level t. "data":
    D_adv(p_d || p_t), Eq. 2. "ufogen": UFOGen's critic in the noisy space at t - k, where the data have p's
    eps and the prediction is noised afresh (Xu et al., 2023; reconstruction and consistency stay on clean
    pictures).
    """
    match adversary:
        case "self":
            return p.real, fake, p.t
        case "data":
            return p.x0, fake, p.t
        case "ufogen":
            return schedule.add_noise(p.x0, p.eps, p.t_real), schedule.add_noise(fake, p.noise, p.t_real), p.t_real


def adaptation_target(eps, x0, schedule, t):
    """The velocity alpha_t eps - sigma_t x0 on the student's schedule, for the teacher's eps and x0 [B, C, H,
    W], t [B].

    Stage I of section 5.2: the student's schedule is the teacher's, and this is the teacher's own v. Stage
    II: the rescaled one; with the teacher's coefficients instead, as printed, a perfect student's x0 would
    keep a share of the noise.
    """
    alpha, sigma = schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
    return alpha * eps - sigma * x0


def adaptation_loss(v, target):
    """Mean squared error of v, weight 1: SNR as the weight would vanish at T, where a one-step model lives;
    [B, C, H, W] twice.
    """
    return (v - target).square().mean()


def add_differences(base, high, tuned, alpha, beta):
    """Eq. 7, key by key: base + alpha (high - base) + beta (tuned - base); 1, 1 carries one-step weights to a
    higher resolution.

    State dicts. What belongs to the resolution alone, missing from one of the others or of another shape
    there, is high's.
    """
    shared = {key for key, value in high.items()
              if all(key in other and other[key].shape == value.shape for other in (base, tuned))}
    return {key: torch.lerp(base[key], value, alpha) + beta * (tuned[key] - base[key]) if key in shared else value
            for key, value in high.items()}


# Networks

def ddgan_betas(levels=4, beta_min=0.1, beta_max=20.0, eps=1e-3):
    """The few-level VP schedule of DDGAN (Xiao et al., 2022), which YOSO uses from scratch: levels + 1 betas.

    Level 0 is clean data (its beta is 1e-8, as in DDGAN), level `levels` almost pure noise.
    """
    tau = np.linspace(0, 1, levels + 1) * (1 - eps) + eps
    alphas_cumprod = np.exp(-tau**2 * (beta_max - beta_min) / 2 - tau * beta_min)
    return [1e-8, *(1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).tolist()]


def scratch_scheduler(levels):
    """DDGAN's levels as an LCMScheduler: timestep k is level k, timestep 0 clean data; the network predicts
    x0.

    It samples as `draw_pictures` does: timestep_scaling switches off LCM's fade into x_t at every level above
    0.
    """
    return LCMScheduler(num_train_timesteps=levels + 1, trained_betas=ddgan_betas(levels), prediction_type="sample",
                        original_inference_steps=levels + 1, timestep_scaling=1e4, clip_sample=True)


class Mapping(nn.Module):
    """DDGAN's mapping network z -> style [B, width]: four layers of width 256, then to the width of the time
    embedding.
    """

    def __init__(self, latent_z, width):
        super().__init__()
        widths = [latent_z, 256, 256, 256, 256]
        layers = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(256, width))

    def forward(self, z):
        """z [B, latent_z], scaled to unit RMS, as by StyleGAN's PixelNorm."""
        return self.layers(F.normalize(z, dim=1) * z.shape[1]**0.5)


def scratch_generator(config):
    """G(x_t, t, z) -> x0: a UNet2DModel whose class embedding is the mapping network of z, so that z is its
    condition.
    """
    down, up = ["DownBlock2D"] * len(config.channels), ["UpBlock2D"] * len(config.channels)
    if config.attention:
        down[1], up[-2] = "AttnDownBlock2D", "AttnUpBlock2D"
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(c % g == 0 and c >= 4 * g for c in config.channels))
    has_z = config.latent_z > 0
    unet = UNet2DModel(
        sample_size=config.image_size, block_out_channels=config.channels, layers_per_block=config.layers,
        down_block_types=down, up_block_types=up, add_attention=config.attention, norm_num_groups=groups,
        class_embed_type="identity" if has_z else None, resnet_time_scale_shift="scale_shift" if has_z else "default")
    if has_z:
        unet.class_embedding = Mapping(config.latent_z, 4 * config.channels[0])
    return unet


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding between them, halving the resolution if `down`, and a
    skip.
    """

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
    """D(x, t) -> logits [B], time-conditional and residual like DDGAN's: x [B, 3, H, W] clean (noisy for
    UFOGen), t [B].

    Groups of four neighbours in the batch share a standard deviation as one more feature, so the batch is a
    multiple of 4. The last layer starts at zero: logits 0, L_D = 2 ln 2.
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
            # torch's default initialisation shrinks the signal in every layer: L_D 1.38 after 1,000
            # iterations against 1.15.
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, a=0.2)
        nn.init.zeros_(self.end.weight), nn.init.zeros_(self.end.bias)

    def forward(self, x, t, cond=None):
        """x [B, 3, H, W], t [B] -> logits [B]; from scratch there is no condition that D is told."""
        time, h = F.silu(self.time(t)), self.start(x)
        for block in self.blocks:
            h = block(h, time)
        groups = h.unflatten(0, (-1, self.GROUP))
        deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(self.GROUP)
        h = torch.cat([h, deviation.view(-1, 1, 1, 1).expand(-1, 1, *h.shape[2:])], 1)
        return self.end(F.leaky_relu(self.final(h), 0.2).sum((2, 3)))[:, 0]


class LatentDiscriminator(nn.Module):
    """D(x, t, c) -> logits [B] on latents: half of a pretrained UNet, all of it trainable, then attention
    pooling and a head.

    The pooling is CLIP's attention: query = mean token, keys = values = all tokens. The last layer starts at
    zero: logits 0, L_D = 2 ln 2.
    """

    def __init__(self, unet, size, width=512):
        super().__init__()
        channels, places = unet.config.block_out_channels[-1], (size // 2**(len(unet.config.block_out_channels) - 1))**2
        self.features = HalfUNet(unet).requires_grad_(True)
        self.norm = nn.GroupNorm(math.gcd(32, channels), channels)
        self.position = nn.Parameter(torch.randn(1 + places, channels) / channels**0.5)
        self.attention = nn.MultiheadAttention(channels, max(1, channels // 16), batch_first=True)
        self.attention.out_proj, self.end = nn.Linear(channels, width), nn.Linear(width, 1)
        nn.init.zeros_(self.end.weight), nn.init.zeros_(self.end.bias)

    def forward(self, x, t, cond):
        """x [B, C, H, W], t [B], cond a dict -> logits [B]."""
        h = F.silu(self.norm(self.features(x, t, cond))).flatten(2).transpose(1, 2)
        h = torch.cat([h.mean(1, keepdim=True), h], 1) + self.position
        h = self.attention(h[:, :1], h, h, need_weights=False)[0]
        return self.end(F.silu(h))[:, 0, 0]


# The cast

@dataclass
class Models:
    """Who takes part in a step. `generator` and `discriminator` run their current weights; the average only
    samples.
    """
    generator: Denoiser       # G: all weights, or the LoRA "student" on frozen ones; trained by optimizer_g, averaged by ema
    discriminator: nn.Module  # D(x, t, cond) -> logits: trained by optimizer_d, frozen while G is updated
    codec: Codec              # frozen: pictures <-> x0, captions -> G's condition; from scratch x0 is the picture
    codec_d: Codec            # frozen: captions -> D's and h's condition; the codec itself unless --discriminator names one
    half: HalfUNet | None     # h of Eq. 5: frozen, the pretrained weights; None from scratch
    distances: dict           # name -> (features(x, cond), distance of two features -> [B]), frozen
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    ema: EMA                  # of G's trained weights


def load_networks(config, run):
    """(start, codec, discriminator, half, codec_d): what G starts from, frozen, and the rest of the cast as
    in Models.

    Raises UserError if the flags do not fit the pipelines.
    """
    if not config.model:
        pipe = DDPMPipeline(scratch_generator(config).to(run.device), scratch_scheduler(config.levels))
        schedule = NoiseSchedule.from_config(pipe.scheduler.config).to(run.device)
        discriminator = Discriminator(config).to(run.device)
        shard(config, pipe.unet, discriminator)
        codec = Codec(pipe)
        return Denoiser(pipe.unet, schedule, "sample"), codec, discriminator, None, codec
    start, codec = load(config.model, run.device, config.lora)
    if codec.vae is None:
        raise UserError(f"--model {config.model}: works on pixels; give an SD, SDXL or PixArt pipeline")
    if config.adapt and ends_in_noise(start):
        raise UserError(f"--adapt: {config.model} has zero terminal SNR already; leave the flag out")
    other, codec_d = load(config.discriminator, run.device) if config.discriminator else (start, codec)
    if not isinstance(other.net, UNet2DConditionModel):
        raise UserError(f"--discriminator: {config.discriminator or config.model} has no UNet to make one from; "
                        "give SD 1.5, which has the same latents")
    latents = [(c.shape[0], c.vae.config.scaling_factor) for c in (codec_d, codec)]
    if latents[0] != latents[1]:
        raise UserError(f"--discriminator {config.discriminator}: its latents have {latents[0][0]} channels and the scale "
                        f"{latents[0][1]}, --model's {latents[1][0]} and {latents[1][1]}; give two of the same VAE")
    # The frozen half shares the weights of a network that stays frozen too.
    half = HalfUNet(other.net, share=bool(config.rank or config.adapt or config.discriminator) and not config.shard)
    discriminator = LatentDiscriminator(other.net, codec.shape[-1]).to(run.device)
    if other is not start:  # it is not called again
        (other.net if config.shard else other.net.up_blocks).to("meta")
    shard(config, start.net, half, discriminator)
    return start, codec, discriminator, half, codec_d


def ends_in_noise(denoiser):
    """Whether the last level of its schedule is pure noise (zero terminal SNR)."""
    return denoiser.schedule.alpha[-1].item() < 1e-3


def build(config, run, networks=None):
    """The cast of a run; networks: what load_networks gave, its start perhaps adapted, else they are loaded
    here.
    """
    start, codec, discriminator, half, codec_d = networks or load_networks(config, run)
    if config.rank:
        generator = start.with_lora("student", config.rank, config.alpha)
    else:
        start.net.requires_grad_(True)
        generator = start
    if config.gradient_checkpointing:
        enable_checkpointing(generator.net)
        if half:
            enable_checkpointing(discriminator.features.unet)
    if config.compile:
        for network in (None if config.rank else generator.net, None if config.r1 else discriminator, half):
            if network is not None:
                network.compile()
    distances = dict(l2=(lambda x, cond: x, squared_distance))
    if half:
        distances["latent"] = lambda x, cond: half(x, x.new_zeros(len(x), dtype=torch.long), cond).float(), squared_distance
    if "lpips" in (config.rec_distance, config.con_distance):
        features, distance = load_distance("lpips", run.device)
        distances["lpips"] = lambda x, cond: features(x), distance
    optimizer_g, optimizer_d = (
        torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=config.weight_decay, fused=True)
        for parameters, lr, betas in ((generator.trainable().values(), config.lr, (0.9, 0.999)),
                                      (discriminator.parameters(), config.lr_d, (0.0, 0.999))))
    return Models(generator, discriminator, codec, codec_d, half, distances, optimizer_g, optimizer_d,
                  EMA(generator.trainable().items(), config.ema))


# Updates

def predict_x0(generator, p, level):
    """G(x_level, level) from the part's data and noise; at level 0 the data x0 itself, for p^(0) is the data
    in Eq. 3.
    """
    x_level = generator.schedule.add_noise(p.x0, p.eps, level)
    return torch.where((level > 0).view(-1, 1, 1, 1), generator.predict(x_level, level, "sample", p.cond), p.x0)


def condition(codec, captions, draw, latent_z):
    """What G is told beside x_t and t: the captions' embedding; from scratch a fresh latent z, or nothing."""
    return dict(class_labels=draw.randn(latent_z)) if latent_z else codec.cond(captions)


def distances_of(fake, p, config, distances):
    """(d(fake, x0), d(fake, target)), [B] each, None where the target has no weight; the gradient goes to fake alone.

    Features of fake are computed once, though both terms may compare them.
    """
    pairs = [(config.rec_distance, p.x0)] + [(config.con_distance, p.target)] * (config.lambda_con > 0)
    of_fake = {name: distances[name][0](fake, p.cond_d) for name in dict(pairs)}
    d = []
    for name, x in pairs:
        features, distance = distances[name]
        with torch.no_grad():
            of_x = features(x, p.cond_d)
        d.append(distance(of_fake[name], of_x))
    return d if len(d) == 2 else (*d, None)


def train_step(iteration, pictures, captions, config, run, models):
    """Algorithm 1 on this rank's pictures [B, 3, H, W] in [-1, 1] and captions [B]; returns the scalars to log."""
    G, D, codec, draw = models.generator, models.discriminator, models.codec, run.draws(iteration)
    T = len(G.schedule) - 1
    k, m = (max(1, round(offset * (T + 1) / 1000)) for offset in (config.real_offset, config.con_offset))

    # 1. One t and one eps a sample, which its three levels share.
    t, eps, noise = draw.randint(1, T + 1), draw.randn(*codec.shape), draw.randn(*codec.shape)
    if config.flip:
        pictures = torch.where(draw.randint(0, 2).bool().view(-1, 1, 1, 1), pictures.flip(3), pictures)
    cond = condition(codec, captions, draw, config.latent_z)
    cond_d = cond if models.codec_d is codec else models.codec_d.cond(captions)
    with torch.no_grad():  # the posterior's mean: D would take its noise for a mark of the data
        x0 = torch.cat([codec.encode(pictures[rows]) for rows in run.micro_batches])
    parts = run.split(x0=x0, t=t, t_real=(t - k).clamp(min=0), t_con=(t - m).clamp(min=0), eps=eps, noise=noise,
                      cond=cond, cond_d=cond_d)

    # 2, 3. One forward of G(x_t, t) serves both updates. With several micro-batches that would keep all their
    # graphs: there the generator's update repeats the forward.
    keep_graph = len(parts) == 1
    for p in parts:
        with run.autocast(), torch.set_grad_enabled(keep_graph):
            p.fake = predict_x0(G, p, p.t)
        with run.autocast(), torch.no_grad():
            p.real = predict_x0(G, p, p.t_real) if config.adversary == "self" else p.x0
            shared = k == m and config.adversary == "self"
            p.target = p.real if shared or not config.lambda_con else predict_x0(G, p, p.t_con)

    def loss_D(p):  # 4. Both sides are detached; D is told the fake's t. R1 asks for the gradient at the real side.
        real, fake, level = adversarial_pair(config.adversary, G.schedule, p, p.fake.detach())
        real, twice = real.detach().requires_grad_(with_r1), map_cond(lambda v: torch.cat([v, v]), p.cond_d)
        logits = D(torch.cat([real, fake]), torch.cat([level, level]), twice).float()
        real_logits, fake_logits = logits.chunk(2)
        L_D = discriminator_loss(real_logits, fake_logits)
        penalty = config.r1 / 2 * config.r1_every * r1_penalty(real_logits, real) if with_r1 else 0.0
        return L_D + penalty, dict(L_D=L_D, D_real=real_logits.mean(), D_fake=fake_logits.mean())

    def loss_G(p):  # 5. The gradient reaches theta through `fake` alone, in all three terms.
        fake = p.fake if keep_graph else predict_x0(G, p, p.t)
        _, seen, level = adversarial_pair(config.adversary, G.schedule, p, fake)
        return generator_loss(D(seen, level, p.cond_d).float(), *distances_of(fake, p, config, models.distances),
                              *weights_of(config, G.schedule, p.t, p.t_con))

    with_r1 = config.r1 > 0 and iteration % config.r1_every == 0
    scalars = run.descend(models.optimizer_d, parts, loss_D)
    with frozen(D):  # already updated; its graph carries the gradient to `fake`
        scalars |= run.descend(models.optimizer_g, parts, loss_G, config.clip_norm)
    models.ema.update()  # 6.
    return scalars


@dataclass
class Adaptation:
    """Who takes part in a step of the adaptation."""
    teacher: Denoiser  # frozen: the network as it was, on its own schedule
    student: Denoiser  # predicts v: all weights trained by optimizer, no average; stage II: on the rescaled schedule
    codec: Codec       # frozen
    optimizer: torch.optim.Optimizer


def adapt_step(iteration, pictures, captions, config, run, models):
    """One regression step of section 5.2: the student's v, on its schedule, onto the teacher's prediction on
    the teacher's.
    """
    teacher, student, codec, draw = models.teacher, models.student, models.codec, run.draws(iteration)
    t, eps = draw.randint(0, len(teacher.schedule)), draw.randn(*codec.shape)

    def loss_student(p):
        # In float32, without autocast: x0 carries 1 / alpha_T times the teacher's error.
        with torch.no_grad(), torch.autocast(run.device.type, enabled=False):
            x0 = codec.encode(p.pictures)
            x_t = teacher.schedule.add_noise(x0, p.eps, p.t)
            eps_teacher = teacher.predict(x_t, p.t, "epsilon", p.cond)
            x0_teacher = teacher.schedule.convert(eps_teacher, x_t, p.t, "epsilon", "sample")
            x0_teacher = x0_teacher.clamp(-config.adapt_clamp, config.adapt_clamp)
            target = adaptation_target(eps_teacher, x0_teacher, student.schedule, p.t)
        v = student.predict(student.schedule.add_noise(x0, p.eps, p.t), p.t, "v_prediction", p.cond)
        loss = adaptation_loss(v, target)
        return loss, dict(L_adapt=loss)

    parts = run.split(pictures=pictures, t=t, eps=eps, cond=codec.cond(captions))
    return run.descend(models.optimizer, parts, loss_student, config.clip_norm)


# Sampling

@dataclass
class Sampler:
    """What draws pictures: G with the weights that it has now, its codec, the start and the latent that it
    needs.
    """
    generator: Denoiser
    codec: Codec
    prior: InformativePrior | None = None
    latent_z: int = 0


def sampling_levels(T, nfe):
    """nfe levels, falling from T (4 levels: 4; 4 2; 4 3 2 1), as LCMScheduler spaces the exported pipeline's
    timesteps.
    """
    if not 1 <= nfe <= T:
        raise UserError(f"--nfe {nfe}: this run has {T} levels, so 1 to {T} network calls")
    return [T - i * (T + 1) // nfe for i in range(nfe)]


@torch.no_grad()
def sample(generator, levels, x_T, noise, cond, limit=math.inf):
    """x_T [B, C, H, W] -> x0, one network call a level of `levels` (falling, from T).

    noise: one [B, C, H, W] for each level after the first: x_l = alpha_l x0 + sigma_l noise. limit: x0 is
    clamped to +- this, pictures to 1; latents to none.
    """
    x_t, t = x_T, torch.full((len(x_T),), levels[0], device=x_T.device)
    x0 = generator.predict(x_t, t, "sample", cond).clamp(-limit, limit)
    for level, fresh in zip(levels[1:], noise):
        x_t, t = generator.schedule.add_noise(x0, fresh, torch.full_like(t, level)), torch.full_like(t, level)
        x0 = generator.predict(x_t, t, "sample", cond).clamp(-limit, limit)
    return x0


@torch.no_grad()
def draw_pictures(sampler, captions, nfe, seed, first=0):
    """Yields one picture a caption, in [-1, 1], in chunks, on the CPU; the same for the same seed, on every
    device.

    first: the number of the first picture, which decides its noise.
    """
    generator, codec, chunk = sampler.generator, sampler.codec, chunk_for(sampler.codec)
    levels = sampling_levels(len(generator.schedule) - 1, nfe)
    for start in range(0, len(captions), chunk):
        y = captions[start:start + chunk]
        draw = Draws(seed, first + start, len(y), slice(None), "cpu")
        x_T, eps_prime, *noise = (draw.randn(*codec.shape).to(codec.device) for _ in range(1 + nfe))
        if sampler.prior:
            x_T = sampler.prior.start(generator.schedule, x_T, eps_prime)
        cond = map_cond(lambda v: v.to(codec.device), condition(codec, y, draw, sampler.latent_z))
        x0 = sample(generator, levels, x_T, noise, cond, 1.0 if codec.vae is None else math.inf)
        yield codec.decode(x0).clamp(-1, 1).cpu()


def load_sampler(folder, device="cpu", prior=True):
    """A run's averaged generator as (Sampler, config): from scratch its last checkpoint's, else its finished
    pipeline's.

    prior: whether to start from the informative prior, where there is one. Raises UserError if there is
    nothing yet.
    """
    config = read_config(Config, Path(folder) / "config.json")
    if config.model:
        pipeline = Path(folder) / "pipeline"
        if not pipeline.exists():
            raise UserError(f"--run {folder}: not finished; see its samples/ while it runs")
        return Sampler(*load(pipeline, device), InformativePrior.read(pipeline, device) if prior else None), config
    saved = read_checkpoint(Path(folder) / "checkpoint")
    pipe = DDPMPipeline(scratch_generator(config).to(device).eval(), scratch_scheduler(config.levels))
    pipe.unet.load_state_dict(saved["state"]["ema"])
    schedule = NoiseSchedule.from_config(pipe.scheduler.config).to(device)
    return Sampler(Denoiser(pipe.unet, schedule, "sample"), Codec(pipe), None, config.latent_z), config


# Training

def check(config):
    """Raises UserError on flags that cannot work together."""
    def refuse(wrong, name, remedy):
        if wrong:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: {remedy}")

    if config.model:
        refuse(config.preset in SCRATCH, "preset", f"trains from scratch; with --model choose one of {', '.join(FINE_TUNE)}")
        refuse(config.latent_z, "latent_z", "is for a run from scratch; with --model give 0")
        for name in ("rec_distance", "con_distance"):
            refuse(getattr(config, name) == "lpips", name, "compares pictures; with --model choose latent or l2")
        refuse(config.flip and config.cache_latents, "flip", "cannot mirror cached latents; give --no-flip")
        refuse(config.generate and not config.generator, "generate", "needs a --generator that draws the pictures")
        for name in ("generator", "generator_lora", "prompts"):
            refuse(getattr(config, name) and not config.generate, name, "only draws pictures with --generate NUMBER")
        if not (config.dataset or config.generate and config.prompts):
            raise UserError("--dataset: give a folder of captioned pictures, or have them drawn by --generate, --generator "
                            "and --prompts")
        return
    refuse(config.preset in FINE_TUNE, "preset", "needs --model PIPELINE, which it fine-tunes")
    for name in ("rank", "lora", "adapt", "discriminator", "generate", "generator", "generator_lora", "prompts"):
        refuse(getattr(config, name), name, "needs --model PIPELINE, which it fine-tunes")
    for name in ("rec_distance", "con_distance"):
        refuse(getattr(config, name) == "latent", name, "compares latents of --model; from scratch choose lpips or l2")
    halvings = max(len(config.channels), len(config.channels_d)) - 1
    refuse(config.image_size % 2**halvings, "image_size", f"must be a multiple of {2**halvings}")
    refuse(config.attention and len(config.channels) < 2, "attention", "must be off where --channels has one resolution")


def generated_data(config, device):
    """The folder OUT/data of --generate pictures that --generator draws, each with its prompt as its caption."""
    def load_artist():
        """(prompts, draw) of what draws: draw(prompts, number of the first) -> their pictures."""
        prior = InformativePrior.read(config.generator, device)
        sampler = Sampler(*load(config.generator, device, config.generator_lora), prior)
        draw = lambda y, first: torch.cat(list(draw_pictures(sampler, y, config.nfe, config.seed, first)))
        return prompts_of(config, sampler.codec), draw, chunk_for(sampler.codec)

    folders = [Path(folder) / "data" for folder in (config.out, config.resume) if folder]
    folder = next((folder for folder in folders if folder.exists()), folders[0])
    made_by = ("generator", "generator_lora", "nfe", "prompts", "dataset", "seed")
    return generate_folder(folder, config.generate, {name: getattr(config, name) for name in made_by}, load_artist)


@torch.no_grad()
def estimate_prior(run, config, codec, dataset):
    """The InformativePrior of the run's first pictures; kept in OUT for a resumed run."""
    prior = InformativePrior.read(config.out, codec.device) if run.start else None
    if prior:
        return prior
    latents, order = [], sample_order(dataset, config.seed, range(config.prior_num))
    for first in range(0, len(order), chunk := chunk_for(codec)):
        pictures = torch.stack([dataset[i]["image"] for i in order[first:first + chunk]])
        latents.append(codec.encode(to_floats(pictures.to(codec.device))).cpu())
    prior = InformativePrior.of(torch.cat(latents).to(codec.device))
    prior.save(config.out)
    return prior


def original_pictures(run, config, teacher, codec, captions):
    """What is fine-tuned, as it was: pictures of 1 and of 25 DDIM steps, [2 N, 3, H, W]; kept in OUT for a
    resumed run.
    """
    path = Path(config.out) / "original.safetensors"
    if not run.start or not path.exists():
        pictures = [draw_many_steps(teacher, codec, captions, steps, config.teacher_guidance) for steps in (1, 25)]
        if run.rank == 0:
            save_file(dict(pictures=torch.cat(pictures).contiguous()), path)
    return load_file(path)["pictures"] if run.rank == 0 else None


# What the adaptation depends on.
ADAPTED_BY = {"model", "lora", "dataset", "prompts", "generate", "generator", "generator_lora", "nfe", "seed", "batch_size",
              "precision", "weight_decay", "clip_norm", "adapt_iterations", "adapt_lr", "adapt_clamp"}


def adapt(config, teacher, codec, dataset):
    """Section 5.2: the teacher as a v-predicting Denoiser with zero terminal SNR, by two regressions; the
    teacher stays.

    Stage I keeps the schedule (skipped where the teacher predicts v already), stage II rescales it. The
    result is exported to OUT/adapt-2/pipeline, on which a LoRA trained afterwards belongs.
    """
    net = dense_copy(teacher.net, fold_lora(teacher.net, None), codec.device)
    shard(config, net)
    stages = {"adapt-1": teacher.schedule, "adapt-2": teacher.schedule.zero_terminal_snr()}
    if teacher.prediction_type == "v_prediction":
        stages.pop("adapt-1")
    for stage, schedule in stages.items():
        student = Denoiser(net, schedule, "v_prediction")
        if config.adapt_iterations:
            resume = f"{config.resume}/{stage}"
            resume = resume if config.resume and Path(resume, "checkpoint").exists() else ""
            run = Run(replace(config, out=f"{config.out}/{stage}", resume=resume, iterations=config.adapt_iterations),
                      bound=ADAPTED_BY)
            net.requires_grad_(True)
            if config.gradient_checkpointing:
                enable_checkpointing(net)
            optimizer = torch.optim.AdamW(net.parameters(), config.adapt_lr, weight_decay=config.weight_decay, fused=True)
            models = Adaptation(teacher, student, codec, optimizer)
            run.begin(dict(student=net, optimizer=optimizer))
            for iteration, (pictures, captions) in enumerate(run.batches(dataset), run.start):
                losses = adapt_step(iteration, pictures, captions, config, run, models)
                if run.finish_iteration(iteration, losses):
                    break
            run.end()
            optimizer.zero_grad()
    net.requires_grad_(False)
    state = fold_lora(net, None)
    if int(os.environ.get("RANK", 0)) == 0:
        export_one_step(codec, dense_copy(net, state, "cpu"), "v_prediction", Path(config.out) / "adapt-2" / "pipeline",
                        zero_snr=True)
    return student


def captioned_data(config, codec, codec_d, device):
    """(dataset, captions of its first 64 pictures) of a fine-tuning, generated or cached where the flags say
    so.
    """
    name = generated_data(config, device) if config.generate else config.dataset
    dataset = load_dataset(name, codec.picture_size, config.seed)
    captions = [dataset[i]["caption"] for i in sample_order(dataset, config.seed, range(64))]
    if not any(captions):
        raise UserError(f"--dataset {name}: its pictures have no captions; add metadata.jsonl, or a .txt beside each")
    for one in {codec, codec_d}:
        one.warn_of_long(captions)
    if config.cache_latents:
        folder, made_by, all_captions = f"{config.out}/cache", dict(model=config.model, lora=config.lora), dataset.all_captions()
        dataset = cache_latents(codec, dataset, f"{folder}/latents", made_by)
        cache_conditions(codec, all_captions, f"{folder}/conditions", made_by)
        if codec_d is not codec:
            cache_conditions(codec_d, all_captions, f"{folder}/conditions-d", dict(model=config.discriminator))
    return dataset, captions


def train(config):
    """A whole run, or the rest of one; with --model its data, prior and adaptation first."""
    check(config)
    # With a decaying rate, the number of iterations is part of what a run is.
    run = Run(config, bound_flags(Config, but=() if config.lr_decay else ("iterations",)),
              1 if config.model else Discriminator.GROUP)
    start, codec, discriminator, half, codec_d = load_networks(config, run)
    prior = original = None
    if config.model:
        dataset, captions = captioned_data(config, codec, codec_d, run.device)
        if run.rank == 0:
            run.make_folder()
            prior = None if config.adapt or ends_in_noise(start) else estimate_prior(run, config, codec, dataset)
        if run.shows:
            original = original_pictures(run, config, start, codec, captions[:8])
        if config.adapt:
            adapted = adapt(config, start, codec, dataset)
            if not config.shard:  # not called again, but for what D's features share
                (start.net if config.discriminator else start.net.up_blocks).to("meta")
            start = adapted
    else:
        dataset, captions = load_dataset(config.dataset, config.image_size, config.seed), [""] * 64
    models = build(config, run, (start, codec, discriminator, half, codec_d))
    run.begin(dict(generator=models.generator.trainable(), discriminator=discriminator, ema=models.ema,
                   optimizer_g=models.optimizer_g, optimizer_d=models.optimizer_d))
    sampler = Sampler(models.generator, codec, prior, config.latent_z)

    def save_samples(name):
        if run.shows:
            with models.ema.applied():
                save_grid(torch.cat(list(draw_pictures(sampler, captions, 1, 0))), run.out / "samples" / name)

    for iteration, (pictures, texts) in enumerate(run.batches(dataset), run.start):
        remaining = (1 - iteration / config.iterations) / config.lr_decay if config.lr_decay else 1.0
        for optimizer, lr in ((models.optimizer_g, config.lr), (models.optimizer_d, config.lr_d)):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, remaining)
        losses = train_step(iteration, pictures, texts, config, run, models)
        if (iteration + 1) % config.sample_every == 0:
            save_samples(f"{iteration + 1:07d}.png")
        if run.finish_iteration(iteration, losses):
            break
    run.end()
    save_samples("final.png")
    export(config, run, sampler, models.ema, original, captions[:8])


def export(config, run, sampler, ema, original, captions):
    """The averaged generator as a diffusers pipeline in OUT/pipeline; of a fine-tuning also
    OUT/comparison.png.

    From scratch with a latent z there is no pipeline class that draws it: then only the UNet is written,
    whose class embedding is the mapping network of z.
    """
    generator, folder = sampler.generator, run.out / "pipeline"
    if config.model:  # a run has a prior just where its SNR_T is not zero
        export_student(run, sampler.codec, generator, ema, zero_snr=sampler.prior is None, prior=sampler.prior)
        if run.shows:
            with ema.applied():
                ours = [picture for nfe in (1, 2, 4) for picture in draw_pictures(sampler, captions, nfe, 0)]
        if run.rank == 0:
            save_grid(torch.cat([original, *ours]), run.out / "comparison.png")
            print(f"{run.out}/comparison.png, from above: original 1 step, original 25 steps, YOSO 1, 2 and 4 steps\n"
                  f"{folder}: a diffusers pipeline for 1, 2 or 4 steps")
        return
    if run.shows:
        state = fold_lora(generator.net, None) | {name: whole(average) for name, average in ema.average.items()}
    if run.rank == 0:
        net = scratch_generator(config)
        net.load_state_dict(state)
        if config.latent_z:
            net.save_pretrained(folder / "unet")
        else:
            DDPMPipeline(net, scratch_scheduler(config.levels)).save_pretrained(folder)
        print(f"done: one-step samples in {run.out}/samples/final.png; more with: python yoso.py sample --run {run.out}")


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
    parser = sample_flags("yoso.py", Config.out, nfe=None)
    parser.add_argument("--prior", action=argparse.BooleanOptionalAction, default=True,
                        help="start a fine-tuned model from its informative prior")
    args = parser.parse_args(argv)
    check_sample_flags(args)
    sampler, config = load_sampler(args.run, choose_device(args.device), args.prior)
    if config.model and args.nfe not in (1, 2, 4):
        raise UserError(f"--nfe {args.nfe}: choose 1, 2 or 4")
    if args.prompts and not config.model:
        raise UserError(f"--prompts: {args.run} was trained without captions")
    prompts = args.prompts or (prompts_of(config, sampler.codec) if config.model else [""])
    captions = [prompts[i % len(prompts)] for i in range(args.num)]
    save_grid(torch.cat(list(draw_pictures(sampler, captions, args.nfe, args.seed))), args.grid, flag="--grid")
    print(f"{args.num} samples with {args.nfe} network call(s): {args.grid}")


def main(argv):
    """`sample`, `merge` or, by default, `train`: from scratch, or with --model a fine-tuning."""
    if argv[:1] == ["sample"]:
        return sample_command(argv[1:])
    if argv[:1] == ["merge"]:
        return merge_command(argv[1:])
    argv = argv[1:] if argv[:1] == ["train"] else argv
    train(parse_config(Config, PRESETS, argv, __doc__.splitlines()[0], preset_of, ("sample", "merge")))


if __name__ == "__main__":
    run_command(main)
