"""Where the time of a training step goes: each network pass timed alone, against the whole step, in one process.

    python tools/benchmark.py yoso --preset shapes
    python tools/benchmark.py yoso --preset cifar10 --batch-size 16 --repeats 3 --json cifar10.json
    python tools/benchmark.py yoso_t2i --rank 64
    python tools/benchmark.py swiftbrush_v2 --stage a            also with the LoRA teacher as a copy of the frozen network
    python tools/benchmark.py diff_instruct_star                 also with one backward pass in place of the leaf trick
    python tools/benchmark.py swiftbrush_v2 --processes 2        only how the rate scales to two processes of one thread

Absolute times depend on the machine and wander; the ratios hold. Medians over --repeats after two warm-up rounds, the
parts taken in turn so that a slow moment hits all of them. Memory: the most bytes that the tensors of building and two steps held
at one time, the same on every run; what the allocator and the kernels need besides is not in it.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).parent.parent))
from forecast import LiveBytes, cost_of_step, matmul_rate

import diff_instruct_star
import swiftbrush_v2
import yoso
from common import (
    EMA,
    Denoiser,
    NoiseSchedule,
    UserError,
    Weights,
    add_lora,
    enable_checkpointing,
    load,
    load_decoder,
    load_scorer,
    one_step,
    use_lora,
)
from plumbing.cli import parse_config, run_command
from plumbing.run import Run
from plumbing.shard import shard

NETWORK, ONE_STEP, DECODED = SAMPLING = "network alone", "one-step sampling", "one-step sampling and decoding"
SEPARATE, PLAIN = "step with a separate LoRA teacher", "step with one plain backward pass"


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


def forward_pass(run, call):
    """A function that makes call(), a network's output, without gradient."""
    def go():
        with torch.no_grad(), run.autocast():
            call()
    return go


def backward_pass(run, call, frozen=()):
    """A function that makes call() and goes back through it; parameters in `frozen` get no gradient."""
    def go():
        for p in frozen:
            p.requires_grad_(False)
        with run.autocast():
            out = call()
        out.float().mean().backward()
        for p in frozen:
            p.requires_grad_(True)
    return go


def yoso_parts(config, folder):
    """The passes that one YOSO step needs, each alone, and the step itself.

    Returns (parts, networks, run): name -> function, name -> module, and the Run, whose parts are the optimisers. Beside the passes
    and "step" the parts have SAMPLING.
    """
    run = Run(yoso.Config(**{**vars(config), "out": str(folder)}), micro_multiple=yoso.Discriminator.GROUP)
    device, B, size = run.device, run.rows.stop - run.rows.start, config.image_size
    generator, discriminator = yoso.build_networks(config, device)
    distance = yoso.load_distance(config.distance, device)
    optimizer_g = torch.optim.Adam(generator.parameters(), 1e-6, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 1e-6, betas=(0.0, 0.999), fused=True)
    ema = EMA(generator.named_parameters(), config.ema)
    schedule = NoiseSchedule.from_config(yoso.scheduler_config(config)).to(device)
    x, z = torch.randn(B, 3, size, size, device=device), torch.randn(B, config.latent_z, device=device)
    t = torch.randint(1, config.levels + 1, (B,), device=device)
    x2, t2 = torch.cat([x, x]), torch.cat([t, t])
    # Iterations without R1; its double backward is spread over r1_every steps and timed apart.
    plain = yoso.Config(**{**vars(config), "r1": 0.0})

    def distances():
        pixels = x.clone().requires_grad_()
        (distance(pixels, x2[:B]) + distance(pixels, x2[B:])).mean().backward()

    def step(iteration=0):
        yoso.train_step(iteration, x, run, plain, schedule, distance, generator, discriminator, optimizer_g, optimizer_d)
        ema.update()

    top = torch.full_like(t, config.levels)
    run.parts = dict(optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    parts = {"G(x_r), forward": forward_pass(run, lambda: generator(x, t, z)),
             "G(x_t), forward + backward": backward_pass(run, lambda: generator(x, t, z)),
             "D(real, fake), forward + backward": backward_pass(run, lambda: discriminator(x2, t2)),
             "D(fake) for G, forward + input backward": backward_pass(
                 run, lambda: discriminator(x.clone().requires_grad_(), t), list(discriminator.parameters())),
             "distances, forward + backward": distances,
             "optimisers, EMA": lambda: (optimizer_g.step(), optimizer_d.step(), ema.update()), "step": step,
             NETWORK: forward_pass(run, lambda: generator(x, top, z)),
             ONE_STEP: forward_pass(run, lambda: yoso.sample(generator, schedule, [config.levels], x, z))}
    if config.r1:
        def step_r1():
            yoso.train_step(0, x, run, config, schedule, distance, generator, discriminator, optimizer_g, optimizer_d)
            ema.update()
        parts["step with R1"] = step_r1
    return parts, dict(generator=generator, discriminator=discriminator), run


def fine_tune_parts(config, folder):
    """The passes of one step of YOSO's fine-tuning, all weights or a LoRA, each alone, and the step itself; as yoso_parts."""
    run = Run(yoso.FineTune(**{**vars(config), "out": str(folder)}))
    device, B = run.device, run.rows.stop - run.rows.start
    start, codec = load(config.model, device)
    half, codec_d = load(config.discriminator, device) if config.discriminator else (start, codec)
    features = yoso.HalfUNet(half.net, share=bool(config.rank or config.discriminator) and not config.shard)
    discriminator = yoso.LatentDiscriminator(half.net, codec.shape[-1]).to(device)
    if half is not start:
        (half.net if config.shard else half.net.up_blocks).to("meta")
    shard(config, start.net, features, discriminator)
    generator, parameters = yoso.make_trainable(config, start)
    if config.gradient_checkpointing:
        for network in (generator.net, discriminator.features.unet):
            enable_checkpointing(network)
    if config.compile:
        for network in (discriminator, features, *(() if config.rank else (generator.net,))):
            network.compile()
    ema = EMA(parameters.items(), config.ema)
    run.parts = dict(optimizer_g=torch.optim.AdamW(parameters.values(), 1e-6, fused=True),
                     optimizer_d=torch.optim.AdamW(discriminator.parameters(), 1e-6, fused=True))
    pictures, captions = torch.zeros(B, 3, codec.picture_size, codec.picture_size, device=device), [""] * B
    x, t = torch.randn(B, *codec.shape, device=device), torch.full((B,), 500, device=device)
    cond, cond_d = codec.cond(captions), codec_d.cond(captions)
    x2, t2, cond2 = torch.cat([x, x]), torch.cat([t, t]), yoso.map_cond(lambda v: torch.cat([v, v]), cond_d)
    noisier = lambda: yoso.predict_x0(generator, x, t, cond)

    def step(iteration=0):
        yoso.fine_tune_step(iteration, pictures, captions, run, config, codec, codec_d, generator, discriminator, features, parameters,
                            *run.parts.values())
        ema.update()

    parts = {"text encoder": lambda: [c.cond(captions) for c in {codec, codec_d}],
             "VAE encoder": forward_pass(run, lambda: codec.encode(pictures)),
             "G at t_k, forward": forward_pass(run, noisier), "G at t_m, forward": forward_pass(run, noisier),
             "G at t, forward + backward": backward_pass(run, noisier),
             "D(real, fake), forward + backward": backward_pass(run, lambda: discriminator(x2, t2, cond2)),
             "D(fake) for G, forward + input backward": backward_pass(
                 run, lambda: discriminator(x.clone().requires_grad_(), t, cond_d), list(discriminator.parameters())),
             "features of the target, forward": forward_pass(run, lambda: features(x, 0 * t, cond_d)),
             "features of G, forward + input backward": backward_pass(run, lambda: features(x.clone().requires_grad_(), 0 * t, cond_d)),
             "optimisers, EMA": lambda: ([o.step() for o in run.parts.values()], ema.update()), "step": step}
    return parts | sampling_parts(run, codec, generator, x, cond), dict(
        generator=generator.net, discriminator=discriminator, features=features), run


def sampling_parts(run, codec, student, x, cond):
    """One-step sampling from noise x, beside the network's forward alone."""
    t = torch.full((len(x),), len(student.schedule) - 1, device=run.device)

    def network():
        with use_lora(student.net, student.adapter):
            return student.net(x, timestep=t, **cond).sample

    one = lambda: one_step(student, x, cond)
    return {NETWORK: forward_pass(run, network), ONE_STEP: forward_pass(run, one),
            DECODED: forward_pass(run, lambda: codec.decode(one()))}


def swiftbrush_parts(config, folder, separate=False):
    """The passes of one SwiftBrush v2 iteration of stage a or b, each alone, and the iteration itself; as yoso_parts.

    separate: the LoRA teacher is not an adapter on the frozen teacher but on a copy of it.
    """
    sb, stage = swiftbrush_v2, "b" if config.stage == "b" else "a"
    run = Run(sb.Config(**{**vars(config), "out": str(folder)}))
    device, B, rate = run.device, run.rows.stop - run.rows.start, 1e-6
    teacher, codec = load(config.model, device)
    base = copy.deepcopy(teacher.net) if separate else teacher.net
    if stage == "a":
        net = sb.dense_copy(teacher.net, teacher.net.state_dict(), device).requires_grad_(True)
        shard(config, net)
        student, parameters = Denoiser(net, teacher.schedule, teacher.prediction_type), Weights(net.named_parameters())
    else:
        shard(config, teacher.net)
        student = Denoiser(teacher.net, teacher.schedule, teacher.prediction_type, "student")
        parameters = add_lora(teacher.net, "student", config.rank_b, config.alpha_b)
    shard(config, teacher.net, base)
    lora_teacher = Denoiser(base, teacher.schedule, teacher.prediction_type, "lora_teacher")
    parameters_lora = add_lora(base, "lora_teacher", config.rank, config.alpha, config.lora_targets)
    networks = dict(student=student.net, teacher=teacher.net, lora_teacher=base)
    if config.gradient_checkpointing:
        for network in set(networks.values()):
            enable_checkpointing(network)
    if config.compile and stage == "a":
        student.net.compile()
    optimizer = torch.optim.AdamW(parameters.values(), rate, fused=True)
    optimizer_lora = torch.optim.AdamW(parameters_lora.values(), rate, fused=True)
    ema, run.parts = EMA(parameters.items(), config.ema), dict(optimizer=optimizer, optimizer_lora=optimizer_lora)
    prompts = (sb.prompts_of(config, codec) * B)[:B]
    cond, null = codec.cond(prompts), codec.null(B)
    image_losses = lambda f, prompts, iteration: {}
    if stage == "b" and config.clip_weight:
        scorers = dict(clip=load_scorer(config.clip, device))
        image_losses = sb.make_image_losses(config, load_decoder(config.decoder, codec), scorers)
    x, t = torch.randn(B, *codec.shape, device=device), torch.full((B,), 500, device=device)

    def step(iteration=0):
        condition = codec.cond(prompts)
        x0, _ = sb.student_step(0, prompts, condition, null, run, config, codec.shape, student, teacher, lora_teacher, image_losses,
                                None, parameters, optimizer)
        sb.lora_teacher_step(0, x0, condition, null, run, config, lora_teacher, parameters_lora, optimizer_lora)
        ema.update()

    scale = config.guidance[-1]
    scales = {teacher: scale, lora_teacher: scale if config.guide_lora_teacher else 1.0}
    guided = {d: forward_pass(run, lambda d=d: d.predict(x, t, "epsilon", cond, null, scales[d])) for d in scales}
    parts = {"text encoder": lambda: codec.cond(prompts),
             "student, forward + backward": backward_pass(run, lambda: sb.one_step(student, x, cond)),
             "teacher, guided forward": guided[teacher], "LoRA teacher, guided forward": guided[lora_teacher],
             "LoRA teacher, forward + backward": backward_pass(run, lambda: lora_teacher.predict(x, t, "epsilon", cond)),
             "optimisers, EMA": lambda: (optimizer.step(), optimizer_lora.step(), ema.update()), "step": step}
    if image_losses(x[:1], prompts[:1], 0):
        parts["decoder and CLIP, forward + input backward"] = backward_pass(
            run, lambda: sum(image_losses(x.clone().requires_grad_(), prompts, 0).values()))
    return parts | sampling_parts(run, codec, student, x, cond), networks, run


def diff_instruct_parts(config, folder, plain=False):
    """The passes of one Diff-Instruct* iteration, each alone, and the iteration itself; as yoso_parts.

    plain: the student's update by one backward pass through divergence, reward and student together.
    """
    di = diff_instruct_star
    run = Run(di.Config(**{**vars(config), "out": str(folder)}))
    device, B, rate = run.device, run.rows.stop - run.rows.start, 1e-6
    reference, codec = load(config.model, device)
    net = di.dense_copy(reference.net, reference.net.state_dict(), device).requires_grad_(True)
    copied = di.dense_copy(reference.net, reference.net.state_dict(), device).requires_grad_(True) if config.assistant == "full" else None
    shard(config, net, reference.net, *([copied] if copied else []))
    student, parameters = Denoiser(net, reference.schedule, reference.prediction_type), Weights(net.named_parameters())
    if copied:
        assistant = Denoiser(copied, reference.schedule, reference.prediction_type)
        parameters_assistant = Weights(copied.named_parameters())
    else:
        assistant = Denoiser(reference.net, reference.schedule, reference.prediction_type, "assistant")
        parameters_assistant = add_lora(reference.net, "assistant", config.rank, config.alpha, config.lora_targets)
    networks = dict(student=net, reference=reference.net, assistant=assistant.net)
    if config.gradient_checkpointing:
        for network in set(networks.values()):
            enable_checkpointing(network)
    if config.compile:
        for network in {net, assistant.net} if config.assistant == "full" else {net}:
            network.compile()
    optimizer = torch.optim.AdamW(parameters.values(), rate, fused=True)
    optimizer_assistant = torch.optim.AdamW(parameters_assistant.values(), rate, fused=True)
    ema, run.parts = EMA(parameters.items(), config.ema), dict(optimizer=optimizer, optimizer_assistant=optimizer_assistant)
    prompts = (di.prompts_of(config, codec) * B)[:B]
    cond, null = codec.cond(prompts), codec.null(B)
    rewards_of = di.make_rewards(load_decoder(config.decoder, codec), {name: load_scorer(getattr(config, name), device) for name in (
        "reward", "probe") if getattr(config, name)})
    x, t = torch.randn(B, *codec.shape, device=device), torch.full((B,), 500, device=device)

    frozen = list(parameters_assistant.values())

    def divergence(x_t, level, eps):
        return sum(di.divergence_losses(x_t, level, eps, cond, null, config, reference, assistant).values())

    def plain_loss():
        draw = run.draws(0)
        z, level, eps = draw.randn(*codec.shape), draw.randint(config.t_min, config.t_max + 1), draw.randn(*codec.shape)
        f = di.one_step(student, z, cond)
        loss = divergence(reference.schedule.add_noise(f, eps, level), level, eps)
        return loss + di.reward_loss(rewards_of(f, prompts)["reward"], config.alpha_rew)

    def plain_student_step():
        optimizer.zero_grad()
        backward_pass(run, plain_loss, frozen)()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
        optimizer.step()

    def step(iteration=0):
        condition = codec.cond(prompts)
        for k in range(config.assistant_steps):
            di.assistant_step(0, k, condition, run, config, codec.shape, student, assistant, parameters_assistant, optimizer_assistant)
        if plain:
            plain_student_step()
        else:
            di.student_step(0, prompts, condition, null, run, config, codec.shape, student, reference, assistant, rewards_of,
                            config.alpha_rew, parameters, frozen, optimizer)
        ema.update()

    return {"text encoder": lambda: codec.cond(prompts),
            "student, forward + backward": backward_pass(run, lambda: di.one_step(student, x, cond)),
            "assistant and guided reference, forward + input backward": backward_pass(
                run, lambda: divergence(x.clone().requires_grad_(), t, x), frozen),
            "decoder, reward and probe, forward + input backward": backward_pass(
                run, lambda: rewards_of(x.clone().requires_grad_(), prompts)["reward"]),
            "student for the assistant, forward": forward_pass(run, lambda: di.one_step(student, x, cond)),
            "assistant, forward + backward": backward_pass(run, lambda: assistant.predict(x, t, "epsilon", cond)),
            "optimisers, EMA": lambda: (optimizer.step(), optimizer_assistant.step(), ema.update()), "step": step,
            **sampling_parts(run, codec, student, x, cond)}, networks, run


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the with block and still live; see LiveBytes."""

    def __init__(self):
        super().__init__()
        self.memory = LiveBytes()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return tree_map_only(torch.Tensor, self.memory.count, function(*args, **(kwargs or {})))


def peak_of_steps(parts_of, *arguments):
    """Bytes of tensors that building the networks and two steps hold at their peak."""
    with torch.compiler.set_stance("force_eager"), TensorMemory() as mode:
        parts = parts_of(*arguments)[0]
        for _ in range(2):
            parts["step"]()
    return mode.memory.peak


METHODS = dict(yoso=(yoso, yoso.Config, yoso.PRESETS, yoso_parts), yoso_t2i=(yoso, yoso.FineTune, yoso.FINE_TUNE_PRESETS, fine_tune_parts),
               swiftbrush_v2=(swiftbrush_v2, swiftbrush_v2.Config, swiftbrush_v2.PRESETS, swiftbrush_parts),
               diff_instruct_star=(diff_instruct_star, diff_instruct_star.Config, diff_instruct_star.PRESETS, diff_instruct_parts))
VARIANTS = dict(swiftbrush_v2=SEPARATE, diff_instruct_star=PLAIN)


def bare_parts(networks, step):
    """name -> function that makes a bare forward of each network, on what the step's first call of it gives."""
    calls, hooks = {}, []

    def keep(name):
        def hook(module, args, kwargs):
            calls.setdefault(name, (module, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))))
        return hook

    for name, network in networks.items():
        hooks.append(network.register_forward_pre_hook(keep(name), with_kwargs=True))
    step()
    for hook in hooks:
        hook.remove()

    def go(network, args, kwargs):
        with torch.no_grad():
            network(*args, **kwargs)

    return {f"{name}, bare": partial(go, *call) for name, call in calls.items()}


def rate_of(parts_of, config, folder, repeats, apart):
    """Images a second of whole steps, over all processes; apart: with nothing exchanged between them."""
    parts, _, run = parts_of(config, folder)
    exchange = dist.all_reduce
    if run.world > 1:
        dist.barrier()
        if apart:
            dist.all_reduce = lambda *_, **__: None
    rate = torch.tensor((run.rows.stop - run.rows.start) / time_parts({"step": parts["step"]}, repeats, run.device)["step"])
    if run.world > 1:
        dist.all_reduce = exchange
        dist.all_reduce(rate)
    return rate.item()


def scaling(argv, batch_size, processes):
    """Images a second on CPU, every process of one thread; a dict.

    whole, part: one process with the batch, and with what one of several gets of it. together: several in data parallel. apart:
    the same at the same time, with nothing exchanged: what the machine has to give; not with --shard, which cannot do without.
    """
    if batch_size % processes:
        raise UserError(f"--processes {processes}: --batch-size {batch_size} is not divisible by it")

    def rate(size, ranks, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__, *argv,
                   "--batch-size", str(size), "--device", "cpu", "--only-rate", *flags]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            ours = [line for line in done.stderr.splitlines() if line.startswith(Path(__file__).name)]
            raise UserError(f"--processes {processes}: a process failed ({(ours or done.stderr.strip().splitlines())[0]})")
        return float(done.stdout.split()[-1])

    rates = dict(whole=rate(batch_size, 1), part=rate(batch_size // processes, 1), together=rate(batch_size, processes))
    return rates if "--shard" in argv else rates | dict(apart=rate(batch_size, processes, "--apart"))


def main(argv):
    """The command line: the method, this tool's flags, then any flag of the method's script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--json", help="write the report to this file too")
    parser.add_argument("--processes", type=int, default=0, help="only how the rate scales to that many processes, one thread each")
    parser.add_argument("--only-rate", action="store_true", help="print only the images a second, also under torchrun")
    parser.add_argument("--apart", action="store_true", help="with --only-rate: exchange no gradients between the processes")
    args, rest = parser.parse_known_args(argv)
    script, config_class, presets, parts_of = METHODS[args.method]
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1")
    if args.processes < 0 or args.processes == 1:
        raise UserError(f"--processes {args.processes}: must be at least 2")
    config = parse_config(config_class, presets, rest, "", None if args.method == "yoso" else script.preset_of)
    if args.processes:
        report = scaling([args.method, "--repeats", str(args.repeats), *rest], config.batch_size, args.processes)
        text = json.dumps({k: round(v, 2) for k, v in report.items()})
        if args.json:
            Path(args.json).write_text(text + "\n")
        print(text)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.only_rate:
            rate = rate_of(parts_of, config, f"{folder}/run", args.repeats, args.apart)
            if int(os.environ.get("RANK", 0)) == 0:
                print(rate)
            return
        peak = {"step": peak_of_steps(parts_of, config, f"{folder}/peak")}
        parts, networks, run = parts_of(config, f"{folder}/run")
        shared = {network: [name for name, other in networks.items() if other is network] for network in networks.values()}
        networks = {" and ".join(names): network for network, names in shared.items()}
        cost = cost_of_step(run, networks, list(run.parts.values()), parts["step"], {0: 1.0})
        variants = ["step with R1"] if "step with R1" in parts else []
        if args.method in VARIANTS:
            variants = [VARIANTS[args.method]]
            parts[variants[0]] = parts_of(config, f"{folder}/variant", True)[0]["step"]
            peak[variants[0]] = peak_of_steps(parts_of, config, f"{folder}/peak2", True)
        device = run.device
        times = time_parts(parts | bare_parts(networks, parts["step"]), args.repeats, device)
        matmul = matmul_rate(device, config.precision)
    step, variant_times = times.pop("step"), {name: times.pop(name) for name in variants}
    sampling = {name: times.pop(name) for name in SAMPLING if name in times}
    predicted = sum(units * times.pop(f"{name}, bare") for name, units in cost["units"].items())
    report = dict(method=args.method, preset=config.preset, batch_size=config.batch_size, device=str(device),
                  threads=torch.get_num_threads(), precision=config.precision, **cost,
                  step_ms=1e3 * step, images_per_second=config.batch_size / step,
                  share={k: v / step for k, v in times.items()}, overhead=1 - sum(times.values()) / step,
                  peak_MB={k: v / 2**20 for k, v in peak.items()}, forecast_MB=cost["memory_GB"] * 2**10,
                  matmul_TFLOP_per_second=matmul, flops_utilisation=cost["TFLOP"] / step / matmul,
                  predicted_by_calls=predicted / step,
                  sampling={name: sampling[NETWORK] / seconds for name, seconds in sampling.items() if name != NETWORK},
                  samples_per_second={name: config.batch_size / seconds for name, seconds in sampling.items()})
    if "step with R1" in variant_times:
        report["r1_share"] = (variant_times["step with R1"] - step) / config.r1_every / step
    elif variant_times:
        report["variant_step_ratio"] = variant_times[variants[0]] / step
    text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(f"| part of a step ({config.preset}, batch {config.batch_size}, {1e3 * step:.0f} ms) | share |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds / step:.1%} |")
    print(f"| everything else | {report['overhead']:.1%} |")
    if "r1_share" in report:
        print(f"| (R1, a step in {config.r1_every}, on average) | +{report['r1_share']:.1%} |")
    for name, size in peak.items():
        print(f"| {name}: peak memory {size / 2**20:.0f} MB | {variant_times.get(name, step) / step:.1%} |")
    print(f"| memory by the forecast | {report['forecast_MB']:.0f} MB |")
    for name, (calls, backward) in cost["calls"].items():
        print(f"| {name}: calls, those with a backward pass, in forward passes | {calls:g}, {backward:g}, {cost['units'][name]:g} |")
    print(f"| rate against the one that bare forward passes predict | {predicted / step:.1%} |\n"
          f"| {cost['TFLOP']:.3g} TFLOP a step, against matrix products at {matmul:.3g} TFLOP/s | {report['flops_utilisation']:.1%} |")
    for name, ratio in report["sampling"].items():
        print(f"| {name}, {report['samples_per_second'][name]:.0f} a second, against the network alone | {ratio:.1%} |")


if __name__ == "__main__":
    run_command(main)
