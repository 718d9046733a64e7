"""Flags from a dataclass, their ranges, what a run wrote read back, and errors in one line."""

import argparse
import dataclasses
import json
import math
import operator
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from common import UserError, one_line
from plumbing.data import check_text
from plumbing.files import silent_ranks, want_of_a_process

SEED = dict(least=0, below=2**63)
parsed = []  # the configurations of this process's command lines, for the advice of less_memory


def flag(default, help, group="method", choices=None, above=None, least=None, below=None, most=None,
         infinite=False, needed=False):
    """A dataclass field whose help text is also its comment in the source, and whose range stands beside it.

    The value, or each of several, must be one of `choices`, > above, >= least, < below, <= most, and not
    empty if it is `needed`. NaN never passes, infinity only with `infinite`, and an integer that has no upper
    end must be below 2**31.
    """
    limits = dict(choices=choices, above=above, least=least, below=below, most=most, infinite=infinite,
                  needed=needed)
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, **limits))


@dataclass
class RunFlags:
    """The flags that every method has. Each field is a flag, and its text the --help."""
    micro_multiple = 1  # no flag: the samples that are handled at once must be a multiple of it

    out: str = flag("", "the run's folder; the same command again resumes what lies there", "run")
    resume: str = flag("", "folder of another run of the same configuration, to continue from its "
                       "checkpoints", "run")
    seed: int = flag(0, "of weights, order of the data, and noise", "run", **SEED)
    device: str = flag("auto", "auto, cpu, cuda or mps", "run")
    precision: str = flag("fp32", "of the networks: fp32 throughout; tf32, products of rounded factors on "
                          "GPUs; bf16, by autocast; trained weights and losses stay fp32", "run",
                          choices=("fp32", "tf32", "bf16"))
    compile: bool = flag(False, "torch.compile the networks, where no adapter is switched and no R1 "
                         "differentiates twice", "run")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, "
                                        "more time", "run")
    micro_batch: int = flag(0, "samples a process handles at once, 0: all; fewer if so many do not divide "
                            "its batch; changes memory, not the result", "run", least=0)
    shard: bool = flag(False, "FSDP2: every process keeps its part of weights, gradients, moments and "
                       "averages", "run")
    cache_latents: bool = flag(False, "encode pictures and captions once, float16, to OUT/cache; the text "
                               "encoders leave the device", "run")
    workers: int = flag(0, "processes that read pictures, where a run trains on any", "run", least=0,
                        most=1000)
    timeout: int = flag(45, "seconds that a process waits for the others within a step, before it names the "
                        "missing one and ends", "run", least=1)
    track: str = flag("", "also write the log for this tracker into OUT (pip install tensorboard)", "run",
                      choices=("", "tensorboard"))
    lr_warmup: int = flag(0, "iterations over which a network's learning rate rises linearly, from its first "
                          "update on, 0: none; not in a conversion or adaptation; DMD2: 500", least=0)
    lora_init: str = flag("default", "start of a LoRA's A: default, peft's and that of the authors' scripts; "
                          "gaussian, with a standard deviation of 1 / rank", choices=("default", "gaussian"))
    log_every: int = flag(50, "iterations between lines of metrics.jsonl", "run", least=1)
    save_every: int = flag(500, "iterations between checkpoints", "run", least=1)
    sample_every: int = flag(500, "iterations between grids in samples/", "run", least=1)


# The flags that may change between a run and its continuation: they alter neither the mathematics nor the
# networks.
FREE = {"out", "resume", "device", "compile", "gradient_checkpointing", "micro_batch", "shard", "workers",
        "timeout", "track", "log_every", "save_every", "sample_every"}


def bound_flags(config_class, *, but=()):
    """The names of the flags that a continued run must repeat: all but FREE and those named in `but`."""
    return {field.name for field in dataclasses.fields(config_class)} - FREE - set(but)


def allowed(limits):
    """The range of a flag in words, "" for a flag without one."""
    if limits.get("choices"):
        return "one of " + ", ".join(str(choice) for choice in limits["choices"] if choice != "")
    words = dict(above="above", least="at least", below="below", most="at most")
    bounds = {name: limits[name] for name in words if limits.get(name) is not None}
    return " and ".join(f"{words[name]} {bound if abs(bound) < 2**53 else '2**63'}"
                        for name, bound in bounds.items())


def check_flag(name, value, limits):
    """Raises UserError if the value of the flag, or one of its several, is not as `flag` says of limits."""
    within = dict(above=operator.gt, least=operator.ge, below=operator.lt, most=operator.le)
    bounds = {bound: limits[bound] for bound in within if limits.get(bound) is not None}
    for one in value if isinstance(value, tuple | list) else (value,):
        finite = not isinstance(one, float) or math.isfinite(one)
        finite = finite or limits.get("infinite") and math.isinf(one)
        small = not isinstance(one, int) or one < 2**31 or bounds.keys() & {"below", "most"}
        inside = all(within[bound](one, limit) for bound, limit in bounds.items())
        chosen = not limits.get("choices") or one in limits["choices"]
        given = one != "" or not limits.get("needed")
        if not (finite and small and inside and chosen and given):
            words = [allowed(limits), "" if finite else "finite", "" if small else "below 2**31",
                     "" if given else "given"]
            raise UserError(f"--{name.replace('_', '-')} {one if given else repr(one)}: must be "
                            f"{' and '.join(filter(None, words))}")


def check_flags(args, **limits):
    """check_flag for flags of an argparse namespace: name -> dict of limits; None, not given, is allowed."""
    for name, limit in limits.items():
        if getattr(args, name) is not None:
            check_flag(name, getattr(args, name), limit)


def check_writable(path, flag, suffix="", deep=False):
    """Raises UserError if no file of this name can be written; one that is there stays as it is.

    suffix: in which the name must end. deep: the folders above will be made.
    """
    place, reason = Path(path), ""
    try:
        folder = place.parent
        while deep and not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
        if place.is_file():
            with open(place, "a"):
                pass
        elif place.exists():
            reason = "it is no file"
    except OSError as error:
        reason = error.strerror
    if not reason and not place.name.lower().endswith(suffix):
        reason = f"it must end in {suffix}"
    if reason:
        raise UserError(f"{flag} {path or repr(path)}: cannot be written ({reason}); choose another")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, one line each, and which takes no abbreviations."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        """Called on wrong flags."""
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def parse_config(config_class, presets, argv, description, preset_of=None, commands=()):
    """argv -> config_class: every field is a flag (image_size: --image-size), a preset gives the defaults.

    --preset defaults to preset_of(the flags given), else to its own default; --help shows the defaults of the
    preset that the other flags choose, and the other `commands` of the script. Raises UserError on an unknown
    flag or preset, and on a value out of its range.
    """
    fields = dataclasses.fields(config_class)

    def parser(defaults, **more):
        # Absent flags stay out of the namespace, so that they can fall back to the preset.
        parser = Parser(description=description, **more)
        groups = {name: parser.add_argument_group(name) for name in ("run", "data", "method")}
        for field in fields:
            kind = dict(type=field.type)
            if field.type is tuple:
                kind = dict(type=type(field.default[0]), nargs="+")
            elif field.type is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            default = defaults.get(field.name, field.default)
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            limit = allowed(field.metadata)
            text = f"{field.metadata['help']} [{shown if shown != '' else 'empty'}{limit and f'; {limit}'}]"
            groups[field.metadata["group"]].add_argument(
                "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
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
    parsed.append(config)
    return config


def sample_flags(prog, out, nfe=(1,)):
    """The parser of a script's `sample` command; nfe: the allowed numbers of network calls, None: any."""
    parser = Parser(prog=f"{prog} sample", description="Pictures of a run as a grid.")
    parser.add_argument("--run", default=out, help="the run's folder [%(default)s]")
    parser.add_argument("--prompts", nargs="+", help="prompts, in turn; default: the run's own")
    parser.add_argument("--num", type=int, default=64, help="number of pictures [%(default)s]")
    parser.add_argument("--nfe", type=int, default=1, choices=nfe,
                        help="network calls a picture [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    parser.add_argument("--grid", default="grid.png", help="the PNG to write [%(default)s]")
    parser.add_argument("--save", default="", help="a new folder for single pictures, with their captions")
    return parser


def check_sample_flags(args):
    """Raises UserError if a flag of `sample` is out of range, no text, or --grid cannot be written."""
    check_flags(args, run=dict(needed=True), num=dict(least=1, most=100_000), nfe=dict(least=1), seed=SEED)
    check_writable(args.grid, "--grid", ".png", deep=True)
    if args.save and Path(args.save).exists():
        raise UserError(f"--save {args.save}: exists already; choose a new folder")
    if args.save:
        check_writable(args.save, "--save", deep=True)
    texts = [("prompts", text) for text in args.prompts or ()] + [("negative", getattr(args, "negative", ""))]
    for name, text in texts:
        try:
            check_text(text)
        except ValueError as error:
            raise UserError(f"--{name} {ascii(text)}: {one_line(error)}")
    if not Path(args.run).is_dir():
        raise UserError(f"--run {args.run}: there is no such folder; train first, or give another --run")


def run_command(main):
    """Calls main(argv); a UserError ends in exit code 2 and a line on stderr, one from all of a machine."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        # One from a process that reads pictures comes with its traceback, whose end it is.
        tell(str(error).rsplit("common.UserError: ", 1)[-1])
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # whoever reads the output has had enough
            sys.stdout = None
        place = error.filename or "the output"
        tell(f"{place}: {error.strerror}" if error.strerror else one_line(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if want_of_a_process(error):
            tell(f"rank {silent_ranks()}: has ended, or does not answer; "
                 "the same command goes on from what is saved")
            sys.exit(2)
        # torch has a class of its own for the memory of accelerators alone.
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        tell(f"out of memory ({one_line(error) or 'of this machine'}); {less_memory(sys.argv)}")
        sys.exit(2)
    except KeyboardInterrupt:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def samples_at_once(config, local, most):
    """The largest divisor of a process's `local` samples that is at most so many; 0: there is none."""
    return next((n for n in range(min(most, local), 0, -1)
                 if local % n == 0 and n % config.micro_multiple == 0), 0)


def less_memory(argv):
    """What to do about a command line that ran out of memory, in the order in which it costs least."""
    if not parsed or not hasattr(parsed[-1], "batch_size"):
        return "lower --num or --batch-size, or what else is large"
    config, world = parsed[-1], int(os.environ.get("WORLD_SIZE", 1))
    local = config.batch_size // world
    at_once = samples_at_once(config, local, config.micro_batch or local)
    fewer = samples_at_once(config, local, at_once // 2)
    remedies = [f"give --micro-batch {fewer}, {at_once} samples are handled at once now"] * (fewer > 0)
    remedies += ["--gradient-checkpointing"] * (not config.gradient_checkpointing)
    remedies += ["--shard"] * (world > 1 and not config.shard)
    bound = ["--cache-latents"] * (not config.cache_latents and bool(getattr(config, "model", "")))
    bound += ["--precision bf16"] * (config.precision != "bf16")
    remedies += [f"with another --out, {' or '.join(bound)}"] * bool(bound)
    processes = f"--processes {world} " * (world > 1)
    return (f"{'; or '.join(remedies) or 'it takes a GPU with more memory'}; what is saved is kept, and what "
            f"a run takes is told by python tools/forecast.py {processes}{Path(argv[0]).name} with its flags")


def tell(text):
    """Prints an error on stderr as one line, unless another process of this machine has printed the same."""
    line, here = " ".join(text.splitlines()), os.environ
    first = int(here.get("LOCAL_RANK", 0)) == 0
    try:
        store = None
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        elif "TORCHELASTIC_USE_AGENT_STORE" in here:  # torchrun's, before there is a group
            seconds, port = timedelta(seconds=10), int(here["MASTER_PORT"])
            store = dist.TCPStore(here["MASTER_ADDR"], port, is_master=False, timeout=seconds)
        if store:
            first = store.add(f"{here.get('GROUP_RANK')} {ascii(line)}", 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        pass
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # or the line would stand behind it
    if first:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def read_config(config_class, path):
    """The configuration that a run wrote. Raises UserError if it is missing, damaged or another script's."""
    try:
        saved = json.loads(Path(path).read_text())
        config = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if not isinstance(value, (int, float) if field.type is float else field.type):
                raise TypeError(f"--{field.name.replace('_', '-')} {value}: must be of the type "
                                f"{field.type.__name__}")
            check_flag(field.name, value, field.metadata)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"{path}: not the configuration of a run of this script ({error})")
    return config


def read_json(path):
    """The JSON object of a file. Raises UserError if it is missing or damaged."""
    return _objects(path, lambda text: [text])[0]


def read_metrics(run):
    """The lines of a run's metrics.jsonl as dicts; one that was cut short by a kill is left out.

    Raises UserError if there is none, or the log is damaged.
    """
    log = Path(run) / "metrics.jsonl"
    rows = _objects(log, lambda text: [line for line in text.splitlines() if line.endswith("}")])
    if not rows or not all("iteration" in row for row in rows):
        raise UserError(f"{log}: {'damaged, a line' if rows else 'empty, it'} names no iteration")
    return rows


def _objects(path, split):
    try:
        found = [json.loads(text) for text in split(Path(path).read_text())]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', '') or error})")
    if not all(isinstance(one, dict) for one in found):
        raise UserError(f"{path}: damaged, it is no JSON object")
    return found
