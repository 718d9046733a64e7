"""Where the time of a training step goes: each network pass alone, against the whole step, in one process.

    python tools/benchmark.py yoso --preset shapes
    python tools/benchmark.py yoso --preset cifar10 --batch-size 16 --repeats 3 --json cifar10.json
    python tools/benchmark.py yoso --model assets/mini-sd --rank 64
    python tools/benchmark.py swiftbrush_v2 --stage a       also with the LoRA teacher on a network of its own
    python tools/benchmark.py diff_instruct_star            also with one backward pass in place of the leaf
    python tools/benchmark.py swiftbrush_v2 --processes 2   only how the rate scales to two processes

The networks and the step are the script's own; the data are noise and empty captions, or the script's
prompts. Absolute times depend on the machine and wander; the ratios hold. Medians over --repeats after two
warm-up rounds, the parts taken in turn so that a slow moment hits all of them. Memory: the most bytes that
the tensors of building and of two steps held at one time, the same on every run; what the allocator and the
kernels need comes on top.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).parent.parent))
from forecast import TensorCounter, cost_of_step, matmul_rate, networks_of, optimizers_of

import diff_instruct_star
import swiftbrush_v2
import yoso
from common import UserError, enable_checkpointing, frozen, map_cond, one_step, use_lora
from plumbing.cli import Parser, check_flags, check_writable, parse_config, run_command
from plumbing.data import prompts_of
from plumbing.files import write_text
from plumbing.run import Run
from plumbing.shard import shard

METHODS = {script.__name__: script for script in (yoso, swiftbrush_v2, diff_instruct_star)}
NETWORK, ONE_STEP, DECODED = SAMPLING = "network alone", "one-step sampling", "one-step sampling and decoding"
R1 = "step with R1"
SEPARATE, PLAIN = "step with a separate LoRA teacher", "step with one plain backward pass"


# The script's cast and step

def cast_of(script, config, folder):
    """(run, models, batch) of one training: its Run, its Models, and what train_step gets of the data."""
    run = Run(replace(config, out=str(folder)))
    n = run.rows.stop - run.rows.start
    if script is swiftbrush_v2:
        loaded = script.load_networks(config, run.device)
        shard(config, loaded.teacher.net, loaded.start.net)
        models, codec = script.build(config, run, config.stage, loaded), loaded.codec
    else:
        models = script.build(config, run)
        codec = models.codec
    for optimizer in optimizers_of(models):
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # which costs the same time and keeps all weights what they are
    if script is yoso:
        pictures = torch.rand(n, 3, codec.picture_size, codec.picture_size, device=run.device) * 2 - 1
        return run, models, (pictures, [""] * n)
    return run, models, ((prompts_of(config, codec) * n)[:n],)


def step_of(script, config, run, models, batch):
    """A function that makes one step, in which everything acts that the flags ask for, but R1."""
    if script is yoso:
        config = replace(config, r1=0.0)
    return lambda _=0: script.train_step(iteration_of(script, config), *batch, config, run, models)


def iteration_of(script, config):
    """The first iteration of a run in which everything acts."""
    return config.assistant_warmup + config.warmup if script is diff_instruct_star else 0


def variant_of(script, config, run, models, batch):
    """(name, step) of another way to make the step, which may change models; None if there is none."""
    if script is yoso and config.r1:
        return R1, lambda: yoso.train_step(0, *batch, config, run, models)
    if script is swiftbrush_v2 and not config.shard:
        own = copy.deepcopy((models.lora_teacher, models.optimizer_lora))
        models.lora_teacher, models.optimizer_lora = own
        if config.gradient_checkpointing:
            enable_checkpointing(models.lora_teacher.net)
        return SEPARATE, step_of(script, config, run, models, batch)
    if script is diff_instruct_star:
        return PLAIN, partial(plain_step, config, run, models, *batch)


def plain_step(config, run, models, prompts):
    """Diff-Instruct*'s iteration with one backward pass through divergence, reward and student together."""
    di, student, codec = diff_instruct_star, models.student, models.codec
    iteration = iteration_of(di, config)
    draw = run.draws((config.score_updates + 1) * iteration)

    def loss_student(p):
        f = one_step(student, p.z, p.cond)
        losses = di.divergence_losses(f, p, config, models)
        rewards = di.rewards_of(f, p.y, models.decode, models.scorers)
        if "reward" in rewards:
            losses["L_reward"] = di.reward_loss(rewards["reward"], config.alpha_rew)
        return sum(losses.values()), losses

    assistant_alone = replace(config, assistant_warmup=iteration + 1)
    di.train_step(iteration, prompts, assistant_alone, run, models)
    z, t = draw.randn(*codec.shape), draw.randint(config.t_min, config.t_max + 1)
    parts = run.split(z=z, t=t, eps=draw.randn(*codec.shape), cond=codec.cond(prompts), null=models.null,
                      y=prompts)
    with frozen(models.assistant.net):
        run.descend(models.optimizer, parts, loss_student, config.clip_norm)
    models.ema.update(iteration - config.assistant_warmup)


# The passes of a step, each alone

def forward_pass(run, call):
    """A function that makes call(), a network's output, without gradient."""
    def go():
        with torch.no_grad(), run.autocast():
            call()
    return go


def backward_pass(run, call, network=None):
    """A function that makes call() and goes back through it, to no parameter of `network` if one is given."""
    def go():
        with frozen(network) if network else nullcontext():
            with run.autocast():
                out = call()
            out.float().mean().backward()
    return go


def updates(models):
    """A function that makes the updates of all weights and averages from the gradients that are there."""
    return lambda: ([optimizer.step() for optimizer in optimizers_of(models)], models.ema.update(0))


def yoso_parts(config, run, models, pictures, captions):
    """name -> function of the passes of one step, from scratch or fine-tuning, and of SAMPLING."""
    G, D, codec, T = models.generator, models.discriminator, models.codec, len(models.generator.schedule)
    x = torch.randn(len(pictures), *codec.shape, device=run.device)
    t = torch.full((len(x),), T // 2, device=run.device)
    cond = yoso.condition(codec, captions, run.draws(0), config.latent_z)
    cond_d = cond if models.codec_d is codec else models.codec_d.cond(captions)
    p = SimpleNamespace(x0=x, target=x, eps=x, t=t, cond=cond, cond_d=cond_d)
    x2, t2, twice = torch.cat([x, x]), torch.cat([t, t]), map_cond(lambda v: torch.cat([v, v]), cond_d)
    leaf = lambda: x.clone().requires_grad_()
    predict = lambda: yoso.predict_x0(G, p, t)
    offsets = {max(1, round(offset * T / 1000)) for offset in (config.real_offset, config.con_offset)}

    def distances():
        return sum(d for d in yoso.distances_of(leaf(), p, config, models.distances) if d is not None)

    parts = {}
    if config.model:
        parts["text encoder"] = lambda: [c.cond(captions) for c in {codec, models.codec_d}]
        parts["VAE encoder"] = forward_pass(run, lambda: codec.encode(pictures))
    if config.adversary == "self":
        parts["G for the real side, forward"] = forward_pass(run, predict)
    if config.lambda_con and not (config.adversary == "self" and len(offsets) == 1):
        parts["G for the target, forward"] = forward_pass(run, predict)
    parts |= {
        "G, forward + backward": backward_pass(run, predict),
        "D(real, fake), forward + backward": backward_pass(run, lambda: D(x2, t2, twice)),
        "D(fake) for G, forward + input backward": backward_pass(run, lambda: D(leaf(), t, cond_d), D),
        "distances, forward + input backward": backward_pass(run, distances),
        "optimisers, EMA": updates(models)}
    one = lambda: yoso.sample(G, [T - 1], x, [], cond)
    return parts | sampling_parts(run, codec, G, x, cond, one)


def swiftbrush_parts(config, run, models, prompts):
    """name -> function of the passes of one iteration of stage a or b, and of SAMPLING."""
    codec, null, student = models.loaded.codec, models.null, models.student
    teacher, lora_teacher = models.teacher, models.lora_teacher
    x, cond = torch.randn(len(prompts), *codec.shape, device=run.device), codec.cond(prompts)
    t = torch.full((len(x),), len(teacher.schedule) // 2, device=run.device)
    w = swiftbrush_v2.guidance_of(config, run.draws(0))
    w_lora_teacher = w if config.guide_lora_teacher else 1.0
    one = lambda: one_step(student, x, cond)
    guided = lambda denoiser, w: forward_pass(run, lambda: denoiser.predict(x, t, "epsilon", cond, null, w))
    parts = {
        "text encoder": lambda: codec.cond(prompts),
        "student, forward + backward": backward_pass(run, one),
        "teacher, guided forward": guided(teacher, w),
        "LoRA teacher, guided forward": guided(lora_teacher, w_lora_teacher),
        "LoRA teacher, forward + backward": backward_pass(
            run, lambda: lora_teacher.predict(x, t, "epsilon", cond)),
        "optimisers, EMA": updates(models)}
    if models.scorers:
        leaf = lambda: x.clone().requires_grad_()
        losses = lambda: swiftbrush_v2.image_losses(leaf(), prompts, 0, config, models).values()
        parts["decoder and CLIP, forward + input backward"] = backward_pass(run, lambda: sum(losses()))
    return parts | sampling_parts(run, codec, student, x, cond, one)


def diff_instruct_parts(config, run, models, prompts):
    """name -> function of the passes of one iteration, and of SAMPLING."""
    codec, student, assistant = models.codec, models.student, models.assistant
    x, cond = torch.randn(len(prompts), *codec.shape, device=run.device), codec.cond(prompts)
    t = torch.full((len(x),), len(models.reference.schedule) // 2, device=run.device)
    p = SimpleNamespace(t=t, eps=x, cond=cond, null=models.null)
    leaf = lambda: x.clone().requires_grad_()
    one = lambda: one_step(student, x, cond)
    losses = lambda: diff_instruct_star.divergence_losses(leaf(), p, config, models)
    parts = {
        "text encoder": lambda: codec.cond(prompts),
        "student, forward + backward": backward_pass(run, one),
        "assistant and guided reference, forward + input backward": backward_pass(
            run, lambda: sum(losses().values()), assistant.net),
        "student for the assistant, forward": forward_pass(run, one),
        "assistant, forward + backward": backward_pass(run, lambda: assistant.predict(x, t, "epsilon", cond)),
        "optimisers, EMA": updates(models)}
    if "reward" in models.scorers:
        rewards = lambda: diff_instruct_star.rewards_of(leaf(), prompts, models.decode, models.scorers)
        parts["decoder, reward and probe, forward + input backward"] = backward_pass(
            run, lambda: rewards()["reward"])
    return parts | sampling_parts(run, codec, student, x, cond, one)


PARTS = {yoso: yoso_parts, swiftbrush_v2: swiftbrush_parts, diff_instruct_star: diff_instruct_parts}


def sampling_parts(run, codec, student, x, cond, one):
    """SAMPLING: one-step sampling by one() from noise x, with decoding if there is any, beside the network's
    forward alone.
    """
    t = torch.full((len(x),), len(student.schedule) - 1, device=run.device)

    def network():
        with use_lora(student.net, student.adapter):
            return student.net(x, timestep=t, **(cond or {})).sample

    parts = {NETWORK: forward_pass(run, network), ONE_STEP: forward_pass(run, one)}
    if codec.vae is not None:
        parts[DECODED] = forward_pass(run, lambda: codec.decode(one()))
    return parts


def bare_parts(networks, step):
    """name -> function that makes a bare forward of the network, on what the step's first call gives it."""
    calls, hooks = {}, []

    def keep(name):
        def hook(module, args, kwargs):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            calls.setdefault(name, (module, args, kwargs))
        return hook

    for name, network in networks.items():
        hooks.append(network.register_forward_pre_hook(keep(name), with_kwargs=True))
    step()
    for hook in hooks:
        hook.remove()

    def go(network, args, kwargs):
        with torch.no_grad():
            network(*args, **kwargs)

    return {name: partial(go, *call) for name, call in calls.items()}


# Measuring

def synchronise(device):
    """Waits for an accelerator's queue; nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def time_parts(parts, repeats, device):
    """name -> function; returns name -> median seconds."""
    times = {name: [] for name in parts}
    for i in range(repeats + 2):
        for name, function in parts.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_of_steps(script, config, folder, make_step=step_of):
    """Bytes of tensors that building the networks and two steps hold at their peak; make_step: as step_of."""
    with torch.compiler.set_stance("force_eager"), TensorCounter() as counter:
        step = make_step(script, config, *cast_of(script, config, folder))
        for _ in range(2):
            step()
    return counter.memory.peak


def rate_of(script, config, folder, repeats, apart):
    """Images a second of whole steps, over all processes; apart: with nothing exchanged between them."""
    run, *rest = cast_of(script, config, folder)
    step, exchange = step_of(script, config, run, *rest), dist.all_reduce
    if run.world > 1:
        dist.barrier()
        if apart:
            dist.all_reduce = lambda *_, **__: None
    seconds = time_parts({"step": step}, repeats, run.device)["step"]
    rate = torch.tensor((run.rows.stop - run.rows.start) / seconds)
    if run.world > 1:
        dist.all_reduce = exchange
        dist.all_reduce(rate)
    return rate.item()


def scaling(argv, batch_size, processes):
    """Images a second on CPU, every process of one thread; a dict.

    whole, part: one process with the batch, and with what one of several gets of it. together: several in
    data parallel. apart: the same at the same time, with nothing exchanged: what the machine has to give; not
    with --shard, which cannot do without.
    """
    if batch_size % processes:
        raise UserError(f"--processes {processes}: --batch-size {batch_size} is not divisible by it")

    def rate(size, ranks, *flags):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        own = ["--batch-size", str(size), "--device", "cpu", "--only-rate", *flags]
        done = subprocess.run([sys.executable, *launcher, __file__, *argv, *own], capture_output=True,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            ours = [line for line in done.stderr.splitlines() if line.startswith(Path(__file__).name)]
            reason = (ours or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
            raise UserError(f"--processes {processes}: a process failed ({reason})")
        return float(done.stdout.split()[-1])

    rates = dict(whole=rate(batch_size, 1), part=rate(batch_size // processes, 1),
                 together=rate(batch_size, processes))
    return rates if "--shard" in argv else rates | dict(apart=rate(batch_size, processes, "--apart"))


def measure(script, config, folder, repeats):
    """The report on a method's step, a dict."""
    peak = {"step": peak_of_steps(script, config, f"{folder}/peak")}
    run, models, batch = cast_of(script, config, f"{folder}/run")
    networks, step = networks_of(models), step_of(script, config, run, models, batch)
    names = {network: [name for name, other in networks.items() if other is network]
             for network in networks.values()}
    networks = {" and ".join(shared): network for network, shared in names.items()}
    cost = cost_of_step(run, networks, optimizers_of(models), step, {0: 1.0})
    # The passes are those of the cast as it is; a variant may change a copy of it.
    parts = PARTS[script](config, run, models, *batch) | {"step": step}
    bare = bare_parts(networks, step)
    variant = variant_of(script, config, run, replace(models), batch)
    if variant:
        peak[variant[0]] = peak_of_steps(script, config, f"{folder}/variant", lambda *a: variant_of(*a)[1])
        parts[variant[0]] = variant[1]
    times = time_parts(parts | {(name, "bare"): call for name, call in bare.items()}, repeats, run.device)
    seconds = times.pop("step")
    predicted = sum(cost["units"][name] * times.pop((name, "bare")) for name in bare)
    sampling = {name: times.pop(name) for name in SAMPLING if name in times}
    varied = times.pop(variant[0]) if variant else None
    matmul = matmul_rate(run.device, config.precision)
    report = dict(
        method=script.__name__, preset=config.preset, batch_size=config.batch_size, device=str(run.device),
        threads=torch.get_num_threads(), precision=config.precision, **cost, step_ms=1e3 * seconds,
        images_per_second=config.batch_size / seconds, share={k: v / seconds for k, v in times.items()},
        overhead=1 - sum(times.values()) / seconds, peak_MB={k: v / 2**20 for k, v in peak.items()},
        forecast_MB=cost["memory_GB"] * 2**10, matmul_TFLOP_per_second=matmul,
        flops_utilisation=cost["TFLOP"] / seconds / matmul, predicted_by_calls=predicted / seconds,
        sampling={name: sampling[NETWORK] / v for name, v in sampling.items() if name != NETWORK},
        samples_per_second={name: config.batch_size / v for name, v in sampling.items()})
    if variant and variant[0] == R1:
        report["r1_share"] = (varied - seconds) / config.r1_every / seconds
    if variant:
        report["variant_step_ratio"] = varied / seconds
    return report


def print_table(report):
    """A report as a Markdown table."""
    setting = f"{report['preset']}, batch {report['batch_size']}, {report['step_ms']:.0f} ms"
    print(f"| part of a step ({setting}) | share |\n|---|---|")
    for name, share in report["share"].items():
        print(f"| {name} | {share:.1%} |")
    print(f"| everything else | {report['overhead']:.1%} |")
    if "r1_share" in report:
        print(f"| (R1, on average over all steps) | +{report['r1_share']:.1%} |")
    for name, size in report["peak_MB"].items():
        ratio = 1.0 if name == "step" else report["variant_step_ratio"]
        print(f"| {name}: peak memory {size:.0f} MB | {ratio:.1%} |")
    print(f"| memory by the forecast | {report['forecast_MB']:.0f} MB |")
    for name, (calls, backward) in report["calls"].items():
        print(f"| {name}: calls, those with a backward pass, in forward passes "
              f"| {calls:g}, {backward:g}, {report['units'][name]:g} |")
    print(f"| rate against the one that bare forward passes predict | {report['predicted_by_calls']:.1%} |\n"
          f"| {report['TFLOP']:.3g} TFLOP a step, against matrix products at "
          f"{report['matmul_TFLOP_per_second']:.3g} TFLOP/s | {report['flops_utilisation']:.1%} |")
    for name, ratio in report["sampling"].items():
        rate = report["samples_per_second"][name]
        print(f"| {name}, {rate:.0f} a second, against the network alone | {ratio:.1%} |")


# Main

def main(argv):
    """The command line: the method, this tool's flags, then any flag of the method's script."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--json", help="write the report to this file too")
    parser.add_argument("--processes", type=int,
                        help="only how the rate scales to that many processes, one thread each")
    parser.add_argument("--only-rate", action="store_true",
                        help="print only the images a second, also under torchrun")
    parser.add_argument("--apart", action="store_true",
                        help="with --only-rate: exchange no gradients between the processes")
    args, rest = parser.parse_known_args(argv)
    script = METHODS[args.method]
    check_flags(args, repeats=dict(least=1), processes=dict(least=2))
    if args.apart and not args.only_rate:
        raise UserError("--apart: only with --only-rate")
    if args.json is not None:
        check_writable(args.json, "--json")
    config = parse_config(script.Config, script.PRESETS, rest, "", script.preset_of)
    script.check(config)
    if script is swiftbrush_v2 and config.stage not in ("a", "b"):
        config = replace(config, stage="a")
    if args.processes:
        flags = [args.method, "--repeats", str(args.repeats), *rest]
        report = scaling(flags, config.batch_size, args.processes)
    else:
        with tempfile.TemporaryDirectory() as folder:
            if args.only_rate:
                rate = rate_of(script, config, folder, args.repeats, args.apart)
                if int(os.environ.get("RANK", 0)) == 0:
                    print(rate)
                return
            report = measure(script, config, folder, args.repeats)
        print_table(report)
    text = json.dumps(tree_map_only(float, lambda v: round(v, 4), report), indent=1)
    if args.json:
        write_text(args.json, text)
    if args.processes:
        print(text)


if __name__ == "__main__":
    run_command(main)
