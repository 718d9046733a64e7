"""Diff-Instruct* (Luo et al., arXiv 2410.20898): a one-step text-to-image model trained for a human reward.

The idea. Without any picture, a one-step generator g(z, c) is moved towards pictures that a reward model
likes, while a divergence between its noised pictures and a reference diffusion's keeps it from cheating the
reward. The divergence compares scores, the gradients of the log-densities, instead of densities (KL): a
distance d of the two scores, summed over all noise levels. The reference's score is known; the generator's
own is learned all along by a second network, the assistant. The gradient of such a divergence needs the
derivative of the generator's score by its parameters, which nobody has; the paper's theorem gives a loss with
the same gradient that needs no such derivative.

One iteration; the same numbers stand in train_step:
  1. assistant, K_TA times: x0 = g(z, c) detached, t of all timesteps, x_t = alpha_t x0 + sigma_t eps;
     |eps_assistant(x_t) - eps|^2
  2. f = g(z, c), t in 20..979, x_t = alpha_t f + sigma_t eps with fresh noise;
     eps_reference = eps_c + alpha_cfg (eps_c - eps_null)
  3. divergence: -d'(eps_assistant - eps_reference)^T (eps_assistant - eps), with the gradient through x_t,
     the input of both networks
  4. reward: -alpha_rew r(decode(f), c)
  5. both gradients at f, then back through the generator; EMA
In the first --assistant-warmup iterations only step 1 is taken, in the next --warmup the reward only logged.
Sampling: one network call, f = (z - sigma_T eps_theta(z, T, c)) / alpha_T.

Symbols, paper -> code: g_theta -> student; s_q -> reference, the frozen teacher; s_psi -> assistant;
alpha_rew, alpha_cfg as they are (alpha_cfg is diffusers' guidance_scale - 1); K_TA -> score_updates;
d -> distance; c of pseudo-Huber -> huber_c.

Differences from the paper as printed. Its Eq. 3.5 and 3.6 push away from the prompt: the sign of the guidance
term is turned here (cfg_loss). Its guided reference lacks a difference; here it is s_c + alpha_cfg (s_c -
s_null) (choice 2). Scores are noise predictions, s = -eps / sigma_t, which amounts to the weight w(t) =
sigma_t. The updates of one iteration share their prompts, with fresh noise each. The loss is 0 in expectation
for an exact assistant: it is no measure of progress; the reward and the probe are.

  python diff_instruct_star.py     from runs/swiftbrush_v2 if it is there, 2 minutes on 2 CPU cores; else from
                                   the teacher, 5 minutes
  torchrun --nproc-per-node 8 diff_instruct_star.py --model stabilityai/stable-diffusion-xl-base-1.0 \\
      --prompts FILE --student tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin --student-timestep 399 \\
      --out runs/sdxl
  python diff_instruct_star.py sample --run runs/diff_instruct_star --prompts "a large red circle on white" \\
      --num 16
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import (EMA, LORA_TARGETS, Codec, Denoiser, UserError, broadcast, check_targets, chunks_of,
                    draw_many_steps, draw_samples, enable_checkpointing, frozen, hold_in_bf16, load,
                    load_decoder, load_scorer, one_step, set_rates, warmup_share, x0_weight)
from plumbing.cache import cache_conditions
from plumbing.cli import (RunFlags, bound_flags, check_sample_flags, flag, parse_config, read_config,
                          run_command, sample_flags)
from plumbing.data import prompts_of
from plumbing.files import agreed, check_folder, note_of, open_tensors, write_tensors, writing
from plumbing.grids import save_grid, save_samples
from plumbing.run import Run, choose_device, start_processes
from plumbing.shard import shard
from plumbing.students import (CONVERTED_BY, check_highest, convert, dense_copy, export_student, load_teacher,
                               model_card, starting_student)


# Configuration: the defaults are the paper's SDXL run; a preset changes what it names

@dataclass
class Config(RunFlags):
    """Each field is a flag, and its text the --help."""
    out: str = flag("runs/diff_instruct_star", "the run's folder; the same command again resumes the run",
                    "run", needed=True)

    preset: str = flag("sdxl", "defaults of the other flags; not given: shapes for the mini model, "
                       "cifar10 for --dataset cifar10, else sdxl", "data")
    model: str = flag("assets/mini-sd", "the reference diffusion: a diffusers pipeline, directory or hub id; "
                      "paper: SDXL base", "data", needed=True)
    student: str = flag("", "one-step model to start from, a pipeline or a file of weights; "
                        "empty: SwiftBrush's run, else the teacher", "data")
    student_timestep: int = flag(0, "the timestep that conditions the student, 0: the last; "
                                 "paper: 399, as DMD2 was trained", "data", least=0)
    lora: str = flag("", "LoRA weights merged into the student's start", "data")
    prompts: str = flag("", "file of prompts; empty: the captions of --dataset", "data")
    dataset: str = flag("shapes", "shapes, cifar10 or a folder: its captions are the prompts", "data",
                        needed=True)

    iterations: int = flag(10_000, "iterations with the reward, after the warm-ups; "
                           "the paper gives no number", least=1)
    batch_size: int = flag(64, "global batch, over all processes; the paper gives none", least=1,
                           most=100_000)
    lr: float = flag(5e-7, "Adam learning rate of the student; as DMD2 for SDXL, the paper gives none",
                     above=0)
    lr_assistant: float = flag(5e-7, "Adam learning rate of the assistant; as DMD2 for SDXL", above=0)
    beta1: float = flag(0.0, "Adam's first beta of both; SiD and Diff-Instruct: 0", least=0, below=1)
    clip_norm: float = flag(10.0, "gradient norm of student and assistant; DMD2 for SDXL: 10",
                            above=0, infinite=True)
    ema: float = flag(0.999, "decay of the student's average, which draws the samples", least=0, below=1)
    ema_ramp: bool = flag(True, "let that decay rise, (1 + n) / (10 + n) at update n up to its value; "
                          "on in diffusers' EMAModel")

    divergence: str = flag("score", "score (Diff-Instruct*; with reward 0: SIM) or kl (Diff-Instruct++; "
                           "with reward 0: Diff-Instruct)", choices=("score", "kl"))
    weighting: str = flag("noise", "w(t) of the divergence: noise, the scores as noise predictions; x0, as "
                          "x0 predictions with SiD's and DMD's normaliser", choices=("noise", "x0"))
    distance: str = flag("huber", "of the scores: huber (pseudo-Huber, the paper's) or l2",
                         choices=("huber", "l2"))
    huber_c: float = flag(0.0, "c of pseudo-Huber; 0: 0.00054 sqrt(dimensions), "
                          "of improved consistency training; the paper gives none", least=0)
    detach_normaliser: bool = flag(False, "take pseudo-Huber's denominator as a constant, as SiD does; "
                                   "the theorem does not")
    alpha_rew: float = flag(100.0, "weight of the reward, a cosine; "
                            "paper: 100, which is 1 on PickScore's logits", least=0)
    alpha_cfg: float = flag(7.5, "strength of the guidance, w - 1 in diffusers' convention; 0: none; "
                            "paper: 7.5", least=0)
    cfg_choice: int = flag(2, "the guidance of either divergence: 1: as a reward of its own; "
                           "2: in the reference; paper's best: 2", choices=(1, 2))
    reward: str = flag("pickscore", "pickscore, clip, hps, or a CLIPModel's directory or hub id; empty: none")
    probe: str = flag("clip", "a second reward, only logged: where it falls while the reward rises, "
                      "the reward is cheated; empty: none")
    decoder: str = flag("tiny", "AutoencoderTiny that decodes for the rewards; "
                        "tiny: TAESD, SDXL's or SD's; empty: the model's own decoder")
    t_min: int = flag(20, "lowest timestep of the divergence; SiD-LSG: 20", least=0)
    t_max: int = flag(979, "highest; SiD-LSG: 979", least=0)

    assistant: str = flag("full", "full: a copy of the reference's weights; lora: an adapter on them",
                          choices=("full", "lora"))
    score_updates: int = flag(1, "K_TA, updates of the assistant an iteration; Diff-Instruct and SiD: 1, "
                              "DMD2 for SDXL: 5", least=1)
    assistant_warmup: int = flag(0, "iterations at the start in which only the assistant learns", least=0)
    warmup: int = flag(1000, "after that, iterations without reward; 0 if the student starts from a one-step "
                       "model, of --student or of SwiftBrush v2's run", least=0)
    lora_targets: tuple = flag(LORA_TARGETS, "layers of a LoRA assistant, by the ends of their names",
                               needed=True)
    rank: int = flag(64, "of a LoRA assistant; SwiftBrush v2's", least=1, most=10_000)
    alpha: int = flag(128, "of a LoRA assistant; SwiftBrush v2's", least=1)

    prediction: str = flag("", "prediction type of the student: empty: that of its start; "
                           "or epsilon or v_prediction, converted first",
                           choices=("", "epsilon", "v_prediction"))
    convert_iterations: int = flag(150, "of the conversion, a regression onto the old x0 "
                                   "at the last timestep", least=1)
    convert_lr: float = flag(1e-5, "of the conversion", above=0)
    convert_clamp: float = flag(4.0, "the old x0 at the last timestep is clamped to +- this", above=0)
    teacher_guidance: float = flag(7.5, "of the reference's many-step pictures in OUT/comparison.png, "
                                   "diffusers' convention", least=0)


PRESETS = {
    # What lets GPUs of 80 GB train the published model; docs/scaling.md has the memory.
    "sdxl": dict(precision="bf16", gradient_checkpointing=True, micro_batch=4, shard=True),
    "shapes": dict(
        iterations=200, batch_size=32, lr=1e-4, lr_assistant=5e-4, ema=0.98, ema_ramp=False,
        lora_init="gaussian", save_every=100, sample_every=100, alpha_rew=10.0, assistant_warmup=50,
        warmup=300, prediction="v_prediction", convert_lr=5e-4, convert_clamp=3.0,
        decoder="assets/mini-taesd", reward="assets/mini-pickscore", probe="assets/mini-judge",
        teacher_guidance=2.0),
    "cifar10": dict(
        model="google/ddpm-cifar10-32", iterations=20_000, batch_size=128, lr=1e-5, lr_assistant=1e-5,
        alpha_rew=0.0, alpha_cfg=0.0, reward="", probe="", decoder="", warmup=0, prediction="v_prediction",
        convert_clamp=1.0, convert_lr=1e-4, teacher_guidance=1.0),
}
BEFORE = "before.safetensors"  # the student before the reward acts, in OUT
SWIFTBRUSH = "runs/swiftbrush_v2/pipeline"  # where swiftbrush_v2.py leaves its merged student


def preset_of(given):
    """The preset that fits the flags given: a real model must not get the mini model's rates."""
    if given.get("dataset") == "cifar10":
        return "cifar10"
    return "shapes" if Path(given.get("model", Config.model)) == Path(Config.model) else "sdxl"


# Losses

def distance_gradient(y, distance, c, detach_normaliser=False):
    """d'(y), the gradient of the distance d at y [B, ...]: 2 y for l2, y / sqrt(|y|^2 + c^2) for huber.

    The norm runs over a whole sample. detach_normaliser: see Config.
    """
    if distance == "l2":
        return 2 * y
    norm = (y.square().sum(tuple(range(1, y.ndim)), keepdim=True) + c**2).sqrt()
    return y / (norm.detach() if detach_normaliser else norm)


def score_loss(assistant, reference, target, distance="huber", c=1.0, detach_normaliser=False, weight=1.0):
    """Eq. 3.4, a loss with the gradient of the score divergence.

    It is the mean over B of -d'(assistant - reference)^T (assistant - target), all [B, ...]: the two scores
    at x_t and -eps / sigma_t; or two noise predictions and eps, which amounts to the weight w(t) = sigma_t
    (sigma_t^2 for l2). weight: a further one, [B, 1, 1, 1]. The two predictions depend on x_t and get their
    gradient through the networks' input; target, the noise that was drawn, is a constant. For any field u,
    E[u(x_t)^T s_student(x_t)] = E[u(x_t)^T (-eps / sigma_t)]; differentiating both sides by the student's
    parameters replaces the unknown derivative of s_student by terms that can be computed. Nothing is
    detached: without the gradient through u, or through (assistant - target), the gradient is no longer the
    divergence's. The minus is right as printed: descent lowers d(assistant - reference).
    """
    u = distance_gradient(assistant - reference, distance, c, detach_normaliser)
    return -(weight * u * (assistant - target)).flatten(1).sum(1).mean()


def kl_loss(x_t, assistant, reference, weight=1.0):
    """Diff-Instruct's loss: mean over B of (s_student - s_reference)^T x_t, with the scores detached.

    Their difference is the gradient of KL(student || reference) at x_t. With noise predictions [B, ...] the
    weight is w(t) = sigma_t, as in score_loss.
    """
    return (weight * (reference - assistant).detach() * x_t).flatten(1).sum(1).mean()


def cfg_loss(x_t, conditional, unconditional, alpha_cfg, weight=1.0):
    """Choice 1, guidance as a reward log p(c | x_t): mean over B of -alpha_cfg w(t) (s_c - s_null)^T x_t.

    The gradient of log p(c | x_t) is s_c - s_null, and the loss is the negative of the reward: Eq. 3.6 with
    the sign turned. With noise predictions w(t) = sigma_t.
    """
    return alpha_cfg * (weight * (conditional - unconditional).detach() * x_t).flatten(1).sum(1).mean()


def divergence_weights(config, schedule, f, x_t, t, eps_reference):
    """(weight of score_loss, weight of kl_loss and cfg_loss) under --weighting, [B, 1, 1, 1]; noise: 1, 1.

    x0: as in SiD and DMD the noise predictions become x0 predictions, whose differences are sigma_t / alpha_t
    times as large, and a loss is divided by mean |f - x0_reference|. kl_loss and cfg_loss multiply x_t, whose
    derivative by f is alpha_t; divided by alpha_t, their gradient at f is DMD's.
    """
    if config.weighting == "noise":
        return 1.0, 1.0
    alpha_t, sigma_t = broadcast(schedule.alpha, t, f), broadcast(schedule.sigma, t, f)
    weight = sigma_t / alpha_t * x0_weight(f, schedule.convert(eps_reference, x_t, t, "epsilon", "sample"))
    # l2 multiplies two differences; of huber's two the first has the norm 1.
    return weight * (sigma_t / alpha_t if config.distance == "l2" else 1.0), weight / alpha_t


def reward_loss(rewards, alpha_rew):
    """-alpha_rew times the mean of the rewards [B]."""
    return -alpha_rew * rewards.mean()


def assistant_loss(prediction, eps):
    """Denoising score matching on the student's own pictures, mean squared error; [B, C, H, W] twice."""
    return (prediction - eps).square().mean()


# The cast

@dataclass
class Loaded:
    """Networks that are loaded before the training; all but start stay frozen."""
    reference: Denoiser  # s_q: --model, the bare weights
    start: Denoiser      # where the student starts, perhaps converted
    codec: Codec         # prompts -> condition, x0 -> pictures
    decode: object       # x0 -> pictures for the rewards, a smaller decoder if --decoder names one
    scorers: dict        # "reward", "probe" -> Scorer; the probe is only logged


@dataclass
class Models:
    """The cast of an iteration. Updates run the current weights; the average draws samples and is exported.
    """
    reference: Denoiser  # frozen: the bare weights of --model
    assistant: Denoiser  # s_psi: a copy of the reference, or an adapter on it; trained by optimizer_assistant
    student: Denoiser    # g: all weights, trained by optimizer, averaged by ema
    codec: Codec         # frozen
    decode: object       # frozen
    scorers: dict        # frozen
    null: dict           # the empty condition
    optimizer: torch.optim.Optimizer
    optimizer_assistant: torch.optim.Optimizer
    ema: EMA


def load_networks(config, device):
    """Loads the networks of a run. Raises UserError if the flags do not fit the model."""
    reference, codec = load_teacher(config.model, config.dataset, device)
    check_highest(config, reference.schedule)
    if not codec.has_null and (config.alpha_cfg, config.teacher_guidance) != (0.0, 1.0):
        raise UserError(f"--alpha-cfg {config.alpha_cfg} --teacher-guidance {config.teacher_guidance}: "
                        f"{config.model} has no empty condition to guide by; "
                        "use --alpha-cfg 0 --teacher-guidance 1")
    if config.assistant == "lora":
        check_targets(reference.net, config.lora_targets)
    named = dict(reward=config.reward, probe=config.probe)
    scorers = {name: load_scorer(model, device, config.precision) for name, model in named.items() if model}
    decode = load_decoder(config.decoder, codec, config.precision) if scorers else codec.decode
    start = starting_student(config.student, config.lora, config.model, reference, codec)
    if config.student_timestep >= len(start.schedule):
        raise UserError(f"--student-timestep {config.student_timestep}: the student's schedule ends at "
                        f"{len(start.schedule) - 1}")
    if config.student_timestep:
        start = Denoiser(start.net, start.schedule.up_to(config.student_timestep), start.prediction_type)
    return Loaded(reference, start, codec, decode, scorers)


def build(config, run, loaded=None):
    """The cast of a run.

    loaded: as load_networks gives it, its start perhaps converted since; if None, it is loaded here.
    """
    loaded = loaded or load_networks(config, run.device)
    reference, start, codec = loaded.reference, loaded.start, loaded.codec
    bare = lambda: dense_copy(reference.net, reference.net.state_dict(), run.device).requires_grad_(True)
    net = bare() if start.net is reference.net else start.net.requires_grad_(True)
    student = Denoiser(net, start.schedule, start.prediction_type)
    shard(config, net)
    if config.assistant == "full":
        assistant = Denoiser(bare(), reference.schedule, reference.prediction_type)
        shard(config, assistant.net)
    if config.precision == "bf16":  # after the copies, which start from all of its digits
        hold_in_bf16(reference.net)
    shard(config, reference.net)
    if config.assistant == "lora":
        assistant = reference.with_lora("assistant", config.rank, config.alpha, config.lora_targets,
                                        config.lora_init)
    for network in {student.net, reference.net, assistant.net}:
        if config.gradient_checkpointing:
            enable_checkpointing(network)
        if config.compile and (config.assistant == "full" or network is student.net):
            network.compile()
    betas = (config.beta1, 0.999)
    optimizer, optimizer_assistant = (
        torch.optim.AdamW(denoiser.trainable().values(), lr, betas, weight_decay=0.0, fused=True)
        for denoiser, lr in ((student, config.lr), (assistant, config.lr_assistant)))
    null = codec.null(run.rows.stop - run.rows.start)
    return Models(reference, assistant, student, codec, loaded.decode, loaded.scorers, null, optimizer,
                  optimizer_assistant, EMA(student.trainable().items(), config.ema, config.ema_ramp))


# Updates

def divergence_losses(f, p, config, models):
    """Steps 2 and 3 for a part p of train_step: {name: loss} at f [B, C, H, W], which needs a gradient."""
    reference, assistant = models.reference, models.assistant
    x_t = reference.schedule.add_noise(f, p.eps, p.t)
    # The gradient of KL needs the scores alone, that of a score divergence their derivative by x_t too.
    with torch.set_grad_enabled(config.divergence == "score"):
        # The assistant is conditional and never guided.
        eps_assistant = assistant.predict(x_t, p.t, "epsilon", p.cond)
        # eps_c + alpha_cfg (eps_c - eps_null) is diffusers' guidance with w = 1 + alpha_cfg.
        guidance_scale = 1.0 + config.alpha_cfg if config.cfg_choice == 2 else 1.0
        eps_reference = reference.predict(x_t, p.t, "epsilon", p.cond, p.null, guidance_scale)
    of_score, of_kl = divergence_weights(config, reference.schedule, f, x_t, p.t, eps_reference)
    if config.divergence == "kl":
        losses = dict(L_divergence=kl_loss(x_t, eps_assistant, eps_reference, of_kl))
    else:
        c = config.huber_c or 0.00054 * x_t[0].numel()**0.5
        loss = score_loss(eps_assistant, eps_reference, p.eps, config.distance, c, config.detach_normaliser,
                          of_score)
        losses = dict(L_divergence=loss)
    if config.cfg_choice == 1 and config.alpha_cfg:
        with torch.no_grad():
            eps_null = reference.predict(x_t, p.t, "epsilon", p.null)
        losses["L_cfg"] = cfg_loss(x_t, eps_reference, eps_null, config.alpha_cfg, of_kl)
    return losses


def rewards_of(f, prompts, decode, scorers):
    """{"reward": [B], "probe": [B]} of f [B, C, H, W], decoded, and its prompts; the probe is detached."""
    if not scorers:
        return {}
    pictures, values = decode(f), {}
    for name, scorer in scorers.items():
        with torch.set_grad_enabled(torch.is_grad_enabled() and name == "reward"):
            values[name] = scorer(pictures, scorer.texts(prompts))
    return values


def gradient_at(leaf, loss):
    """d loss / d leaf, and the mean norm of one sample's gradient (len(leaf) undoes the losses' 1 / B).

    The loss's graph is freed.
    """
    with torch.autocast(leaf.device.type, enabled=False):
        gradient, = torch.autograd.grad(loss, leaf)
    return gradient, len(leaf) * gradient.flatten(1).norm(dim=1).mean()


def train_step(iteration, prompts, config, run, models):
    """One iteration on this rank's prompts [B]; the reward acts after both warm-ups.

    Returns the scalars to log.
    """
    student, assistant, codec, K = models.student, models.assistant, models.codec, config.score_updates
    schedule = models.reference.schedule
    with run.autocast():
        cond = codec.cond(prompts)
    alpha_rew = config.alpha_rew if iteration >= config.assistant_warmup + config.warmup else 0.0

    def loss_assistant(p):  # 1. On pictures of the current student, without a gradient to it.
        with torch.no_grad():
            x0 = one_step(student, p.z, p.cond)
        x_t = schedule.add_noise(x0, p.eps, p.t)
        loss = assistant_loss(assistant.predict(x_t, p.t, "epsilon", p.cond), p.eps)
        return loss, dict(L_assistant=loss)

    def loss_student(p):
        f = one_step(student, p.z, p.cond)  # 2. With its graph; the losses see it as a leaf.
        # Divergence and reward each go back to the leaf on their own: their graphs are never held together.
        leaf = f.detach().requires_grad_()
        losses = divergence_losses(leaf, p, config, models)  # 3.
        gradient, norm = gradient_at(leaf, sum(losses.values()))
        values = losses | dict(grad_divergence=norm)
        with torch.set_grad_enabled(alpha_rew > 0):
            rewards = rewards_of(leaf, p.y, models.decode, models.scorers)  # 4.
        if alpha_rew > 0:
            more, values["grad_reward"] = gradient_at(leaf, reward_loss(rewards["reward"], alpha_rew))
            gradient = gradient + more
        # 5. A loss whose gradient to f is the sum of both.
        return (f * gradient).sum(), values | {name: value.mean() for name, value in rewards.items()}

    scalars = {}
    for k in range(K):
        draw = run.draws((K + 1) * iteration + 1 + k)
        parts = run.split(z=draw.randn(*codec.shape), t=draw.randint(0, len(schedule)),
                          eps=draw.randn(*codec.shape), cond=cond)
        scalars = run.descend(models.optimizer_assistant, parts, loss_assistant, config.clip_norm)
    if iteration < config.assistant_warmup:
        return scalars
    draw = run.draws((K + 1) * iteration)
    parts = run.split(z=draw.randn(*codec.shape), t=draw.randint(config.t_min, config.t_max + 1),
                      eps=draw.randn(*codec.shape), cond=cond, null=models.null, y=prompts)
    with frozen(assistant.net):  # the gradient goes through assistant and reference to x_t, to no weight
        scalars |= run.descend(models.optimizer, parts, loss_student, config.clip_norm)
    models.ema.update(iteration - config.assistant_warmup)
    return scalars


# Sampling

@torch.no_grad()
def measure_rewards(models, prompts, num=512):
    """Mean reward and probe of num one-step pictures of the student as it is now."""
    sums = {}
    for y, z in chunks_of([prompts[i % len(prompts)] for i in range(num)], models.codec, 1):
        f = one_step(models.student, z, models.codec.cond(y))
        for name, value in rewards_of(f, y, models.decode, models.scorers).items():
            sums[name] = sums.get(name, 0.0) + value.sum().item() / num
    return sums


def remember_before(run, path, models, prompts):
    """The student's pictures and rewards before the reward acts, in a file for `compare`."""
    shown = [prompts[i % len(prompts)] for i in range(0, 8 * 7, 7)]
    rewards = measure_rewards(models, prompts) if models.scorers else {}
    pictures = draw_samples(models.student, models.codec, shown, 0)
    if run.rank == 0:
        write_tensors(path, dict(pictures=pictures), run.origin, rewards=rewards)


def compare(run, config, models, prompts):
    """Writes OUT/comparison.png: the reference's 25 steps, the student before and after; prints the rewards.

    All pictures are of the same noise and captions.
    """
    shown = [prompts[i % len(prompts)] for i in range(0, 8 * 7, 7)]
    many_steps = draw_many_steps(models.reference, models.codec, shown, 25, config.teacher_guidance)
    after = draw_samples(models.student, models.codec, shown, 0)
    rewards = measure_rewards(models, prompts) if models.scorers else {}
    if run.rank > 0:
        return
    file = open_tensors(run.out / BEFORE, run.origin)
    before, rewards_before = torch.from_numpy(file.get_tensor("pictures")), note_of(file)["rewards"]
    rows = ["reference, 25 steps", "student before", "student after"]
    pictures = torch.cat([many_steps, before, after])
    save_grid(pictures, run.out / "comparison.png", len(shown), rows=rows, captions=shown)
    for name, value in rewards.items():
        print(f"{name} ({getattr(config, name)}, 512 one-step pictures): {rewards_before[name]:.4f} before, "
              f"{value:.4f} after")
    print(f"{run.out}/comparison.png: reference, student before and after the reward, on the same noise\n"
          f"{run.out}/pipeline: the student, a diffusers pipeline")


# Training

def check(config):
    """Raises UserError on flags that cannot work together."""
    if config.t_min > config.t_max:
        raise UserError(f"--t-min {config.t_min}: must be between 0 and --t-max")
    if config.alpha_rew and not config.reward:
        raise UserError(f"--alpha-rew {config.alpha_rew}: needs a --reward, or 0 for none")


def resolve_start(config):
    """The config with --student filled in, that student's warm-up, and the iterations with all warm-ups.

    An empty --student means the one from which this run started before, or SwiftBrush v2's merged student if
    that run is there, or the teacher.
    """
    student, folders = config.student, [folder for folder in (config.out, config.resume) if folder]
    earlier = [Path(folder) / "config.json" for folder in folders]
    saved = next((path for path in earlier if path.exists()), None)
    if not student and saved:
        student = read_config(Config, saved).student
    elif not student and Path(config.model) == Path(Config.model) and Path(SWIFTBRUSH).exists():
        student = SWIFTBRUSH
    warmup = 0 if student else config.warmup
    iterations = config.assistant_warmup + warmup + config.iterations
    return replace(config, student=student, warmup=warmup, iterations=iterations)


def train(config):
    """The conversion of the start where --prediction asks for it, then the training."""
    check(config)
    device = choose_device(config.device)
    start_processes(device)
    config = agreed(lambda: resolve_start(config))
    # Everything that can be missing is loaded before anything is trained.
    loaded = load_networks(config, device)
    codec, start, prompts = loaded.codec, loaded.start, prompts_of(config, loaded.codec)
    run = Run(config, bound_flags(Config, but={"iterations"}))
    if config.cache_latents:
        cache_conditions(codec, prompts, f"{config.out}/cache", dict(model=config.model))
    if run.rank == 0 and not run.start:
        start_name = config.student or f"the weights of {config.model}"
        print(f"the student starts from {start_name}{config.lora and f' and {config.lora}'}"
              + (f", with {config.warmup} iterations of warm-up without reward" if config.warmup else ""))
    if (config.prediction or start.prediction_type) != start.prediction_type:
        if run.start:  # the checkpoint holds the weights
            loaded.start = Denoiser(start.net, start.schedule, config.prediction)
        else:
            iterations = config.convert_iterations
            conversion = replace(config, out=f"{config.out}/start", resume="", iterations=iterations)
            loaded.start = convert(Run(conversion, CONVERTED_BY), codec, start, config.prediction, prompts)
    models = build(config, run, loaded)
    rewarded, before = config.assistant_warmup + config.warmup, run.out / BEFORE
    earlier = next((path for path in (before, Path(config.resume, BEFORE)) if path.exists()), None)
    if run.start > rewarded:  # `compare` needs what was written then, and cannot have it made anew
        if not earlier:
            raise UserError(f"{before}: missing, it was written at iteration {rewarded}; "
                            "copy it here, or choose another --out")
        open_tensors(earlier, run.origin)
    run.begin(dict(student=models.student.trainable(), assistant=models.assistant.trainable(),
                   ema=models.ema, optimizer=models.optimizer,
                   optimizer_assistant=models.optimizer_assistant))
    if run.start > rewarded and earlier != before and run.rank == 0:
        with writing(before):
            shutil.copyfile(earlier, before)  # of the run whose checkpoint is continued
    shown = [prompts[i % len(prompts)] for i in range(0, 64 * 7, 7)]

    def samples():
        """One-step pictures of the averaged student."""
        with models.ema.applied():
            return draw_samples(models.student, codec, shown, 0)

    for iteration, y in enumerate(run.prompts(prompts), run.start):
        if iteration == rewarded:
            run.check_finite(iteration)
            if run.shows:
                with models.ema.applied():
                    remember_before(run, before, models, prompts)
            run.wait()
        set_rates(warmup_share(iteration, config.lr_warmup), models.optimizer_assistant)
        updates = max(0, iteration - config.assistant_warmup)  # the student's, so far
        set_rates(warmup_share(updates, config.lr_warmup), models.optimizer)
        losses = train_step(iteration, y, config, run, models)
        if run.finish_iteration(iteration, losses, samples):
            break
    run.end()
    card = model_card("Diff-Instruct* (arXiv 2410.20898)", config, codec)
    export_student(run, codec, models.student, models.ema, card=card)
    if run.shows:
        with models.ema.applied():
            compare(run, config, models, prompts)


# Main

def sample_command(argv):
    """`python diff_instruct_star.py sample`: a grid of one-step pictures of a finished run."""
    args = sample_flags("diff_instruct_star.py", Config.out).parse_args(argv)
    check_sample_flags(args)
    pipeline = Path(args.run) / "pipeline"
    if not pipeline.exists():
        raise UserError(f"--run {args.run}: no finished student in it; see its samples/ while it runs")
    check_folder(pipeline)
    student, codec = load(pipeline, choose_device(args.device))
    prompts = args.prompts or prompts_of(read_config(Config, Path(args.run) / "config.json"), codec)
    prompts = [prompts[i % len(prompts)] for i in range(args.num)]
    images = draw_samples(student, codec, prompts, args.seed)
    save_samples(args, images, prompts)
    print(f"{args.num} one-step pictures: {args.grid}")


def main(argv):
    """`sample` or, by default, `train`."""
    if argv[:1] == ["sample"]:
        return sample_command(argv[1:])
    argv = argv[1:] if argv[:1] == ["train"] else argv
    train(parse_config(Config, PRESETS, argv, __doc__.splitlines()[0], preset_of, ("sample",)))


if __name__ == "__main__":
    run_command(main)
