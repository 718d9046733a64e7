"""Diff-Instruct* (Luo et al., arXiv 2410.20898): a one-step text-to-image model trained for a human reward, without a picture.

The idea. A one-step generator g(z, c) is moved towards what a reward model likes, while a divergence between its noised pictures
and a reference diffusion's keeps it from cheating the reward. The divergence compares scores, the gradients of the log-densities,
instead of densities (KL): a distance d of the two scores, summed over all noise levels. The reference's score is known; the
generator's own is learned all along by a second network, the assistant. The gradient of such a divergence needs the derivative of
the generator's score by its parameters, which nobody has; the paper's theorem gives a loss with the same gradient that needs none.

One iteration; the same numbers stand in the code:
  1. assistant, K_TA times: x0 = g(z, c) detached, x_t = alpha_t x0 + sigma_t eps; |eps_assistant(x_t) - eps|^2
  2. f = g(z, c), x_t = alpha_t f + sigma_t eps with fresh noise; eps_reference = eps_c + alpha_cfg (eps_c - eps_null)
  3. divergence: -d'(eps_assistant - eps_reference)^T (eps_assistant - eps), gradient through x_t into both networks' inputs
  4. reward: -alpha_rew r(decode(f), c)
  5. both gradients at f, then back through the generator; EMA
Sampling: one network call, f = (z - sigma_T eps_theta(z, T, c)) / alpha_T.

Symbols, paper -> code: g_theta -> student; s_q -> reference, the frozen teacher; s_psi -> assistant; alpha_rew, alpha_cfg as they
are (alpha_cfg is w - 1 of diffusers' guidance_scale w); K_TA -> assistant_steps; d -> distance; c of pseudo-Huber -> huber_c.

What differs from the paper as printed. Its Eq. 3.5 and 3.6 push away from the prompt: the sign of the guidance term is turned
(cfg_loss). Its guided reference lacks a difference: s_c + alpha_cfg (s_c - s_null) (choice 2). Scores are noise predictions here,
s = -eps / sigma_t, which is the weight w(t) = sigma_t. The updates of one iteration share their prompts, with fresh noise each.
The loss is 0 in expectation for an exact assistant: it is no measure of progress; the reward and the probe are.

  python diff_instruct_star.py                from runs/swiftbrush_v2 if it is there, 2 minutes on 2 CPU cores; else from the teacher, 5
  torchrun --nproc-per-node 8 diff_instruct_star.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt \\
      --student tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin --student-timestep 399
  python diff_instruct_star.py sample --run runs/diff_instruct_star --prompts "a large red circle on white" --num 16
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common import (
    EMA,
    LORA_TARGETS,
    Denoiser,
    UserError,
    Weights,
    add_lora,
    check_targets,
    chunks_of,
    draw_many_steps,
    draw_samples,
    enable_checkpointing,
    load,
    load_decoder,
    load_scorer,
    one_step,
    part_of,
)
from plumbing.cache import cache_conditions
from plumbing.cli import flag, parse_config, read_config, run_command
from plumbing.data import agreed, prompts_of, save_grid
from plumbing.run import Run, choose_device, mean_of, start_processes
from plumbing.shard import shard
from plumbing.students import convert, dense_copy, export_student, load_teacher, starting_student

# Configuration: the defaults are the paper's SDXL run; a preset changes what it names

@dataclass
class Config:
    """One field a flag; the text is also its --help."""
    model: str = flag("assets/mini-sd", "the reference diffusion: a diffusers pipeline, directory or hub id; paper: SDXL base")
    student: str = flag("", "one-step model to start from, a pipeline or a file of weights; empty: SwiftBrush's run, else the teacher")
    student_timestep: int = flag(0, "the timestep that conditions the student, 0: the last; paper: 399, as DMD2 was trained")
    lora: str = flag("", "LoRA weights merged into the student's start")
    prompts: str = flag("", "file of prompts; empty: the captions of --dataset")
    dataset: str = flag("shapes", "shapes, cifar10 or a folder: its captions are the prompts")
    preset: str = flag("sdxl", "defaults of the other flags: shapes for the mini model, cifar10 for --dataset cifar10, else sdxl")
    out: str = flag("runs/diff_instruct_star", "the run's folder; the same command again resumes what lies there")
    resume: str = flag("", "folder of another run of the same configuration, to continue from its checkpoint")
    seed: int = flag(0, "of weights, prompts and noise")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("fp32", "fp32, or bf16 for the networks (weights and losses stay fp32)")
    compile: bool = flag(False, "torch.compile the networks; with --assistant lora the student's alone")
    gradient_checkpointing: bool = flag(False, "recompute the networks' activations in the backward pass: less memory, more time")
    cache_latents: bool = flag(False, "encode all prompts once, float16, to OUT/cache; the text encoders leave the device")
    shard: bool = flag(False, "FSDP2: every process keeps its part of the networks' weights, gradients, moments and averages")
    log_every: int = flag(50, "iterations between lines of metrics.jsonl")
    save_every: int = flag(500, "iterations between checkpoints")
    sample_every: int = flag(500, "iterations between grids in samples/")

    iterations: int = flag(10_000, "iterations with the reward, after the warm-ups; the paper gives no number")
    batch_size: int = flag(64, "global batch, over all processes; the paper gives none")
    micro_batch: int = flag(0, "samples a process handles at once, 0: all; changes memory, not the result")
    lr: float = flag(5e-7, "Adam learning rate of the student; DMD2's for SDXL, the paper gives none")
    lr_assistant: float = flag(5e-7, "Adam learning rate of the assistant; as DMD2")
    beta1: float = flag(0.0, "Adam's first beta of both; SiD and Diff-Instruct: 0")
    clip_norm: float = flag(10.0, "gradient norm of student and assistant; DMD2 for SDXL: 10")
    ema: float = flag(0.999, "decay of the student's average, which is what samples")

    divergence: str = flag("score", "score (Diff-Instruct*; with reward 0: SIM) or kl (Diff-Instruct++; with reward 0: Diff-Instruct)")
    distance: str = flag("huber", "of the scores, huber (pseudo-Huber) or l2; paper: huber")
    huber_c: float = flag(0.0, "its constant c; 0: 0.00054 sqrt(dimensions), of improved consistency training; the paper gives none")
    detach_normaliser: bool = flag(False, "take pseudo-Huber's denominator as a constant, as SiD does; the theorem does not")
    alpha_rew: float = flag(100.0, "weight of the reward, a cosine; paper: 100, which is 1 on PickScore's logits")
    alpha_cfg: float = flag(7.5, "strength of the guidance, w - 1 in diffusers' convention; 0: none; paper: 7.5")
    cfg_choice: int = flag(2, "2: in the reference; 1: as a reward of its own; the same for kl; paper's best: 2")
    reward: str = flag("pickscore", "pickscore, clip, hps, or a CLIPModel's directory or hub id; empty: none")
    probe: str = flag("clip", "a second reward, only logged: where it falls while the reward rises, the reward is cheated; empty: none")
    decoder: str = flag("tiny", "AutoencoderTiny that decodes for the rewards; tiny: TAESD, SDXL's or SD's; empty: the model's own")
    t_min: int = flag(20, "lowest timestep of the divergence; SiD-LSG: 20")
    t_max: int = flag(979, "highest; SiD-LSG: 979")

    assistant: str = flag("full", "full: a copy of the reference's weights; lora: an adapter on the reference itself")
    assistant_steps: int = flag(1, "K_TA, updates of the assistant an iteration; Diff-Instruct and SiD: 1, DMD2 for SDXL: 5")
    assistant_warmup: int = flag(0, "iterations at the start in which only the assistant learns")
    warmup: int = flag(1000, "then iterations without reward, where the student starts from the teacher's weights")
    lora_targets: tuple = flag(LORA_TARGETS, "layers of a LoRA assistant, by the ends of their names")
    rank: int = flag(64, "of a LoRA assistant; SwiftBrush v2's")
    alpha: int = flag(128, "of a LoRA assistant; SwiftBrush v2's")

    prediction: str = flag("", "what the student predicts: as its start, or epsilon or v_prediction, converted first")
    convert_iterations: int = flag(150, "of the conversion, a regression onto the old x0 at the last timestep")
    convert_lr: float = flag(1e-5, "of the conversion")
    convert_clamp: float = flag(4.0, "the old x0 at the last timestep is clamped to +- this")
    teacher_guidance: float = flag(7.5, "of the reference's many-step pictures in OUT/comparison.png, diffusers' convention")


PRESETS = {
    "sdxl": dict(),
    "shapes": dict(
        iterations=200, batch_size=32, lr=1e-4, lr_assistant=5e-4, ema=0.98, save_every=100, sample_every=100, alpha_rew=10.0,
        assistant_warmup=50, warmup=300, prediction="v_prediction", convert_lr=5e-4, convert_clamp=3.0, decoder="assets/mini-taesd",
        reward="assets/mini-pickscore", probe="assets/mini-judge", teacher_guidance=2.0),
    "cifar10": dict(
        model="google/ddpm-cifar10-32", iterations=20_000, batch_size=128, lr=1e-5, lr_assistant=1e-5, alpha_rew=0.0, alpha_cfg=0.0,
        reward="", probe="", decoder="", warmup=0, prediction="v_prediction", convert_clamp=1.0, convert_lr=1e-4, teacher_guidance=1.0),
}
SWIFTBRUSH = "runs/swiftbrush_v2/pipeline"  # where swiftbrush_v2.py leaves its merged student


def preset_of(given):
    """The preset that fits the flags given: a real model must not get the mini model's rates."""
    if given.get("dataset") == "cifar10":
        return "cifar10"
    return "shapes" if Path(given.get("model", Config.model)) == Path(Config.model) else "sdxl"


# Losses

def distance_gradient(y, distance, c, detach_normaliser=False):
    """d'(y), the gradient of the distance d at y [B, ...]: 2 y for d = |y|^2, y / sqrt(|y|^2 + c^2) for pseudo-Huber.

    The norm runs over a whole sample. detach_normaliser: see Config.
    """
    if distance == "l2":
        return 2 * y
    norm = (y.square().sum(tuple(range(1, y.ndim)), keepdim=True) + c**2).sqrt()
    return y / (norm.detach() if detach_normaliser else norm)


def score_loss(assistant, reference, target, distance="huber", c=1.0, detach_normaliser=False):
    """Eq. 3.4, the loss with the score divergence's gradient: mean over B of -d'(assistant - reference)^T (assistant - target).

    assistant, reference, target [B, ...]: the two scores at x_t and -eps / sigma_t; or two noise predictions and eps, which is the
    weight w(t) = sigma_t (sigma_t^2 for l2). All three follow x_t, with the gradient through the networks' input: for any field u,
    E u^T s_student(x_t) = E u^T (-eps / sigma_t), and differentiating both sides by the student's parameters moves the unknown
    derivative of s_student onto what can be computed. Detaching the assistant in either place gives another gradient.
    """
    u = distance_gradient(assistant - reference, distance, c, detach_normaliser)
    return -(u * (assistant - target)).flatten(1).sum(1).mean()


def kl_loss(x_t, assistant, reference):
    """Diff-Instruct's: the gradient of KL(student || reference) at x_t is s_student - s_reference; mean over B of its product
    with x_t. With noise predictions [B, ...] the weight is w(t) = sigma_t, as in score_loss."""
    return ((reference - assistant).detach() * x_t).flatten(1).sum(1).mean()


def cfg_loss(x_t, conditional, unconditional, alpha_cfg):
    """Choice 1, guidance as a reward log p(c | x_t): its gradient is s_c - s_null, and a loss descends the reward's negative.

    So -alpha_cfg w (s_c - s_null)^T x_t, Eq. 3.6 with the sign turned; with noise predictions w(t) = sigma_t. Mean over B.
    """
    return alpha_cfg * ((conditional - unconditional).detach() * x_t).flatten(1).sum(1).mean()


def reward_loss(rewards, alpha_rew):
    """-alpha_rew times the mean reward; rewards [B]."""
    return -alpha_rew * rewards.mean()


def assistant_loss(prediction, eps):
    """Denoising score matching on the student's own pictures, mean squared error; [B, C, H, W] twice."""
    return (prediction - eps).square().mean()


# Updates

def divergence_losses(x_t, t, eps, cond, null, config, reference, assistant):
    """Steps 2 and 3 at x_t [B, C, H, W], which carries the gradient: {name: loss}."""
    # The gradient of KL needs the scores alone, that of a score divergence their derivative by x_t too.
    with torch.set_grad_enabled(config.divergence == "score"):
        eps_assistant = assistant.predict(x_t, t, "epsilon", cond)
        # eps_c + alpha_cfg (eps_c - eps_null) is diffusers' guidance with w = 1 + alpha_cfg.
        guidance_scale = 1.0 + config.alpha_cfg if config.cfg_choice == 2 else 1.0
        eps_reference = reference.predict(x_t, t, "epsilon", cond, null, guidance_scale)
    if config.divergence == "kl":
        losses = dict(L_divergence=kl_loss(x_t, eps_assistant, eps_reference))
    else:
        c = config.huber_c or 0.00054 * x_t[0].numel()**0.5
        losses = dict(L_divergence=score_loss(eps_assistant, eps_reference, eps, config.distance, c, config.detach_normaliser))
    if config.cfg_choice == 1 and config.alpha_cfg:
        with torch.no_grad():
            eps_null = reference.predict(x_t, t, "epsilon", null)
        losses["L_cfg"] = cfg_loss(x_t, eps_reference, eps_null, config.alpha_cfg)
    return losses


def gradient_at(leaf, loss):
    """d loss / d leaf, and the mean over the batch of its norm for one sample; frees the loss's graph."""
    gradient, = torch.autograd.grad(loss, leaf)
    return gradient, len(leaf) * gradient.flatten(1).norm(dim=1).mean()


def student_step(iteration, prompts, cond, null, run, config, shape, student, reference, assistant, rewards_of, alpha_rew, parameters,
                 frozen, optimizer):
    """Steps 2-5 on this rank's prompts, their condition and the empty one; shape is that of one x0.

    rewards_of: a function of (f, prompts) -> {"reward": [B], "probe": [B]}, or one, or none of them; frozen: the assistant's
    parameters. Returns the scalars to log.
    """
    draw = run.draws((config.assistant_steps + 1) * iteration)
    batch = dict(z=draw.randn(*shape), t=draw.randint(config.t_min, config.t_max + 1), eps=draw.randn(*shape), cond=cond, null=null,
                 y=prompts)
    optimizer.zero_grad()
    for p in frozen:
        p.requires_grad_(False)
    scalars = []
    for rows in run.micro_batches:
        p = {name: part_of(value, rows) for name, value in batch.items()}
        with run.autocast():
            f = one_step(student, p["z"], p["cond"])  # 2.
            # Divergence and reward each go back to this leaf on their own, so that their graphs are never held together.
            leaf = f.detach().requires_grad_()
            x_t = reference.schedule.add_noise(leaf, p["eps"], p["t"])
            losses = divergence_losses(x_t, p["t"], p["eps"], p["cond"], p["null"], config, reference, assistant)  # 3.
        gradient, norm = gradient_at(leaf, sum(losses.values()))
        values = losses | dict(grad_divergence=norm)
        with run.autocast(), torch.set_grad_enabled(alpha_rew > 0):
            rewards = rewards_of(leaf, p["y"])  # 4.
        if alpha_rew > 0:
            more, values["grad_reward"] = gradient_at(leaf, reward_loss(rewards["reward"], alpha_rew))
            gradient = gradient + more
        f.backward(gradient / len(run.micro_batches))  # 5.
        scalars.append(values | {name: value.mean() for name, value in rewards.items()})
    for p in frozen:
        p.requires_grad_(True)
    run.average_gradients(parameters.values())
    nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
    optimizer.step()
    return mean_of(scalars)


def assistant_step(iteration, k, cond, run, config, shape, student, assistant, parameters, optimizer):
    """Step 1, the k-th of an iteration: fresh pictures of the student under the condition, denoised by the assistant."""
    draw = run.draws((config.assistant_steps + 1) * iteration + 1 + k)
    z, t, eps = draw.randn(*shape), draw.randint(0, len(assistant.schedule)), draw.randn(*shape)
    optimizer.zero_grad()
    scalars = []
    for rows in run.micro_batches:
        c = part_of(cond, rows)
        with run.autocast():
            with torch.no_grad():
                x0 = one_step(student, z[rows], c)
            x_t = assistant.schedule.add_noise(x0, eps[rows], t[rows])
            loss = assistant_loss(assistant.predict(x_t, t[rows], "epsilon", c), eps[rows])
        (loss / len(run.micro_batches)).backward()
        scalars.append(dict(L_assistant=loss))
    run.average_gradients(parameters.values())
    nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
    optimizer.step()
    return mean_of(scalars)


def make_rewards(decode, scorers):
    """The scorers' values of pictures as a function of (f, prompts): reward with the gradient, the probe without.

    scorers: {"reward": Scorer, "probe": Scorer}, or one of them, or none.
    """
    def rewards_of(f, prompts):
        """f [B, C, H, W] and its B prompts -> {name: [B]}."""
        if not scorers:
            return {}
        pictures, values = decode(f), {}
        for name, scorer in scorers.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and name == "reward"):
                values[name] = scorer(pictures, scorer.texts(prompts))
        return values

    return rewards_of


# Training

def check(config):
    """Raises UserError on flags that cannot work."""
    for name, choices in (("divergence", ("score", "kl")), ("distance", ("huber", "l2")), ("cfg_choice", (1, 2)),
                          ("assistant", ("full", "lora")), ("prediction", ("", "epsilon", "v_prediction"))):
        if getattr(config, name) not in choices:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: unknown; choose one of "
                            f"{', '.join(str(c) for c in choices if c)}")
    for name in ("alpha_rew", "alpha_cfg", "huber_c", "assistant_warmup", "warmup", "student_timestep"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must not be negative")
    for name in ("iterations", "assistant_steps", "convert_iterations", "rank", "alpha"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    for name in ("lr", "lr_assistant", "convert_lr", "convert_clamp", "clip_norm"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0")
    for name in ("ema", "beta1"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 0 and below 1")
    if not 0 <= config.t_min <= config.t_max:
        raise UserError(f"--t-min {config.t_min}: must be between 0 and --t-max")
    if config.alpha_rew and not config.reward:
        raise UserError(f"--alpha-rew {config.alpha_rew}: needs a --reward, or 0 for none")


def resolve_start(config):
    """The config with --student filled in and the warm-up that it needs, and the number of all iterations.

    An empty --student is what this run started from before, or SwiftBrush v2's merged student where its run lies, or the teacher.
    """
    student, earlier = config.student, [Path(folder) / "config.json" for folder in (config.out, config.resume) if folder]
    saved = next((path for path in earlier if path.exists()), None)
    if not student and saved:
        student = read_config(Config, saved).student
    elif not student and Path(config.model) == Path(Config.model) and Path(SWIFTBRUSH).exists():
        student = SWIFTBRUSH
    warmup = 0 if student else config.warmup
    return replace(config, student=student, warmup=warmup, iterations=config.assistant_warmup + warmup + config.iterations)


def train(config):
    """The conversion of the start where --prediction asks for it, then the training."""
    check(config)
    device = choose_device(config.device)
    start_processes(device)
    config = agreed(lambda: resolve_start(config))
    teacher, codec = load_teacher(config.model, config.dataset, device)
    if config.t_max >= len(teacher.schedule):
        raise UserError(f"--t-max {config.t_max}: the model has the timesteps 0 to {len(teacher.schedule) - 1}")
    if not codec.has_null and (config.alpha_cfg, config.teacher_guidance) != (0.0, 1.0):
        raise UserError(f"--alpha-cfg {config.alpha_cfg} --teacher-guidance {config.teacher_guidance}: {config.model} has no empty "
                        "condition to guide by; use --alpha-cfg 0 --teacher-guidance 1")
    if config.assistant == "lora":
        check_targets(teacher.net, config.lora_targets)
    prompts = prompts_of(config, codec)
    # Whatever can be missing is loaded before anything is trained.
    scorers = {name: load_scorer(getattr(config, name), device) for name in ("reward", "probe") if getattr(config, name)}
    decode = load_decoder(config.decoder, codec) if scorers else codec.decode
    start = starting_student(config.student, config.lora, config.model, teacher, codec)
    if config.student_timestep >= len(start.schedule):
        raise UserError(f"--student-timestep {config.student_timestep}: the student's schedule ends at {len(start.schedule) - 1}")
    if config.student_timestep:
        start = Denoiser(start.net, start.schedule.up_to(config.student_timestep), start.prediction_type)
    run = Run(config)
    if config.cache_latents:
        cache_conditions(codec, prompts, f"{config.out}/cache", dict(model=config.model))
    if run.rank == 0 and not run.start:
        print(f"the student starts from {config.student or f'the weights of {config.model}'}{config.lora and f' and {config.lora}'}"
              + (f", with {config.warmup} iterations of warm-up without reward" if config.warmup else ""))
    if (config.prediction or start.prediction_type) != start.prediction_type:
        start = (Denoiser(start.net, start.schedule, config.prediction) if run.start else  # the checkpoint holds the weights
                 convert(conversion_run(config), codec, start, config.prediction, prompts))
    train_student(run, config, teacher, codec, start, prompts, make_rewards(decode, scorers))


def conversion_run(config):
    """The Run of the conversion, in OUT/start; the flags that it does not depend on may differ from its checkpoint's."""
    bound = {"model", "student", "student_timestep", "lora", "prompts", "dataset", "seed", "batch_size", "precision", "prediction",
             "convert_iterations", "convert_lr", "convert_clamp", "clip_norm"}
    config = replace(config, out=f"{config.out}/start", resume="", iterations=config.convert_iterations)
    return Run(config, free=vars(config).keys() - bound)


def train_student(run, config, teacher, codec, start, prompts, rewards_of):
    """The training; exports the averaged student to OUT/pipeline and draws OUT/comparison.png."""
    net = start.net if start.net is not teacher.net else dense_copy(teacher.net, teacher.net.state_dict(), codec.device)
    net.requires_grad_(True)
    shard(config, net)
    student, parameters = Denoiser(net, start.schedule, start.prediction_type), Weights(net.named_parameters())
    if config.assistant == "full":
        copy = dense_copy(teacher.net, teacher.net.state_dict(), codec.device).requires_grad_(True)
        shard(config, copy)
        assistant, parameters_assistant = Denoiser(copy, teacher.schedule, teacher.prediction_type), Weights(copy.named_parameters())
    shard(config, teacher.net)
    if config.assistant == "lora":
        assistant = Denoiser(teacher.net, teacher.schedule, teacher.prediction_type, "assistant")
        parameters_assistant = add_lora(teacher.net, "assistant", config.rank, config.alpha, config.lora_targets)
    for network in {student.net, teacher.net, assistant.net}:
        if config.gradient_checkpointing:
            enable_checkpointing(network)
        if config.compile and (config.assistant == "full" or network is student.net):
            network.compile()
    betas = (config.beta1, 0.999)
    optimizer = torch.optim.AdamW(parameters.values(), config.lr, betas, weight_decay=0.0, fused=True)
    optimizer_assistant = torch.optim.AdamW(parameters_assistant.values(), config.lr_assistant, betas, weight_decay=0.0, fused=True)
    ema = EMA(parameters.items(), config.ema)
    rewarded, before = config.assistant_warmup + config.warmup, run.out / "before.safetensors"
    if run.start > rewarded and not before.exists():  # another run's checkpoint: what compare needs lies there
        if not Path(config.resume, before.name).exists():
            raise UserError(f"{before}: missing, it was written at iteration {rewarded}; copy it here, or choose another --out")
        earlier = Path(config.resume, before.name).read_bytes()
    else:
        earlier = None
    run.begin(dict(student=parameters, assistant=parameters_assistant, ema=ema, optimizer=optimizer,
                   optimizer_assistant=optimizer_assistant))
    size = run.rows.stop - run.rows.start
    shown, null = [prompts[i % len(prompts)] for i in range(0, 64 * 7, 7)], codec.null(size)
    if earlier and run.rank == 0:
        before.write_bytes(earlier)

    def step(iteration, y):
        """One iteration on this rank's prompts; the scalars to log."""
        cond, losses = codec.cond(y), {}
        for k in range(config.assistant_steps):
            losses = assistant_step(iteration, k, cond, run, config, codec.shape, student, assistant, parameters_assistant,
                                    optimizer_assistant)
        if iteration >= config.assistant_warmup:
            alpha_rew = config.alpha_rew if iteration >= rewarded else 0.0
            losses |= student_step(iteration, y, cond, null, run, config, codec.shape, student, teacher, assistant, rewards_of, alpha_rew,
                                   parameters, parameters_assistant.values(), optimizer)
            ema.update()
        return losses

    for iteration, y in enumerate(run.prompts(prompts), run.start):
        if iteration == rewarded and run.shows:
            with ema.applied():
                remember_before(run, before, student, codec, prompts, rewards_of)
        losses = step(iteration, y)
        if (iteration + 1) % config.sample_every == 0 and run.shows:
            with ema.applied():
                save_grid(draw_samples(student, codec, shown, 0), run.out / "samples" / f"{iteration + 1:07d}.png")
        if run.finish_iteration(iteration, losses):
            break
    run.end()
    export_student(run, codec, student, ema)
    if run.shows:
        with ema.applied():
            compare(run, config, teacher, codec, student, prompts, rewards_of)


# Sampling

@torch.no_grad()
def measure_rewards(student, codec, prompts, rewards_of, num=512):
    """Mean reward and probe of num one-step pictures."""
    sums = {}
    for y, z in chunks_of([prompts[i % len(prompts)] for i in range(num)], codec, 1):
        values = rewards_of(one_step(student, z, codec.cond(y)), y)
        if not values:
            break
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item() / num
    return sums


def remember_before(run, path, student, codec, prompts, rewards_of):
    """The student's pictures and rewards before the reward acts, in a file for `compare`."""
    shown = [prompts[i % len(prompts)] for i in range(0, 8 * 7, 7)]
    rewards = measure_rewards(student, codec, prompts, rewards_of)
    pictures = draw_samples(student, codec, shown, 0).contiguous()
    if run.rank == 0:
        save_file(dict(pictures=pictures), path, metadata=dict(rewards=json.dumps(rewards)))


def compare(run, config, teacher, codec, student, prompts, rewards_of):
    """OUT/comparison.png on the same noise and captions: the reference's 25 steps, the student before and after; prints rewards."""
    shown = [prompts[i % len(prompts)] for i in range(0, 8 * 7, 7)]
    rows = [draw_many_steps(teacher, codec, shown, 25, config.teacher_guidance), draw_samples(student, codec, shown, 0)]
    rewards = measure_rewards(student, codec, prompts, rewards_of)
    if run.rank > 0:
        return
    with safe_open(run.out / "before.safetensors", "pt") as file:
        before, rewards_before = file.get_tensor("pictures"), json.loads(file.metadata()["rewards"])
    save_grid(torch.cat([rows[0], before, rows[1]]), run.out / "comparison.png", len(shown))
    for name, value in rewards.items():
        print(f"{name} ({getattr(config, name)}, 512 one-step pictures): {rewards_before[name]:.4f} before, {value:.4f} after")
    print(f"{run.out}/comparison.png, from above: reference 25 steps, student before and after\n"
          f"{run.out}/pipeline: the student, a diffusers pipeline")


# Main

def sample_command(argv):
    """`python diff_instruct_star.py sample`: one-step pictures of a finished run as a grid."""
    parser = argparse.ArgumentParser(prog="diff_instruct_star.py sample", description="One-step pictures.", allow_abbrev=False)
    parser.add_argument("--run", default="runs/diff_instruct_star", help="the run's folder")
    parser.add_argument("--prompts", nargs="+", help="prompts, in turn; default: the run's own")
    parser.add_argument("--num", type=int, default=64, help="number of pictures")
    parser.add_argument("--nfe", type=int, default=1, choices=(1,), help="network calls a picture: this student knows one")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--grid", default="grid.png", help="the PNG to write")
    args = parser.parse_args(argv)
    for name, least in (("num", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if not (Path(args.run) / "pipeline").exists():
        raise UserError(f"--run {args.run}: no finished student in it; see its samples/ while it runs")
    student, codec = load(Path(args.run) / "pipeline", choose_device(args.device))
    prompts = args.prompts or prompts_of(read_config(Config, Path(args.run) / "config.json"), codec)
    images = draw_samples(student, codec, [prompts[i % len(prompts)] for i in range(args.num)], args.seed)
    try:
        save_grid(images, args.grid)
    except (OSError, ValueError) as error:
        raise UserError(f"--grid {args.grid}: cannot be written ({error})")
    print(f"{args.num} one-step pictures: {args.grid}")


def main(argv):
    """`sample` or, by default, `train`."""
    if argv[:1] == ["sample"]:
        return sample_command(argv[1:])
    train(parse_config(Config, PRESETS, argv[1:] if argv[:1] == ["train"] else argv, __doc__.splitlines()[0], preset_of))


if __name__ == "__main__":
    run_command(main)
