"""Flags from a dataclass, their ranges, the configuration of a run read back, and errors in one line."""

import argparse
import dataclasses
import json
import math
import operator
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from common import UserError


def flag(default, help, group="method", choices=None, above=None, least=None, below=None, most=None,
         infinite=False):
    """A dataclass field whose help text is also its comment in the source, and whose range stands beside it.

    The value, or each of several, must be one of `choices`, > above, >= least, < below, <= most. NaN never
    passes, infinity only with `infinite`.
    """
    limits = dict(choices=choices, above=above, least=least, below=below, most=most, infinite=infinite)
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, **limits))


@dataclass
class RunFlags:
    """The flags that every method has. Each field is a flag, and its text the --help."""
    out: str = flag("", "the run's folder; the same command again resumes what lies there", "run")
    resume: str = flag("", "folder of another run of the same configuration, to continue from its "
                       "checkpoints", "run")
    seed: int = flag(0, "of weights, order of the data, and noise", "run", least=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda or mps", "run")
    precision: str = flag("fp32", "of the networks; weights and losses stay fp32", "run",
                          choices=("fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the networks, where no adapter is switched and no R1 "
                         "differentiates twice", "run")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, "
                                        "more time", "run")
    micro_batch: int = flag(0, "samples a process handles at once, 0: all; changes memory, not the result",
                            "run", least=0)
    shard: bool = flag(False, "FSDP2: every process keeps its part of weights, gradients, moments and "
                       "averages", "run")
    cache_latents: bool = flag(False, "encode pictures and captions once, float16, to OUT/cache; the text "
                               "encoders leave the device", "run")
    workers: int = flag(0, "processes that read pictures, where a run trains on any", "run", least=0)
    timeout: int = flag(45, "seconds that a process waits for the others within a step; when they are up it "
                        "names who does not answer and ends", "run", least=1)
    log_every: int = flag(50, "iterations between lines of metrics.jsonl", "run", least=1)
    save_every: int = flag(500, "iterations between checkpoints", "run", least=1)
    sample_every: int = flag(500, "iterations between grids in samples/", "run", least=1)


# The flags that may change between a run and its continuation: they alter neither the mathematics nor the
# networks.
FREE = {"out", "resume", "device", "compile", "gradient_checkpointing", "micro_batch", "shard", "workers",
        "timeout", "log_every", "save_every", "sample_every"}


def bound_flags(config_class, *, but=()):
    """The names of the flags that a continued run must repeat: all but FREE and those named in `but`."""
    return {field.name for field in dataclasses.fields(config_class)} - FREE - set(but)


def allowed(limits):
    """The range of a flag in words, "" for a flag without one."""
    if limits["choices"]:
        return "one of " + ", ".join(str(choice) for choice in limits["choices"] if choice != "")
    words = dict(above="above", least="at least", below="below", most="at most")
    bounds = {name: limits[name] for name in words if limits[name] is not None}
    return " and ".join(f"{words[name]} {bound:g}" if abs(bound) < 2**53 else f"{words[name]} 2**63"
                        for name, bound in bounds.items())


def check_flag(name, value, limits):
    """Raises UserError if the value of the flag, or one of its several, is out of range."""
    within = dict(above=operator.gt, least=operator.ge, below=operator.lt, most=operator.le)
    for one in value if isinstance(value, tuple) else (value,):
        finite = not isinstance(one, float) or math.isfinite(one) or limits["infinite"] and math.isinf(one)
        inside = all(within[bound](one, limits[bound]) for bound in within if limits[bound] is not None)
        chosen = not limits["choices"] or one in limits["choices"]
        if not (finite and inside and chosen):
            words = [allowed(limits), "" if finite else "finite"]
            raise UserError(f"--{name.replace('_', '-')} {one}: must be {' and '.join(filter(None, words))}")


def parse_config(config_class, presets, argv, description, preset_of=None, commands=()):
    """argv -> config_class: every field is a flag (image_size: --image-size), a preset gives the defaults.

    --preset defaults to preset_of(the flags given), else to its own default; --help shows the defaults of the
    preset that the other flags choose, and the other `commands` of the script. Raises UserError on an unknown
    preset or a value out of its range; argparse itself ends with exit code 2 on an unknown flag.
    """
    fields = dataclasses.fields(config_class)

    def parser(defaults, **more):
        # Absent flags stay out of the namespace, so that they can fall back to the preset.
        parser = argparse.ArgumentParser(description=description, allow_abbrev=False, **more)
        groups = {}
        for field in fields:
            group = field.metadata["group"]
            if group not in groups:
                groups[group] = parser.add_argument_group(group)
            kind = dict(type=field.type)
            if field.type is tuple:
                kind = dict(type=type(field.default[0]), nargs="+")
            elif field.type is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            default = defaults.get(field.name, field.default)
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            limit = allowed(field.metadata)
            text = f"{field.metadata['help']} [{shown if shown != '' else 'empty'}{limit and f'; {limit}'}]"
            groups[group].add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                                       help=text.replace("%", "%%"), **kind)
        return parser

    given = vars(parser({}, add_help=False).parse_known_args(argv)[0])
    usual = preset_of(given) if preset_of else config_class.preset
    preset = given.get("preset", usual)
    if preset not in presets:
        raise UserError(f"--preset {preset}: unknown; choose one of {', '.join(presets)}")
    defaults = presets[preset] | {"preset": preset}
    epilog = f"Defaults are those of --preset {preset}; presets: {', '.join(presets)}."
    if commands:
        epilog += f" Other commands, each with its own --help: {', '.join(commands)}."
    given = vars(parser(defaults, epilog=epilog).parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = config_class(**{**defaults, **given})
    for field in fields:
        check_flag(field.name, getattr(config, field.name), field.metadata)
    return config


def sample_flags(prog, out, nfe=(1,)):
    """The parser of a script's `sample` command; nfe: the allowed numbers of network calls, None: any."""
    parser = argparse.ArgumentParser(prog=f"{prog} sample", description="Pictures of a run as a grid.",
                                     allow_abbrev=False)
    parser.add_argument("--run", default=out, help="the run's folder")
    parser.add_argument("--prompts", nargs="+", help="prompts, in turn; default: the run's own")
    parser.add_argument("--num", type=int, default=64, help="number of pictures")
    parser.add_argument("--nfe", type=int, default=1, choices=nfe, help="network calls a picture")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--grid", default="grid.png", help="the PNG to write")
    return parser


def check_sample_flags(args):
    """Raises UserError if a number among the flags of `sample` is out of range."""
    for name, least in (("num", 1), ("nfe", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")


def run_command(main):
    """Calls main(argv); a UserError ends in exit code 2 and a line on stderr, one from all of a machine."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def read_config(config_class, path):
    """The configuration that a run wrote. Raises UserError if it is missing, damaged or another script's."""
    try:
        saved = json.loads(Path(path).read_text())
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the configuration of a run of this script ({error})")
