"""Where the time of a training step goes: each network pass timed alone, against the whole step, in one process.

    python tools/benchmark.py --preset shapes
    python tools/benchmark.py --preset cifar10 --batch-size 16 --repeats 3 --json cifar10.json

Absolute times depend on the machine and wander; the ratios hold. Medians over --repeats after two warm-up rounds, the
parts taken in turn so that a slow moment hits all of them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import yoso
from common import NoiseSchedule, Run, parse_config, run_command


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


def yoso_parts(config, folder):
    """The passes that one YOSO step needs, each alone, and the step itself: (parts, parameters by network, device)."""
    run = Run(yoso.Config(**{**vars(config), "out": folder}), micro_multiple=yoso.Discriminator.GROUP)
    device, B, size = run.device, config.batch_size, config.image_size
    generator, discriminator = yoso.build_networks(config, device)
    distance = yoso.load_distance(config.distance, device)
    optimizer_g = torch.optim.Adam(generator.parameters(), 1e-6, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 1e-6, betas=(0.0, 0.999), fused=True)
    schedule = NoiseSchedule.from_config(yoso.scheduler_config(config)).to(device)
    x, z = torch.randn(B, 3, size, size, device=device), torch.randn(B, config.latent_z, device=device)
    t = torch.randint(1, config.levels + 1, (B,), device=device)
    x2, t2 = torch.cat([x, x]), torch.cat([t, t])
    # Iterations without R1; its double backward is spread over r1_every steps and timed apart.
    plain = yoso.Config(**{**vars(config), "r1": 0.0})

    def generator_forward():
        with torch.no_grad(), run.autocast():
            generator(x, t, z)

    def generator_train():
        with run.autocast():
            out = generator(x, t, z)
        out.float().mean().backward()

    def discriminator_train():
        with run.autocast():
            out = discriminator(x2, t2)
        out.float().mean().backward()

    def discriminator_input():
        discriminator.requires_grad_(False)
        pixels = x.clone().requires_grad_()
        with run.autocast():
            out = discriminator(pixels, t)
        out.float().mean().backward()
        discriminator.requires_grad_(True)

    def distances():
        pixels = x.clone().requires_grad_()
        (distance(pixels, x2[:B]) + distance(pixels, x2[B:])).mean().backward()

    def step():
        yoso.train_step(0, x, run, plain, schedule, distance, generator, discriminator, optimizer_g, optimizer_d)

    parts = {"G(x_r), forward": generator_forward, "G(x_t), forward + backward": generator_train,
             "D(real, fake), forward + backward": discriminator_train, "D(fake) for G, forward + input backward": discriminator_input,
             "distances, forward + backward": distances,
             "optimisers": lambda: (optimizer_g.step(), optimizer_d.step()), "step": step}
    if config.r1:
        def step_r1():
            yoso.train_step(0, x, run, config, schedule, distance, generator, discriminator, optimizer_g, optimizer_d)
        parts["step with R1"] = step_r1
    return parts, dict(generator=generator, discriminator=discriminator), device


def main(argv):
    """The command line: this tool's flags, then any flag of yoso.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--json", help="write the report to this file too")
    args, rest = parser.parse_known_args(argv)
    config = parse_config(yoso.Config, yoso.PRESETS, rest, "")
    with tempfile.TemporaryDirectory() as folder:
        parts, networks, device = yoso_parts(config, folder + "/run")
        times = time_parts(parts, args.repeats, device)
    step, with_r1 = times.pop("step"), times.pop("step with R1", None)
    report = dict(preset=config.preset, batch_size=config.batch_size, device=str(device), threads=torch.get_num_threads(),
                  precision=config.precision,
                  parameters={k: sum(p.numel() for p in n.parameters()) for k, n in networks.items()},
                  step_ms=1e3 * step, images_per_second=config.batch_size / step,
                  share={k: v / step for k, v in times.items()}, overhead=1 - sum(times.values()) / step)
    if with_r1:
        report["r1_share"] = (with_r1 - step) / config.r1_every / step
    text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(f"| part of a step ({config.preset}, batch {config.batch_size}, {1e3 * step:.0f} ms) | share |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds / step:.1%} |")
    print(f"| everything else | {report['overhead']:.1%} |")
    if with_r1:
        print(f"| (R1, a step in {config.r1_every}, on average) | +{report['r1_share']:.1%} |")


if __name__ == "__main__":
    run_command(main)
