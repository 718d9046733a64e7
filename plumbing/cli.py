"""Flags from a dataclass, their checks, and errors in one line."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from common import UserError


def flag(default, help):
    """A dataclass field whose help text is also its comment in the source."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_config(config_class, presets, argv, description, preset_of=None):
    """argv -> config_class: every field is a flag (image_size -> --image-size), presets[--preset] gives the defaults.

    --preset defaults to preset_of(the flags given), else to the value of --dataset where a preset has that name, else to its own.
    Raises UserError on an unknown preset; argparse itself ends with exit code 2 on an unknown flag.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for field in dataclasses.fields(config_class):
        kind = dict(type=field.type)
        if field.type is tuple:
            kind = dict(type=type(field.default[0]), nargs="+")
        elif field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        # SUPPRESS keeps absent flags out of the namespace, so that they can fall back to the preset.
        text = f"{field.metadata['help'].replace('%', '%%')} (if no preset says otherwise: {field.default})"
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    dataset = given.get("dataset", config_class.dataset)
    usual = preset_of(given) if preset_of else dataset if dataset in presets else config_class.preset
    preset = given.get("preset", usual)
    if preset not in presets:
        raise UserError(f"--preset {preset}: unknown; choose one of {', '.join(presets)}")
    return config_class(**{**presets[preset], **given, "preset": preset})


def run_command(main):
    """Calls main(argv); a UserError becomes one line on stderr (from one process a machine) and exit code 2."""
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
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(Path(path).read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the configuration of a run of this script ({error})")
