"""YOSO, You Only Sample Once (Luo et al., arXiv 2403.12931): a GAN makes a denoiser draw in one step.

The idea. A denoiser G(x_t, t) maps a noisy picture to a clean one. From pure noise it can only guess the
mean, a blur; a GAN loss makes it guess a picture instead. Matching noise to data in one leap is a hard GAN
problem, so YOSO matches level t to a less noisy level: the "real" pictures are G's own one-step samples from
there, which are a little better than the fake ones. Level 1 learns from the data, level 2 from level 1, and
so on up to pure noise: the generator cooperates with itself.

Algorithm 1 with Eq. 6; the same numbers stand in train_step:
  1. draw data x0, noise eps, level t in 1..T; all levels of a sample share x0, eps and the condition
  2. fake = G(x_t, t); its graph is kept for step 5 where one micro-batch holds the whole batch
  3. real = sg[G(x_r, r)] at r = max(t - k, 0), target = sg[G(x_c, c)] at c = max(t - m, 0); at level 0 the
     data x0 stands in place of G's prediction
  4. discriminator: L_D = softplus(-D(real, t)) + softplus(D(sg[fake], t)), in some iterations plus R1 (--r1);
     its gradient is not clipped
  5. generator: L_G = lambda_t d(fake, x0) + lambda_t^con d(fake, target) + softplus(-D(fake, t)), through the
     updated D, which is frozen; the L2 norm of G's whole gradient is clipped to --clip-norm
  6. EMA of the generator, which only draws samples: fake, real and target come from the current weights
Sampling: x_T ~ N(0, I) (or the informative prior, below), x0 = G(x_T, T). With 2 calls: fresh noise on x0 at
level T - (T + 1) // 2, then G again. No guidance, neither here nor in training.

From scratch (Eq. 4) there are T = 4 levels and k = m = 1, G also gets a latent z (--latent-z), and D is a
network of its own. With --model the same step fine-tunes a text-to-image model in its latent space: T = 999,
k = 250, m = 25 (Eq. 6), D is half of the pretrained UNet with a head (of --discriminator's, if given), and
the consistency term's d is taken in the features of that half, frozen (Eq. 5); the reconstruction's d is l2.
Two remedies where level T is not pure noise: sampling starts from the informative prior (section 5.2), or
--adapt first makes the network predict v on a schedule that ends in pure noise (section 5.2).

Symbols, paper -> code: x, x_0 -> x0; sqrt(abar_t) -> alpha_t; G_theta -> generator; D_phi -> discriminator,
which returns logits; x^t -> fake; x^{t-1} -> real, target; k, m -> real_offset, con_offset, in thousandths of
the schedule, one level at least; lambda_t -> lambda_rec * min(reconstruction_weight, weight_limit);
lambda_t^con -> lambda_con * min(w(t), weight_limit), w = 1 / (1/SNR(t) - 1/SNR(c)), under --con-weight sqrt
with the square roots of the SNRs (preset full: lambda_con 2, sqrt, weight_limit 5); h -> half, a HalfUNet.

Differences from the paper as printed. The discriminator's second term is log(1 - D(fake)); the printed
-log D(fake) is right for the generator alone. The real side is under stop-gradient in Eq. 4 and 6 too. From
scratch the generator is diffusers' UNet2DModel instead of NCSN++: no tanh (samples are clamped instead), no
FIR resampling; the presets shapes and small have l2 for LPIPS, 20 times both weights, and R1, which section
5.1 does without. The adaptation has the weight 1 for lambda_t and clamps the teacher's x0; its second stage
regresses onto the rescaled schedule's velocity, for the printed one leaves noise in a perfect student.

Differences from the authors' fine-tuning script. The script averages D's logits over the batch before the
softplus, and the reconstruction error over the whole batch before weighting, so it has E[w] E[error] where
E[w error] is meant; with both undone, its step is the one here (tests/reference.py). It lets G(x_t, t) fade
into x_t at the lowest levels, c_skip(1) = 0.0025; here level 0 is the data itself, and t is drawn from 1.

  python yoso.py                                      shapes, 16 x 16: 9 minutes on 2 CPU cores
  python yoso.py --dataset FOLDER --out runs/mine     your pictures at 32 x 32: an hour on 2 CPU cores
  torchrun --nproc-per-node 8 yoso.py --dataset cifar10 --out runs/cifar10      the paper's preset, on GPUs
  python yoso.py sample --run runs/yoso --num 64 --nfe 1 --grid grid.png
  python yoso.py --model assets/mini-sd               fine-tunes the mini Stable Diffusion
  torchrun --nproc-per-node 8 yoso.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 64 \\
      --dataset FOLDER --out runs/sd15-lora
  python yoso.py merge --base PIXART_512 --high PIXART_1024 --tuned YOSO_512 --out PIPELINE     Eq. 7
"""

import argparse
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, LCMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (EMA, Codec, Denoiser, Draws, HalfUNet, InformativePrior, NoiseSchedule, UserError,
                    chunk_for, draw_many_steps, enable_checkpointing, frozen, hold_in_bf16, load,
                    load_distance, map_cond, set_rates, squared_distance, warmup_share)
from plumbing.cache import cache_conditions, cache_latents
from plumbing.checkpoint import read_checkpoint
from plumbing.cli import (Parser, RunFlags, bound_flags, check_flags, check_sample_flags, check_writable,
                          flag, parse_config, read_config, run_command, sample_flags)
from plumbing.data import (FreshData, generate_folder, load_dataset, load_prompts, prompts_of, sample_order,
                           to_floats)
from plumbing.files import check_folder, digest, open_tensors, write_folder, write_tensors, write_text
from plumbing.grids import save_grid, save_samples
from plumbing.run import Run, choose_device
from plumbing.shard import shard, whole
from plumbing.students import dense_copy, export_one_step, export_student, fold_lora, model_card


# Configuration: the defaults are the paper's CIFAR-10 run; a preset changes what it names

@dataclass
class Config(RunFlags):
    """Each field is a flag, and its text the --help."""
    out: str = flag("runs/yoso", "the run's folder; the same command again resumes the run", "run",
                    needed=True)

    preset: str = flag("shapes", "defaults of the other flags; not given: the preset that fits "
                       "--model, --dataset, --rank and --adapt", "data")
    model: str = flag("", "diffusers pipeline to fine-tune (SD, SDXL, PixArt); empty: from scratch", "data")
    lora: str = flag("", "LoRA weights merged into --model first", "data")
    discriminator: str = flag("", "pipeline whose UNet gives D and the features of the distance latent; "
                              "empty: --model; for PixArt: SD 1.5", "data")
    dataset: str = flag("shapes", "shapes (drawn by code), cifar10 (downloaded), folder of pictures", "data")
    image_size: int = flag(32, "from scratch: pixels; pictures are resized, centre-cropped", "data", least=1,
                           most=4096)
    flip: bool = flag(True, "mirror the pictures at random, as DDGAN does", "data")
    prompts: str = flag("", "with --generator: file of prompts; empty: the captions of --dataset", "data")
    generate: int = flag(0, "train on this many pictures of --generator, put into OUT/data; 0: on latents it "
                         "draws anew every step, as in the authors' script", "data", least=0, most=10**7)
    generator: str = flag("", "pipeline of few steps, directory or hub id; "
                          "YOSO-LoRA: stabilityai/sdxl-turbo", "data")
    generator_lora: str = flag("", "LoRA weights merged into --generator; "
                               "the data flywheel: the first LoRA, on the new base", "data")
    nfe: int = flag(1, "network calls of --generator for a picture", "data", choices=(1, 2, 4))

    iterations: int = flag(200_000, "updates of each network; paper: 200k, fine-tuning up to 30k, LoRA 5k",
                           least=1)
    batch_size: int = flag(256, "global batch, over all processes; paper: 256", least=1, most=100_000)
    lr: float = flag(2e-4, "learning rate of the generator; paper: 2e-4, fine-tuning 2e-5", above=0)
    lr_d: float = flag(2e-4, "learning rate of the discriminator; paper: 2e-4, fine-tuning 2e-5", above=0)
    lr_decay: float = flag(0.0, "share of the iterations, at the end, in which both rates fall "
                           "linearly to 0; paper: 0", least=0, most=1)
    weight_decay: float = flag(0.0, "of both AdamW; the authors' fine-tuning script: 0.01", least=0)
    clip_norm: float = flag(math.inf, "limit of the gradient norm of the generator and of the adaptation; "
                            "D is not clipped; the authors' fine-tuning script: 1", above=0, infinite=True)
    ema: float = flag(0.9999, "decay of the generator's average, which draws the samples; "
                      "paper: 0.9999, LoRA 0.999", least=0, below=1)
    ema_ramp: bool = flag(True, "let that decay rise, (1 + n) / (10 + n) at update n up to its value; "
                          "on in diffusers' EMAModel")
    rank: int = flag(0, "fine-tune a LoRA of this rank instead of all weights; paper: 64", least=0,
                     most=10_000)
    alpha: int = flag(8, "of the LoRA; the authors' script: 8, peft's default", least=1)

    levels: int = flag(4, "from scratch: T, noise levels of DDGAN's schedule; paper: 4", least=1, most=1000)
    real_offset: int = flag(1, "k, by which the real side is less noisy, in thousandths of the schedule "
                            "but at least one level; paper: one level, fine-tuning 250", least=1, most=1000)
    con_offset: int = flag(1, "m, likewise of the consistency target; paper: one level, fine-tuning 25",
                           least=1, most=1000)
    adversary: str = flag("self", "real side of D: self (YOSO), data (D_adv(p_d || p_t)), "
                          "ufogen (noisy pictures)", choices=("self", "data", "ufogen"))
    rec_distance: str = flag("lpips", "d of the reconstruction term; latent: Eq. 5; paper: lpips, "
                             "the authors' fine-tuning script: l2, to save compute",
                             choices=("lpips", "l2", "latent"))
    con_distance: str = flag("lpips", "d of the consistency term; paper: lpips, fine-tuning latent",
                             choices=("lpips", "l2", "latent"))
    lambda_rec: float = flag(1.0, "factor on the reconstruction weight min(SNR(t), limit); "
                             "the authors' fine-tuning script: 0.5", least=0)
    lambda_con: float = flag(1.0, "factor on the consistency weight min(w(t), limit); 0: the ablation; "
                             "the authors' fine-tuning script: 2", least=0)
    con_weight: str = flag("snr", "w(t): snr, the paper's 1 / (1/SNR(t) - 1/SNR(t-m)); sqrt, with the roots "
                           "of the SNRs, the authors' fine-tuning script's", choices=("snr", "sqrt"))
    weight_limit: float = flag(math.inf, "limit of both weights; the authors' fine-tuning script: 5",
                               above=0, infinite=True)
    r1: float = flag(0.0, "gamma of R1, gamma/2 |dD/dreal|^2; paper: none named", least=0)
    r1_every: int = flag(8, "iterations between R1 steps, which then weigh r1_every times as much", least=1)

    channels: tuple = flag((128, 288, 288, 288), "from scratch: of the generator, by resolution; "
                           "with 288 it has 47.3 M parameters; paper: 48 M", least=8, most=10_000)
    layers: int = flag(2, "from scratch: residual blocks a resolution; NCSN++: 2", least=1, most=100)
    attention: bool = flag(True, "from scratch: at the second resolution (16 x 16 of 32) and in the middle, "
                           "as NCSN++")
    latent_z: int = flag(100, "from scratch: size of DDGAN's latent z, 0: none; DDGAN: 100", least=0,
                         most=10_000)
    channels_d: tuple = flag((128, 256, 512, 512), "from scratch: of the discriminator, by resolution; "
                             "DDGAN: 128 256 512 512", least=1, most=10_000)

    adapt: bool = flag(False, "first adapt --model to v-prediction and zero terminal SNR")
    adapt_iterations: int = flag(500, "of each of the two stages; 0: the direct switch; "
                                 "paper: about 1,000 together", least=0)
    adapt_lr: float = flag(2e-5, "learning rate of the adaptation, constant", above=0)
    adapt_clamp: float = flag(4.0, "the teacher's x0 is clamped to +- this: "
                              "at T it magnifies the error of an epsilon network", above=0)
    prior_num: int = flag(1000, "pictures from which the informative prior is estimated", least=1,
                          most=10**6)
    teacher_guidance: float = flag(7.5, "of the original's pictures in OUT/comparison.png; SD: 7.5", least=0)

    @property
    def micro_multiple(self):
        """The size of the groups in which D from scratch compares samples."""
        return 1 if self.model else Discriminator.GROUP

    @property
    def draws_data(self):
        """Whether --generator draws the data anew every step, and none are stored."""
        return bool(self.generator) and not self.generate


SMALL = dict(
    batch_size=32, ema_ramp=False, lr_decay=0.5, rec_distance="l2", con_distance="l2", lambda_rec=20.0,
    lambda_con=20.0, channels=(16, 32, 64, 64), layers=1, attention=False, latent_z=0)
SCRATCH = {
    "cifar10": dict(dataset="cifar10", precision="bf16", micro_batch=64),
    # Measured here on earlier sizes of the shapes, one seed each: lr_d 1e-3 diverged in four of four runs
    # within 1,700 iterations; the weights' factor 1 gave 11 % clean one-step pictures after 2,000 iterations
    # where 5 gave 39 %. The 20 was chosen by the pictures, not compared with 5 under equal conditions.
    "shapes": SMALL | dict(
        image_size=16, iterations=6500, lr=1e-3, lr_d=5e-4, ema=0.998, flip=False, r1=0.02,
        channels_d=(16, 32, 64, 128)),
    # The same recipe for a folder of pictures on a CPU. CIFAR-10, one run each: lr 1e-3, lr_d 5e-4, r1 0.02
    # and the smaller discriminator jumped to L_D 3.1 at iteration 300 and stayed at textures; these rates did
    # not, and gave scenes.
    "small": SMALL | dict(
        iterations=8000, lr=5e-4, lr_d=2e-4, ema=0.999, r1=0.05, channels_d=(32, 64, 128, 128)),
}
FULL = dict(
    out="runs/yoso_t2i", dataset="", flip=False, iterations=30_000, lr=2e-5, lr_d=2e-5, weight_decay=0.01,
    clip_norm=1.0, real_offset=250, con_offset=25, latent_z=0, rec_distance="l2", con_distance="latent",
    lambda_rec=0.5, lambda_con=2.0, con_weight="sqrt", weight_limit=5.0)
MINI = FULL | dict(
    model="assets/mini-sd", dataset="shapes", iterations=2000, batch_size=32, ema=0.998, ema_ramp=False,
    lora_init="gaussian", save_every=250, adapt_iterations=300, adapt_lr=5e-4, adapt_clamp=3.0,
    teacher_guidance=2.0)
# What lets a GPU of 80 GB train the published models; docs/scaling.md has the memory.
LARGE = FULL | dict(precision="bf16", gradient_checkpointing=True, micro_batch=32)
FINE_TUNE = {
    "full": LARGE,
    "lora": LARGE | dict(rank=64, ema=0.999, iterations=5000),
    "pixart": LARGE | dict(discriminator="stable-diffusion-v1-5/stable-diffusion-v1-5", adapt=True),
    # For assets/mini-sd; measured here, see docs/yoso.md.
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
    """L_D, to be minimised (Eq. 4 maximises -L_D over phi): mean softplus(-D(real)) + softplus(D(fake)).

    Logits [B], of pictures under stop-gradient. 2 ln 2 = 1.386 where D cannot tell them apart.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def adversarial_loss(fake_logits):
    """L_adv, the non-saturating generator part of Eq. 4: mean softplus(-D(fake)); logits [B]."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits, real):
    """R1 (Mescheder et al., 2018): mean over B of |d D(real) / d real|^2; real [B, C, H, W] requires grad."""
    with torch.autocast(real.device.type, enabled=False):
        gradient, = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def reconstruction_weight(snr_t):
    """lambda_t = SNR(t), [B], which makes a squared error in x0 one in epsilon (section 4.2)."""
    return snr_t


def consistency_weight(snr_t, snr_r):
    """lambda_t^con = 1 / (1/SNR(t) - 1/SNR(r)), [B] (appendix G.1).

    From scratch SNR(0) is infinite, and the weight at r = 0 is SNR(t). A pretrained schedule's SNR(0) is
    finite, though predict_x0 returns the clean x0 there.
    """
    return 1 / (1 / snr_t - 1 / snr_r)


def sqrt_consistency_weight(snr_t, snr_r):
    """1 / (SNR(t)^-1/2 - SNR(r)^-1/2), [B], the weight of the authors' fine-tuning script.

    Infinite at t = r, 0 where SNR(t) = 0.
    """
    return 1 / (snr_t**-0.5 - snr_r**-0.5)


def generator_loss(fake_logits, d_rec, d_con, weight_rec, weight_con):
    """L_G, the minimisation over theta in Eq. 4 and 6: the loss and its three parts by name.

    L_G = mean of lambda_t d(fake, x0) + lambda_t^con d(fake, sg[target]) + softplus(-D(fake)). The arguments
    are [B]: fake_logits = D(fake), d_rec = d(fake, x0), d_con = d(fake, target), and their weights. Gradients
    go to fake alone. With d_con None there is no consistency term.
    """
    L_rec = (weight_rec * d_rec).mean()
    L_con = torch.zeros_like(L_rec) if d_con is None else (weight_con * d_con).mean()
    L_adv = adversarial_loss(fake_logits)
    return L_rec + L_con + L_adv, dict(L_rec=L_rec, L_con=L_con, L_adv=L_adv)


def weights_of(config, schedule, t, t_con):
    """lambda_t and lambda_t^con of reconstruction and consistency: factor * min(weight, limit), [B] each."""
    snr_t, snr_con = schedule.snr(t), schedule.snr(t_con)
    weight = sqrt_consistency_weight if config.con_weight == "sqrt" else consistency_weight
    return (config.lambda_rec * reconstruction_weight(snr_t).clamp(max=config.weight_limit),
            config.lambda_con * weight(snr_t, snr_con).clamp(max=config.weight_limit))


def adversarial_pair(adversary, schedule, p, fake):
    """(real, fake, level): the two sides that D compares, and the level that D is told.

    p: a part of train_step. adversary "self": YOSO, Eq. 3: G's less noisy prediction is real, and D is
    told the fake's level t. "data": D_adv(p_d || p_t), Eq. 2. "ufogen": UFOGen's critic (Xu et al., 2023) in
    the noisy space at t - k, where the data have p's eps and the prediction is noised afresh; reconstruction
    and consistency stay on clean pictures.
    """
    match adversary:
        case "self":
            return p.real, fake, p.t
        case "data":
            return p.x0, fake, p.t
        case "ufogen":
            noisy_real = schedule.add_noise(p.x0, p.eps, p.t_real)
            noisy_fake = schedule.add_noise(fake, p.noise, p.t_real)
            return noisy_real, noisy_fake, p.t_real


def adaptation_target(eps, x0, schedule, t):
    """The velocity alpha_t eps - sigma_t x0 on the student's schedule, of the teacher's eps and x0.

    eps, x0 [B, C, H, W], t [B]. In stage I of section 5.2 the student's schedule is the teacher's, and this
    is the teacher's own v. In stage II the student's schedule is the rescaled one: with the teacher's
    coefficients, as printed, a perfect student's x0 would keep a share of the noise.
    """
    alpha, sigma = schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
    return alpha * eps - sigma * x0


def adaptation_loss(v, target):
    """Mean squared error of v; [B, C, H, W] twice.

    The weight is 1, for SNR as the weight would vanish at T, from where a one-step model draws.
    """
    return (v - target).square().mean()


def add_differences(base, high, tuned, alpha, beta):
    """Eq. 7 on state dicts, key by key: base + alpha (high - base) + beta (tuned - base).

    alpha = beta = 1 carries one-step weights to a higher resolution. Weights that belong to the resolution
    alone, missing from base or tuned or of another shape there, are high's.
    """
    shared = {key for key, value in high.items()
              if all(key in other and other[key].shape == value.shape for other in (base, tuned))}
    merged = {k: torch.lerp(base[k], high[k], alpha) + beta * (tuned[k] - base[k]) for k in shared}
    return {**high, **merged}


# Networks

def ddgan_betas(levels=4, beta_min=0.1, beta_max=20.0, eps=1e-3):
    """The few-level VP schedule of DDGAN (Xiao et al., 2022), which YOSO uses from scratch: levels + 1 betas.

    Level 0 is clean data (its beta is 1e-8, as in DDGAN), level `levels` almost pure noise.
    """
    tau = np.linspace(0, 1, levels + 1) * (1 - eps) + eps
    alphas_cumprod = np.exp(-tau**2 * (beta_max - beta_min) / 2 - tau * beta_min)
    return [1e-8, *(1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).tolist()]


def scratch_scheduler(levels):
    """DDGAN's levels as an LCMScheduler for a network that predicts x0: timestep k is level k, 0 clean data.

    The scheduler samples as `draw_pictures` does: timestep_scaling switches off LCM's fade into x_t at every
    level above 0.
    """
    return LCMScheduler(
        num_train_timesteps=levels + 1, trained_betas=ddgan_betas(levels), prediction_type="sample",
        original_inference_steps=levels + 1, timestep_scaling=1e4, clip_sample=True)


class Mapping(nn.Module):
    """DDGAN's mapping network, z -> style [B, width]: four layers of 256, then one of the width asked for."""

    def __init__(self, latent_z, width):
        super().__init__()
        widths = [latent_z, 256, 256, 256, 256]
        layers = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(256, width))

    def forward(self, z):
        """z [B, latent_z], scaled to unit RMS, as by StyleGAN's PixelNorm."""
        return self.layers(F.normalize(z, dim=1) * z.shape[1]**0.5)


def scratch_generator(config):
    """G(x_t, t, z) -> x0: a UNet2DModel conditioned on z, its class embedding being the mapping network."""
    down, up = ["DownBlock2D"] * len(config.channels), ["UpBlock2D"] * len(config.channels)
    if config.attention:
        down[1], up[-2] = "AttnDownBlock2D", "AttnUpBlock2D"
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(c % g == 0 and c >= 4 * g for c in config.channels))
    has_z = config.latent_z > 0
    unet = UNet2DModel(
        sample_size=config.image_size, block_out_channels=config.channels, layers_per_block=config.layers,
        down_block_types=down, up_block_types=up, add_attention=config.attention, norm_num_groups=groups,
        class_embed_type="identity" if has_z else None,
        resnet_time_scale_shift="scale_shift" if has_z else "default")
    if has_z:
        unet.class_embedding = Mapping(config.latent_z, 4 * config.channels[0])
    return unet


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding between them, and a skip; `down` halves the resolution."""

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
    """D(x, t) -> logits [B], time-conditional and residual like DDGAN's.

    x [B, 3, H, W] is clean (noisy for UFOGen), t [B]. Groups of four neighbours in the batch share a standard
    deviation as one more feature, so the batch is a multiple of 4. The last layer starts at zero: logits 0,
    L_D = 2 ln 2.
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
            # torch's default initialisation shrinks the signal in every layer: after 1,000 iterations L_D
            # was 1.38 with it, 1.15 with this.
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
    """D(x, t, c) -> logits [B] on latents: half of a pretrained UNet, attention pooling and a head.

    All of it is trainable. The pooling is CLIP's attention: query = mean token, keys = values = all tokens.
    The last layer starts at zero: logits 0, L_D = 2 ln 2.
    """

    def __init__(self, unet, size, width=512):
        super().__init__()
        widths = unet.config.block_out_channels
        channels, places = widths[-1], (size // 2**(len(widths) - 1))**2
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
    """The cast of a step. Updates run the current weights; the average draws samples and is exported."""
    generator: Denoiser       # G: all weights or the LoRA "student"; trained by optimizer_g, averaged by ema
    discriminator: nn.Module  # D(x, t, cond) -> logits: trained by optimizer_d, frozen while G is updated
    codec: Codec              # frozen: pictures <-> x0 (from scratch the same), captions -> G's condition
    codec_d: Codec            # frozen: captions -> D's and h's condition; is codec without --discriminator
    half: HalfUNet | None     # h of Eq. 5: frozen, the pretrained weights; None from scratch
    distances: dict           # frozen: name -> (features(x, cond), distance of two features -> [B])
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    ema: EMA                  # of G's trained weights


def load_networks(config, run):
    """(start, codec, discriminator, half, codec_d): start is the Denoiser from which G starts.

    The others are as in Models. Raises UserError if the flags do not fit the pipelines.
    """
    if not config.model:
        pipe = DDPMPipeline(scratch_generator(config).to(run.device), scratch_scheduler(config.levels))
        schedule = NoiseSchedule.from_config(pipe.scheduler.config).to(run.device)
        discriminator = Discriminator(config).to(run.device)
        shard(config, pipe.unet, discriminator)
        codec = Codec(pipe)
        return Denoiser(pipe.unet, schedule, "sample"), codec, discriminator, None, codec
    check_folder(config.model)
    start, codec = load(config.model, run.device, config.lora)
    if codec.vae is None:
        raise UserError(f"--model {config.model}: works on pixels; give an SD, SDXL or PixArt pipeline")
    if config.adapt and ends_in_noise(start):
        raise UserError(f"--adapt: {config.model} has zero terminal SNR already; leave the flag out")
    other, codec_d = load(config.discriminator, run.device) if config.discriminator else (start, codec)
    if not isinstance(other.net, UNet2DConditionModel):
        raise UserError(f"--discriminator: {config.discriminator or config.model} has no UNet to make one "
                        "from; give SD 1.5, which has the same latents")
    latents = [(c.shape[0], c.vae.config.scaling_factor) for c in (codec_d, codec)]
    if latents[0] != latents[1]:
        (channels_d, scale_d), (channels, scale) = latents
        raise UserError(f"--discriminator {config.discriminator}: its latents have {channels_d} channels and "
                        f"the scale {scale_d}, --model's {channels} and {scale}; give two of the same VAE")
    # The frozen half shares the weights of a network that stays frozen too.
    stays_frozen = bool(config.rank or config.adapt or config.discriminator)
    half = HalfUNet(other.net, share=stays_frozen and not config.shard)
    discriminator = LatentDiscriminator(other.net, codec.shape[-1]).to(run.device)
    if other is not start:  # `other` is not called again
        (other.net if config.shard else other.net.up_blocks).to("meta")
    # The adaptation's teacher stays in float32.
    shard(replace(config, precision="fp32") if config.adapt else config, start.net)
    shard(config, half, discriminator)
    return start, codec, discriminator, half, codec_d


def ends_in_noise(denoiser):
    """Whether the last level of the denoiser's schedule is pure noise (zero terminal SNR)."""
    return denoiser.schedule.alpha[-1].item() < 1e-3


def build(config, run, networks=None):
    """The cast of a run; networks: those of load_networks, start perhaps adapted; None: loads them here."""
    start, codec, discriminator, half, codec_d = networks or load_networks(config, run)
    if config.precision == "bf16" and half and next(half.parameters()) is not next(start.net.parameters()):
        hold_in_bf16(half)  # where it does not share the weights below G's LoRA, which are exported
    if config.rank:
        # Freezes all but the LoRA.
        generator = start.with_lora("student", config.rank, config.alpha, init=config.lora_init)
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
        level_0 = lambda x: x.new_zeros(len(x), dtype=torch.long)  # h sees clean latents
        distances["latent"] = lambda x, cond: half(x, level_0(x), cond).float(), squared_distance
    if "lpips" in (config.rec_distance, config.con_distance):
        features, distance = load_distance("lpips", run.device)
        distances["lpips"] = lambda x, cond: features(x), distance
    optimizer_g, optimizer_d = (
        torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=config.weight_decay, fused=True)
        for parameters, lr, betas in ((generator.trainable().values(), config.lr, (0.9, 0.999)),
                                      (discriminator.parameters(), config.lr_d, (0.0, 0.999))))
    return Models(generator, discriminator, codec, codec_d, half, distances, optimizer_g, optimizer_d,
                  EMA(generator.trainable().items(), config.ema, config.ema_ramp))


# Updates

def predict_x0(generator, p, level):
    """G(x_level, level) for the part p, unguided; at level 0 its data x0 (the paper's p^(0), Eq. 3)."""
    x_level = generator.schedule.add_noise(p.x0, p.eps, level)
    prediction = generator.predict(x_level, level, "sample", p.cond)
    return torch.where((level > 0).view(-1, 1, 1, 1), prediction, p.x0)


def condition(codec, captions, draw, latent_z):
    """G's input beside x_t and t: the captions' embedding; from scratch a fresh latent z, or nothing."""
    return dict(class_labels=draw.randn(latent_z)) if latent_z else codec.cond(captions)


def distances_of(fake, p, config, distances):
    """d(fake, x0) and d(fake, target), [B] each; the second is None where lambda_con is 0.

    The gradient goes to fake alone, whose features are computed once even if both terms compare them.
    """
    pairs = [(config.rec_distance, p.x0)] + ([(config.con_distance, p.target)] if config.lambda_con else [])
    of_fake = {name: distances[name][0](fake, p.cond_d) for name in dict(pairs)}
    d = []
    for name, x in pairs:
        features, distance = distances[name]
        with torch.no_grad():
            of_x = features(x, p.cond_d)
        d.append(distance(of_fake[name], of_x))
    return d if len(d) == 2 else (*d, None)


def train_step(iteration, pictures, captions, config, run, models):
    """Algorithm 1 on this rank's pictures [B, 3, H, W] in [-1, 1], captions [B]; returns scalars to log."""
    G, D, codec, draw = models.generator, models.discriminator, models.codec, run.draws(iteration)
    T = len(G.schedule) - 1
    k, m = (max(1, round(o * (T + 1) / 1000)) for o in (config.real_offset, config.con_offset))
    # 1. One t and one eps a sample, which its three levels share; noise is for ufogen's fake alone.
    t, eps, noise = draw.randint(1, T + 1), draw.randn(*codec.shape), draw.randn(*codec.shape)
    if config.flip:
        pictures = torch.where(draw.randint(0, 2).bool().view(-1, 1, 1, 1), pictures.flip(3), pictures)
    with torch.no_grad(), run.autocast():
        cond = condition(codec, captions, draw, config.latent_z)
        cond_d = cond if models.codec_d is codec else models.codec_d.cond(captions)  # from scratch: none
        # The mean of the VAE's posterior: D would take its noise for a mark of the data.
        x0 = torch.cat([codec.encode(pictures[rows]) for rows in run.micro_batches])
    parts = run.split(x0=x0, t=t, t_real=(t - k).clamp(min=0), t_con=(t - m).clamp(min=0), eps=eps,
                      noise=noise, cond=cond, cond_d=cond_d)
    # 2, 3. With one micro-batch, one forward of G(x_t, t) serves both updates. With several, keeping the
    # graphs of all until loss_G would cost too much memory: loss_G runs G(x_t, t) again.
    keep_graph = len(parts) == 1
    for p in parts:
        with run.autocast(), torch.set_grad_enabled(keep_graph):
            p.fake = predict_x0(G, p, p.t)
        with run.autocast(), torch.no_grad():
            p.real = predict_x0(G, p, p.t_real) if config.adversary == "self" else p.x0
            if config.lambda_con:
                p.target = p.real if k == m and config.adversary == "self" else predict_x0(G, p, p.t_con)
    with_r1 = config.r1 > 0 and iteration % config.r1_every == 0

    def loss_D(p):  # 4. Both sides detached, one level told for both; R1 needs the gradient at `real`.
        real, fake, level = adversarial_pair(config.adversary, G.schedule, p, p.fake.detach())
        real = real.detach().requires_grad_(with_r1)
        cond_twice = map_cond(lambda v: torch.cat([v, v]), p.cond_d)  # both sides in one call
        logits = D(torch.cat([real, fake]), torch.cat([level, level]), cond_twice).float()
        real_logits, fake_logits = logits.chunk(2)
        L_D = discriminator_loss(real_logits, fake_logits)
        penalty = config.r1 / 2 * config.r1_every * r1_penalty(real_logits, real) if with_r1 else 0.0
        return L_D + penalty, dict(L_D=L_D, D_real=real_logits.mean(), D_fake=fake_logits.mean())

    def loss_G(p):  # 5. The gradient reaches theta through `fake` alone, in all three terms.
        fake = p.fake if keep_graph else predict_x0(G, p, p.t)
        _, seen, level = adversarial_pair(config.adversary, G.schedule, p, fake)
        logits = D(seen, level, p.cond_d).float()
        distances = distances_of(fake, p, config, models.distances)
        return generator_loss(logits, *distances, *weights_of(config, G.schedule, p.t, p.t_con))

    with sdpa_kernel(SDPBackend.MATH) if with_r1 else nullcontext():  # R1 differentiates attention twice
        scalars = run.descend(models.optimizer_d, parts, loss_D)
    with frozen(D):  # D is updated; its weights get no gradient now, its input does and hands it to `fake`
        scalars |= run.descend(models.optimizer_g, parts, loss_G, config.clip_norm)
    models.ema.update(iteration)  # 6.
    return scalars


@dataclass
class Adaptation:
    """The cast of a step of the adaptation."""
    teacher: Denoiser  # frozen: the network as it was, on its own schedule
    student: Denoiser  # predicts v, in stage II on the rescaled schedule; all weights trained by optimizer
    codec: Codec       # frozen
    optimizer: torch.optim.Optimizer


def adapt_step(iteration, pictures, captions, config, run, models):
    """One regression step of section 5.2, of the student's v onto the teacher's prediction.

    Each of the two runs on its own schedule.
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
    """What G needs to draw pictures, with the weights that it holds: train puts the average in first."""
    generator: Denoiser
    codec: Codec
    prior: InformativePrior | None = None
    latent_z: int = 0


def sampling_levels(T, nfe):
    """nfe levels, falling from T (for T = 4: 4; 4 2; 4 3 2 1), spaced like LCMScheduler's timesteps."""
    if not 1 <= nfe <= T:
        raise UserError(f"--nfe {nfe}: this run has {T} levels, so 1 to {T} network calls")
    return [T - i * (T + 1) // nfe for i in range(nfe)]


@torch.no_grad()
def sample(generator, levels, x_T, noise, cond, limit=math.inf):
    """x_T [B, C, H, W] -> x0, one network call a level of `levels` (falling, from T).

    noise: one [B, C, H, W] for each level after the first: x_l = alpha_l x0 + sigma_l noise. x0 is clamped to
    +- limit, which is 1 for pictures and infinite for latents.
    """
    x_t, t = x_T, torch.full((len(x_T),), levels[0], device=x_T.device)
    x0 = generator.predict(x_t, t, "sample", cond).clamp(-limit, limit)
    for level, fresh in zip(levels[1:], noise):
        t = torch.full_like(t, level)
        x_t = generator.schedule.add_noise(x0, fresh, t)
        x0 = generator.predict(x_t, t, "sample", cond).clamp(-limit, limit)
    return x0


@torch.no_grad()
def draw_pictures(sampler, captions, nfe, seed, first=0):
    """Yields chunks of pictures in [-1, 1], one a caption, on the CPU; one seed draws the same everywhere.

    first: the number of the first picture, which decides its noise.
    """
    generator, codec, chunk = sampler.generator, sampler.codec, chunk_for(sampler.codec)
    levels = sampling_levels(len(generator.schedule) - 1, nfe)
    for start in range(0, len(captions), chunk):
        y = captions[start:start + chunk]
        draw = Draws(seed, first + start, len(y), slice(None), "cpu")
        # Two for x_T, of which the second is the prior's, and one for each later level.
        eps, eps_prime, *noise = (draw.randn(*codec.shape).to(codec.device) for _ in range(1 + nfe))
        x_T = sampler.prior.start(generator.schedule, eps, eps_prime) if sampler.prior else eps
        cond = map_cond(lambda v: v.to(codec.device), condition(codec, y, draw, sampler.latent_z))
        x0 = sample(generator, levels, x_T, noise, cond, 1.0 if codec.vae is None else math.inf)
        yield codec.decode(x0).clamp(-1, 1).cpu()


def load_sampler(folder, device="cpu", prior=True):
    """A run's averaged generator, as (Sampler, config).

    From scratch it is read from the last checkpoint, of a fine-tuning from the finished pipeline. prior:
    whether to start from the informative prior, if the run has one. Raises UserError if there is nothing yet.
    """
    config = read_config(Config, Path(folder) / "config.json")
    if config.model:
        pipeline = Path(folder) / "pipeline"
        if not pipeline.exists():
            raise UserError(f"--run {folder}: not finished; see its samples/ while it runs")
        check_folder(pipeline)
        start = InformativePrior.read(pipeline, device) if prior else None
        return Sampler(*load(pipeline, device), start), config
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

    refuse(config.shard and config.r1, "shard", "cannot differentiate twice, as R1 does; give --r1 0")
    if config.model:
        presets = ", ".join(FINE_TUNE)
        refuse(config.preset in SCRATCH, "preset", f"trains from scratch; --model takes one of {presets}")
        for name in ("image_size", "levels", "channels", "layers", "attention", "latent_z", "channels_d"):
            given = getattr(config, name) != FINE_TUNE[config.preset].get(name, getattr(Config, name))
            refuse(given, name, "is for a run from scratch; leave it out with --model")
        for name in ("rec_distance", "con_distance"):
            refuse(getattr(config, name) == "lpips", name, "compares pictures; --model takes latent or l2")
        refuse(config.flip and config.cache_latents, "flip", "cannot mirror cached latents; give --no-flip")
        without = config.generate and not config.generator
        refuse(without, "generate", "needs a --generator that draws the pictures")
        for name in ("generator_lora", "prompts"):
            refuse(getattr(config, name) and not config.generator, name, "needs a --generator that draws")
        for name, only in dict(flip=False, workers=0, nfe=1).items():
            other = config.draws_data and getattr(config, name) != only
            refuse(other, name, "is for stored pictures; leave it out, or give --generate NUMBER")
        if not (config.dataset or config.generator and config.prompts):
            raise UserError("--dataset: give a folder of captioned pictures, or have them drawn by "
                            "--generator and --prompts")
        return
    refuse(config.preset in FINE_TUNE, "preset", "needs --model PIPELINE to fine-tune")
    drawn = ("generate", "generator", "generator_lora", "prompts")
    for name in ("rank", "lora", "adapt", "discriminator", *drawn):
        refuse(getattr(config, name), name, "needs --model PIPELINE to fine-tune")
    for name in ("rec_distance", "con_distance"):
        latent = getattr(config, name) == "latent"
        refuse(latent, name, "compares latents of --model; from scratch choose lpips or l2")
    halvings = max(len(config.channels), len(config.channels_d)) - 1
    refuse(config.image_size % 2**halvings, "image_size", f"must be a multiple of {2**halvings}")
    flat = len(config.channels) < 2
    refuse(config.attention and flat, "attention", "must be off where --channels has one resolution")


def generated_data(config, device):
    """The folder OUT/data of --generate pictures by --generator, each with its prompt as caption."""
    def load_artist():
        """(prompts, draw, chunk): draw(at most chunk prompts, number of the first) -> their pictures."""
        prior = InformativePrior.read(config.generator, device)
        sampler = Sampler(*load(config.generator, device, config.generator_lora), prior)
        draw = lambda y, first: torch.cat(list(draw_pictures(sampler, y, config.nfe, config.seed, first)))
        return prompts_of(config, sampler.codec), draw, chunk_for(sampler.codec)

    folders = [Path(folder) / "data" for folder in (config.out, config.resume) if folder]
    folder = next((folder for folder in folders if folder.exists()), folders[0])
    names = ("generator", "generator_lora", "nfe", "prompts", "dataset", "seed")
    made_by = {name: getattr(config, name) for name in names}
    if config.prompts:
        made_by["digest of the prompts"] = digest(load_prompts(config.prompts))
    return generate_folder(folder, config.generate, made_by, load_artist)


@torch.no_grad()
def estimate_prior(run, config, codec, dataset):
    """The InformativePrior of the run's first pictures; kept in OUT for a resumed run."""
    path = Path(config.out) / InformativePrior.FILE
    if run.start and path.exists():
        file = open_tensors(path, run.origin)
        return InformativePrior(*(torch.from_numpy(file.get_tensor(name)).to(codec.device)
                                  for name in ("mean", "std")))
    latents, order = [], sample_order(dataset, config.seed, range(config.prior_num))
    for first in range(0, len(order), chunk := chunk_for(codec)):
        pictures = torch.stack([dataset[i]["image"] for i in order[first:first + chunk]])
        latents.append(codec.encode(to_floats(pictures.to(codec.device))).cpu())
    prior = InformativePrior.of(torch.cat(latents).to(codec.device))
    write_tensors(path, dict(mean=prior.mean, std=prior.std), run.origin)
    return prior


def original_pictures(run, config, teacher, codec, captions):
    """Pictures of the model before its fine-tuning, in 1 and in 25 DDIM steps: [2 N, 3, H, W].

    They are kept in OUT for a resumed run.
    """
    path = Path(config.out) / "original.safetensors"
    if not run.start or not path.exists():
        guidance = config.teacher_guidance
        pictures = [draw_many_steps(teacher, codec, captions, steps, guidance) for steps in (1, 25)]
        if run.rank == 0:
            write_tensors(path, dict(pictures=torch.cat(pictures)), run.origin)
    return torch.from_numpy(open_tensors(path, run.origin).get_tensor("pictures")) if run.rank == 0 else None


# The flags on which the adaptation depends.
ADAPTED_BY = {"model", "lora", "dataset", "prompts", "generate", "generator", "generator_lora", "nfe", "seed",
              "batch_size", "precision", "weight_decay", "clip_norm", "adapt_iterations", "adapt_lr",
              "adapt_clamp"}


def adapt(config, teacher, codec, dataset):
    """Section 5.2: a copy of the teacher that predicts v with zero terminal SNR, by two regressions.

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
            out, iterations = f"{config.out}/{stage}", config.adapt_iterations
            run = Run(replace(config, out=out, resume=resume, iterations=iterations), bound=ADAPTED_BY)
            net.requires_grad_(True)
            if config.gradient_checkpointing:
                enable_checkpointing(net)
            optimizer = torch.optim.AdamW(
                net.parameters(), config.adapt_lr, weight_decay=config.weight_decay, fused=True)
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
        folder = Path(config.out) / "adapt-2" / "pipeline"
        export_one_step(codec, dense_copy(net, state, "cpu"), "v_prediction", folder, zero_snr=True)
    return student


def captioned_data(config, run, codec, codec_d):
    """A fine-tuning's (dataset, captions of 64 pictures); generated, cached where the flags say so."""
    name = generated_data(config, run.device) if config.generate else config.dataset
    dataset = (FreshData(config, run, codec) if config.draws_data else
               load_dataset(name, codec.picture_size, config.seed))
    captions = [dataset[i]["caption"] for i in sample_order(dataset, config.seed, range(64))]
    if not any(captions):
        raise UserError(f"--dataset {name}: its pictures have no captions; add metadata.jsonl, or a .txt "
                        "beside each")
    for one in {codec, codec_d}:
        one.warn_of_long(captions)
    if config.cache_latents:
        folder, made_by = f"{config.out}/cache", dict(model=config.model, lora=config.lora)
        all_captions = dataset.all_captions()
        dataset = cache_latents(codec, dataset, f"{folder}/latents", made_by)
        cache_conditions(codec, all_captions, f"{folder}/conditions", made_by)
        if codec_d is not codec:
            made_by = dict(model=config.discriminator)
            cache_conditions(codec_d, all_captions, f"{folder}/conditions-d", made_by)
    return dataset, captions


def train(config):
    """A whole run, or the rest of one; with --model its data, prior and adaptation first."""
    check(config)
    # Where the rates decay, a continued run must repeat the number of iterations.
    bound = bound_flags(Config, but=() if config.lr_decay else ("iterations",))
    run = Run(config, bound)
    start, codec, discriminator, half, codec_d = load_networks(config, run)
    prior = original = None
    if config.model:
        dataset, captions = captioned_data(config, run, codec, codec_d)
        run.make_folder()
        if run.rank == 0 and not config.adapt and not ends_in_noise(start):
            prior = estimate_prior(run, config, codec, dataset)
        if run.shows:
            original = original_pictures(run, config, start, codec, captions[:8])
        if config.adapt:
            adapted = adapt(config, start, codec, dataset)
            if not config.shard:  # not called again, except for the part that D's features share
                (start.net if config.discriminator else start.net.up_blocks).to("meta")
            start = adapted
    else:
        dataset, captions = load_dataset(config.dataset, config.image_size, config.seed), [""] * 64
    models = build(config, run, (start, codec, discriminator, half, codec_d))
    run.begin(dict(generator=models.generator.trainable(), discriminator=discriminator, ema=models.ema,
                   optimizer_g=models.optimizer_g, optimizer_d=models.optimizer_d))
    sampler = Sampler(models.generator, codec, prior, config.latent_z)

    def samples():
        """One-step pictures of the averaged generator."""
        with models.ema.applied():
            return torch.cat(list(draw_pictures(sampler, captions, 1, 0)))

    for iteration, (pictures, texts) in enumerate(run.batches(dataset), run.start):
        remaining = (1 - iteration / config.iterations) / config.lr_decay if config.lr_decay else 1.0
        share = min(1.0, remaining) * warmup_share(iteration, config.lr_warmup)
        set_rates(share, models.optimizer_g, models.optimizer_d)
        losses = train_step(iteration, pictures, texts, config, run, models)
        if run.finish_iteration(iteration, losses, samples):
            break
    run.end()
    if run.shows:
        save_grid(samples(), run.out / "samples" / "final.png")
    export(config, run, sampler, models.ema, original, captions[:8])


def export(config, run, sampler, ema, original, captions):
    """Writes the averaged generator to OUT/pipeline, for diffusers; of a fine-tuning also OUT/comparison.png.

    No pipeline class draws a latent z: of a run from scratch with one, only the UNet is written, whose class
    embedding is the mapping network of z.
    """
    generator, folder = sampler.generator, run.out / "pipeline"
    card = model_card("YOSO (arXiv 2403.12931)", config, sampler.codec, sampler.prior is not None)
    if config.model:  # a run has a prior just where its SNR_T is not zero
        prior = sampler.prior
        export_student(run, sampler.codec, generator, ema, zero_snr=prior is None, prior=prior, card=card)
        if run.shows:
            with ema.applied():
                ours = [picture for nfe in (1, 2, 4) for picture in draw_pictures(sampler, captions, nfe, 0)]
        if run.rank == 0:
            rows = ["original, 1 step", "original, 25 steps",
                    "YOSO, 1 call", "YOSO, 2 calls", "YOSO, 4 calls"]
            save_grid(torch.cat([original, *ours]), run.out / "comparison.png", rows=rows, captions=captions)
            print(f"{run.out}/comparison.png: the original beside YOSO, same captions\n"
                  f"{folder}: a diffusers pipeline for 1, 2 or 4 steps")
        return
    if run.shows:
        averages = {name: whole(average) for name, average in ema.average.items()}
        state = fold_lora(generator.net, None) | averages
    if run.rank == 0:
        net = scratch_generator(config)
        net.load_state_dict(state)
        pipe = DDPMPipeline(net, scratch_scheduler(config.levels))

        def save(path):
            if config.latent_z:
                net.save_pretrained(path / "unet")
            else:
                pipe.save_pretrained(path)
            write_text(path / "README.md", card)

        write_folder(folder, save)
        print(f"done: one-step samples in {run.out}/samples/final.png; more with: python yoso.py sample "
              f"--run {run.out}")


# Main

def merge_command(argv):
    """`python yoso.py merge`: Eq. 7 on three pipelines of one architecture, written as a pipeline."""
    formula = "base + alpha (high - base) + beta (tuned - base), key by key."
    parser = Parser(prog="yoso.py merge", description=formula)
    parser.add_argument("--base", required=True, help="the pretrained pipeline")
    parser.add_argument("--high", required=True, help="a fine-tune of --base, at a higher resolution or not")
    parser.add_argument("--tuned", required=True, help="YOSO's, trained from --base")
    parser.add_argument("--alpha", type=float, default=1.0, help="factor on high - base; paper: 1")
    parser.add_argument("--beta", type=float, default=1.0, help="factor on tuned - base; paper: 1")
    parser.add_argument("--out", required=True, help="folder of the merged pipeline; predicts like --tuned")
    args = parser.parse_args(argv)
    check_flags(args, alpha={}, beta={})
    if Path(args.out).exists():
        raise UserError(f"--out {args.out}: exists already; choose a new folder")
    check_writable(args.out, "--out", deep=True)
    (base, _), (high, codec), (tuned, _) = (load(path) for path in (args.base, args.high, args.tuned))
    states = [model.net.state_dict() for model in (base, high, tuned)]
    of_base, of_high, of_tuned = ({key: value.shape for key, value in state.items()} for state in states)
    # A table of positions belongs to the resolution.
    other = [key for key, shape in of_base.items()
             if of_high.get(key, shape) != shape and "pos_embed" not in key]
    if len({type(model.net) for model in (base, high, tuned)}) > 1 or of_base != of_tuned or other:
        raise UserError("--base, --high and --tuned: must be of one architecture, --high's resolution aside")
    zero_snr, prior = tuned.schedule.alpha[-1].item() < 1e-3, InformativePrior.read(args.tuned)
    if prior and prior.mean.shape != codec.shape:
        prior = None
    state = add_differences(*states, args.alpha, args.beta)
    merged = dense_copy(high.net, state, "cpu")
    export_one_step(codec, merged, tuned.prediction_type, args.out, zero_snr=zero_snr, prior=prior)
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
    pictures = torch.cat(list(draw_pictures(sampler, captions, args.nfe, args.seed)))
    save_samples(args, pictures, captions)
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
