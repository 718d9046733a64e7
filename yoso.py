"""YOSO, You Only Sample Once, trained from scratch (Luo et al., arXiv 2403.12931): a denoiser that a GAN makes one-step.

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

Symbols, paper -> code: x, x_0 -> x0; x_t -> x_t; x_{t-1} -> x_r; sqrt(abar_t) -> alpha_t; G_theta -> generator; D_phi ->
discriminator (returns logits); x^t -> fake; x^{t-1} -> target; lambda_t -> lambda_rec; lambda_t^con -> lambda_con; eta -> lr.

What differs from the paper as printed. The discriminator's second term is log(1 - D(fake)), not -log D(fake), as in any GAN.
The target is under stop-gradient in both places. Both pictures go into D with the fake's t. The generator is diffusers'
UNet2DModel instead of NCSN++: no tanh (samples are clamped instead), no FIR resampling.

  python yoso.py                                      shapes, 16 x 16: 9 minutes on 2 CPU cores
  python yoso.py --dataset FOLDER --out runs/mine     your pictures at 32 x 32, preset small: about an hour on 2 CPU cores
  torchrun --nproc-per-node 8 yoso.py --dataset cifar10 --out runs/cifar10       the paper's preset, on GPUs
  python yoso.py sample --run runs/yoso --num 64 --nfe 1 --grid grid.png
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, LCMScheduler, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from common import (EMA, FREE_FLAGS, Draws, NoiseSchedule, Run, UserError, choose_device, ddgan_betas, flag, load_dataset,
                    load_distance, mean_of, parse_config, read_checkpoint, run_command, save_grid, squared_distance)


# Configuration: the defaults are the paper's CIFAR-10 run; a preset changes what it names

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


def generator_loss(fake, x0, target, fake_logits, lambda_rec, lambda_con, distance=squared_distance):
    """L_G, Eq. 4's minimisation over theta: lambda_t d(fake, x0) + lambda_con d(fake, sg[target]) + softplus(-D(fake)).

    fake, x0, target [B, C, H, W]; fake_logits = D(fake), with its graph to fake, [B]; weights [B]; distance: two batches -> [B].
    Returns the sum and its three parts.
    """
    L_rec = (lambda_rec * distance(fake, x0)).mean()
    L_con = (lambda_con * distance(fake, target.detach())).mean()
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


# Sampling

@torch.no_grad()
def sample(generator, schedule, levels, x_T, z=None, noise=None):
    """x_T [B, 3, H, W] -> pictures in [-1, 1], one network call a level of `levels` (falling, from T).

    noise: one [B, 3, H, W] for each level after the first: x_l = alpha_l x0 + sigma_l noise. One level needs none.
    """
    x_t = x_T
    for i, level in enumerate(levels):
        if i > 0:
            x_t = schedule.add_noise(x0, noise[i - 1], torch.full_like(t, level))
        t = torch.full((len(x_t),), level, device=x_t.device)
        x0 = generator(x_t, t, z).clamp(-1, 1)
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


def load_generator(run, device="cpu"):
    """The averaged generator of a finished or running run's last checkpoint: (generator, schedule, config)."""
    saved = read_checkpoint(Path(run) / "checkpoint" / "state.pt")
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

    for iteration, (x0, _) in enumerate(run.batches(dataset), run.start):
        remaining = (1 - iteration / config.iterations) / config.lr_decay if config.lr_decay else 1.0
        for optimizer, lr in ((optimizer_g, config.lr), (optimizer_d, config.lr_d)):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, remaining)
        losses = train_step(iteration, x0, run, config, schedule, distance, generator, discriminator, optimizer_g, optimizer_d)
        ema.update()  # 6.
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


# Main

def sample_command(argv):
    """`python yoso.py sample`: a grid of a finished or running run's samples."""
    parser = argparse.ArgumentParser(prog="yoso.py sample", description="Samples of a finished or running run.", allow_abbrev=False)
    parser.add_argument("--run", default="runs/yoso", help="the run's folder")
    parser.add_argument("--num", type=int, default=64, help="number of pictures")
    parser.add_argument("--nfe", type=int, default=1, help="network calls a picture")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--grid", default="grid.png", help="the PNG to write")
    args = parser.parse_args(argv)
    if args.num < 1:
        raise UserError(f"--num {args.num}: must be at least 1")
    device = choose_device(args.device)
    generator, schedule, config = load_generator(args.run, device)
    try:
        save_grid(draw_samples(generator, schedule, config, args.num, args.nfe, args.seed, device), args.grid)
    except (OSError, ValueError) as error:
        raise UserError(f"--grid {args.grid}: cannot be written ({error})")
    print(f"{args.num} samples with {args.nfe} network call(s): {args.grid}")


def main(argv):
    """`sample` or, by default, `train`."""
    if argv[:1] == ["sample"]:
        return sample_command(argv[1:])
    train(parse_config(Config, PRESETS, argv[1:] if argv[:1] == ["train"] else argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    run_command(main)
