"""Flags: their ranges, presets and --help, the configuration read back, and errors in one line."""

import argparse
import dataclasses
import json
import math
import os
import runpy
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import pretrain
import pytest
import torch
import torchvision
from helpers import TINY, fails, ranks
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import diff_instruct_star
import plumbing.cli
import swiftbrush_v2
import yoso
from common import UserError
from plumbing.cli import (
    RunFlags,
    bound_flags,
    check_writable,
    flag,
    parse_config,
    read_config,
    read_metrics,
)
from plumbing.run import Run, start_processes
from plumbing.students import CONVERTED_BY

SCRIPTS = [yoso, swiftbrush_v2, diff_instruct_star]


@dataclass
class Flags(RunFlags):
    preset: str = flag("plain", "the defaults", "data")
    rate: float = flag(1.0, "50 % of it", above=0)
    limit: float = flag(math.inf, "of the norm", above=0, infinite=True)
    free: float = flag(0.0, "any finite number")
    share: float = flag(0.5, "of all", least=0, below=1)
    widths: tuple = flag((8, 16), "of the layers", least=4, most=64)
    kind: str = flag("", "of noise", choices=("", "white", "pink"))
    flip: bool = flag(False, "the pictures")
    place: str = flag("here", "of it", needed=True)


PRESETS = {"plain": {}, "wide": dict(widths=(32,), rate=2.0, flip=True), "deep": dict(rate=3.0)}


def parse(*argv, **options):
    return parse_config(Flags, PRESETS, [str(word) for word in argv], "a test", **options)


# Ranges

@pytest.mark.parametrize("argv, words", [
    (["--rate", "0"], "--rate 0.0: must be above 0"),
    (["--rate", "nan"], "--rate nan: must be above 0 and finite"),
    (["--rate", "inf"], "--rate inf: must be above 0 and finite"),
    (["--limit", "nan"], "--limit nan: must be above 0"),
    (["--limit=-inf"], "--limit -inf: must be above 0"),
    (["--free", "nan"], "--free nan: must be finite"),
    (["--free=-inf"], "--free -inf: must be finite"),
    (["--share", "1"], "--share 1.0: must be at least 0 and below 1"),
    (["--share", "-0.1"], "--share -0.1: must be at least 0 and below 1"),
    (["--widths", "8", "3"], "--widths 3: must be at least 4 and at most 64"),
    (["--widths", "65", "8"], "--widths 65: must be at least 4 and at most 64"),
    (["--kind", "brown"], "--kind brown: must be one of white, pink"),
    (["--seed", "-1"], "--seed -1: must be at least 0 and below 2**63"),
    (["--seed", 2**63], "must be at least 0 and below 2**63"),
    (["--log-every", 2**31], "--log-every 2147483648: must be at least 1 and below 2**31"),
    (["--workers", 1001], "--workers 1001: must be at least 0 and at most 1000"),
    (["--place", ""], "--place '': must be given"),
    (["--preset", "huge"], "--preset huge: unknown; choose one of plain, wide, deep")])
def test_a_value_out_of_range(argv, words):
    with pytest.raises(UserError) as refused:
        parse(*argv)
    assert words in str(refused.value)


@pytest.mark.parametrize("name, value", [
    ("rate", 1e-9), ("limit", math.inf), ("free", -1e30), ("share", 0.0), ("widths", (4, 64)), ("kind", ""),
    ("seed", 2**63 - 1), ("log-every", 2**31 - 1), ("kind", "white"), ("place", " ")])
def test_the_ends_of_a_range_are_in_it(name, value):
    words = [f"--{name}", *value] if isinstance(value, tuple) else [f"--{name}={value}"]
    assert getattr(parse(*words), name.replace("-", "_")) == value


@pytest.mark.parametrize("script", [*SCRIPTS, pretrain], ids=lambda script: script.__name__)
def test_no_number_of_a_method_may_be_negative_infinite_or_nan(script):
    """-1, for integers what no machine has, for floats NaN and infinity, which only a limit takes."""
    checked = 0
    for field in dataclasses.fields(script.Config):
        kind = type(field.default[0]) if field.type is tuple else field.type
        if kind not in (int, float):
            continue
        infinity = [] if field.metadata["infinite"] else [math.inf]
        for value in [-1, 10**400] if kind is int else [-1.0, math.nan, -math.inf, *infinity]:
            values = (field.default[0], value) if field.type is tuple else value
            with pytest.raises(UserError, match=f"^--{field.name.replace('_', '-')} {value}: must be "):
                plumbing.cli.check_flag(field.name, values, field.metadata)
        checked += 1
    assert checked > (20 if script in SCRIPTS else 7)


@pytest.mark.parametrize("script, names", [
    (yoso, ["out"]), (swiftbrush_v2, ["out", "model", "dataset", "lora_targets"]),
    (diff_instruct_star, ["out", "model", "dataset", "lora_targets"]),
    (pretrain, ["out", "runs", "dataset"])],
    ids=lambda value: getattr(value, "__name__", ""))
def test_a_name_that_is_needed(script, names, monkeypatch, capsys):
    """An empty folder would be the present one."""
    for name in (name.replace("_", "-") for name in names):
        assert f"--{name} '': must be given" in fails(monkeypatch, capsys, script, f"--{name}=")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_preset_is_in_range(script):
    for preset, values in script.PRESETS.items():
        config = parse_config(script.Config, script.PRESETS, ["--preset", preset], "", script.preset_of)
        assert {name: getattr(config, name) for name in values} == values and config.preset == preset


# Presets and --help

@pytest.mark.parametrize("script, small", [
    (yoso, {"shapes", "small", "mini", "mini-epsilon", "mini-lora"}), (swiftbrush_v2, {"shapes"}),
    (diff_instruct_star, {"shapes"})], ids=lambda value: getattr(value, "__name__", ""))
def test_real_models_have_a_ramp_of_the_average(script, small):
    """The small presets' figures in the docs were measured without."""
    parsed = {preset: parse_config(script.Config, script.PRESETS, ["--preset", preset], "")
              for preset in script.PRESETS}
    assert {preset for preset, config in parsed.items() if not config.ema_ramp} == small < parsed.keys()


def test_flags_win_over_the_preset_which_wins_over_the_defaults():
    wide = parse("--preset", "wide", "--rate", 5, "--no-flip")
    assert (wide.widths, wide.rate, wide.flip, wide.share) == ((32,), 5.0, False, 0.5)
    assert parse("--preset", "wide").flip and parse().rate == 1.0


def test_the_given_flags_choose_the_preset():
    preset_of = lambda given: "deep" if given.get("share") == 0.25 else "wide"
    assert parse("--share", 0.25, preset_of=preset_of).rate == 3.0
    assert parse(preset_of=preset_of).preset == "wide"
    assert parse("--share", 0.25, "--preset", "plain", preset_of=preset_of).rate == 1.0


def help_of(capsys, monkeypatch, function, *arguments):
    """The text of a --help, a flag a line."""
    monkeypatch.setenv("COLUMNS", "1000")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_ranges_and_the_presets_values(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch, lambda: parse("--preset", "wide", "--help", commands=("sample",)))
    sections = {section.split(":\n")[0]: section for section in text.split("\n\n")}
    for group, name in (("run", "--seed"), ("data", "--preset"), ("method", "--rate")):
        assert [title for title in ("run", "data", "method") if f"  {name} " in sections[title]] == [group]
    for words in ("the defaults [wide]", "50 % of it [2.0; above 0]", "of the norm [inf; above 0]",
                  "any finite number [0.0]", "of all [0.5; at least 0 and below 1]",
                  "of the layers [32; at least 4 and at most 64]", "of noise [empty; one of white, pink]",
                  "--flip, --no-flip", "the pictures [True]",
                  "Defaults are those of --preset wide; presets: plain, wide, deep.",
                  "Other commands, each with its own --help: sample."):
        assert words in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_of_every_preset(script, capsys, monkeypatch):
    """Every flag stands there with the value that the preset gives it."""
    for preset, values in script.PRESETS.items():
        text = help_of(capsys, monkeypatch, script.main, ["--preset", preset, "--help"])
        assert script.__doc__.splitlines()[0] in text
        for field in dataclasses.fields(script.Config):
            value = (values | dict(preset=preset)).get(field.name, field.default)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            assert f"{field.metadata['help']} [{'empty' if shown == '' else shown}" in text, field.name


@pytest.mark.parametrize("argv, line", [
    (["--iteration", "3"], "unrecognized arguments: --iteration 3; see --help"),
    (["--rates", "1"], "unrecognized arguments: --rates 1; see --help"),
    (["--rate", "fast"], "--rate: invalid float value: 'fast'; see --help"),
    (["--seed", "1.5"], "--seed: invalid int value: '1.5'; see --help"),
    (["--widths"], "--widths: expected at least one argument; see --help")])
def test_wrong_words_are_one_line(argv, line):
    """Abbreviations too, which would change their meaning with the next flag."""
    with pytest.raises(UserError) as refused:
        parse(*argv)
    assert str(refused.value) == line


# Configurations

def test_a_configuration_is_read_back(tmp_path):
    config, path = parse("--widths", 4, 8, "--limit", "inf"), tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert read_config(Flags, path) == config and read_config(Flags, path).widths == (4, 8)
    for text in (json.dumps(dict(other=1)), "[1]", '{"rate": 1'):
        path.write_text(text)
        with pytest.raises(UserError, match="not the configuration of a run of this script"):
            read_config(Flags, path)
    with pytest.raises(UserError, match="absent.json: not the configuration"):
        read_config(Flags, tmp_path / "absent.json")


@pytest.mark.parametrize("changed, words", [
    (dict(rate="fast"), "--rate fast: must be of the type float"), (dict(flip=1), "--flip 1: must be of the"),
    (dict(widths=8), "--widths 8: must be of the type tuple"), (dict(rate=0), "--rate 0: must be above 0"),
    (dict(widths=[8, "x"]), "not supported between")])
def test_a_configuration_of_other_values(changed, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(parse()) | changed))
    with pytest.raises(UserError, match=f"not the configuration of a run of this script .*{words}"):
        read_config(Flags, path)


@pytest.mark.parametrize("text, words", [
    (None, "cannot be read .No such file"), ("", "empty, it names no iteration"),
    ('{"iteration": 1}\nno line\n{"x": 1}', "damaged, a line names no iteration"),
    ('{"iteration": 1}\n{broken}', "cannot be read .Expecting"), ('["iteration", {}]', "empty"),
    ('{"iteration": ' + 10**5 * '{"a": ' + '}', "cannot be read")], ids=range(6))
def test_a_damaged_log(text, words, tmp_path):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"metrics.jsonl: {words}"):
        read_metrics(tmp_path)


def test_the_log_of_a_run_that_was_killed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "L_D": 2.0}\n{"iteration": 2, "L_')
    assert read_metrics(tmp_path) == [dict(iteration=1, L_D=2.0)]


# Files to be written

@pytest.mark.parametrize("name, suffix, deep, reason", [
    ("absent/x", "", False, "No such file or directory"), ("folder", "", True, "it is no file"),
    ("file/x", "", True, "Not a directory"), ("/proc/x", "", True, "No such file"),
    ("", "", False, "it is no file"), ("x.bmp", ".png", False, "it must end in .png"),
    (f"{300 * 'x'}.png", ".png", False, "File name too long"),
    ("file", "", False, ""), ("new", "", False, ""), ("absent/below/x.PNG", ".png", True, "")])
def test_what_can_be_written(name, suffix, deep, reason, tmp_path, monkeypatch):
    """Nothing is made or changed by asking."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    if reason:
        with pytest.raises(UserError, match=f"^--x {name or repr(name)}: cannot be written .{reason}"):
            check_writable(name, "--x", suffix, deep)
    else:
        check_writable(name, "--x", suffix, deep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_continued_run_repeats_the_flags_that_make_its_result():
    own = {"preset", "rate", "limit", "free", "share", "widths", "kind", "flip", "place"}
    shared = {"precision", "cache_latents", "lr_warmup", "lora_init"}
    assert bound_flags(Flags) == own | shared | {"seed"}
    assert bound_flags(Flags, but=("rate", "seed")) == own - {"rate"} | shared
    # A conversion and an adaptation keep their rates.
    assert "lr_warmup" not in CONVERTED_BY | yoso.ADAPTED_BY
    assert all("lr_warmup" in swiftbrush_v2.BOUND[stage] for stage in "ab")


# Errors in one line

def told(monkeypatch, capsys, error):
    """(exit code, stderr) of a command that raises the error."""
    def main(argv):
        raise error
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as stopped:
        plumbing.cli.run_command(main)
    return stopped.value.code, capsys.readouterr().err


def test_out_of_memory_says_what_to_lower(monkeypatch, capsys):
    """Those that cost least come first; a run that has given them all is told so. One line, exit code 2."""
    error, least = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), [
        "--micro-batch", "1", "--gradient-checkpointing", "--shard", "--cache-latents", "--precision", "bf16"]
    lines = []
    for world, flags in ((1, []), (2, ["--micro-batch", "4", "--precision", "tf32"]), (2, least)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        flags = ["--model", "x", "--dataset", "y", "--batch-size", "24", "--preset", "mini-epsilon", *flags]
        parse_config(yoso.Config, yoso.PRESETS, flags, "")
        code, text = told(monkeypatch, capsys, error)
        assert code == 2 and text.count("\n") == 1 and "2.00 GiB" in text and "what is saved is kept" in text
        lines.append(text.split("); ")[1])
    one, two, all_given = lines
    assert one.startswith("give --micro-batch 12, 24 samples are handled at once now; or --gradient-checkpo"
                          "inting; or with another --out, --cache-latents or --precision bf16; ")
    assert two.startswith("give --micro-batch 2, 4 samples") and "; or --shard; or with another --out" in two
    assert "forecast.py --processes 2 script.py with its flags" in two
    assert all_given.startswith("it takes a GPU with more memory; ")


@pytest.mark.parametrize("batch, micro, fewer", [(24, 0, 12), (24, 12, 4), (12, 0, 4), (8, 4, 0)])
def test_the_advice_can_be_followed(monkeypatch, capsys, batch, micro, fewer):
    """A micro-batch that the run takes: from scratch D compares samples in groups of four."""
    flags = [*TINY, "--batch-size", str(batch), "--micro-batch", str(micro)]
    config = parse_config(yoso.Config, yoso.PRESETS, flags, "")
    code, text = told(monkeypatch, capsys, MemoryError())
    assert f"give --micro-batch {fewer}," in text if fewer else "--micro-batch" not in text
    Run(dataclasses.replace(config, micro_batch=fewer))


def test_what_a_continuation_must_repeat_is_advised_with_another_folder(monkeypatch, capsys):
    parse_config(yoso.Config, yoso.PRESETS, ["--model", "x", "--dataset", "y"], "")
    advice = told(monkeypatch, capsys, MemoryError())[1].split("); ")[1].split("; what is saved")[0]
    free = advice.split("with another --out")[0]
    assert not [name for name in bound_flags(yoso.Config) if f"--{name.replace('_', '-')}" in free]


def test_an_error_is_one_line(monkeypatch, capsys):
    """Of an error in a process that reads pictures, which comes with its traceback, the message."""
    monkeypatch.setattr(plumbing.cli, "parsed", [])
    plain = UserError("--lr 0: must be above 0")
    loader = DataLoader(Unreadable(), num_workers=1)
    with pytest.raises(UserError) as read:
        next(iter(loader))
    assert "Traceback" in str(read.value)
    with pytest.raises(RuntimeError) as large:
        torch.empty(2**60)
    for error, line in ((plain, plain), (read.value, "--dataset x: none can be read"),
                        (UserError("--out x: no\nroom"), "--out x: no room")):
        assert told(monkeypatch, capsys, error) == (2, f"script.py: {line}\n")
    for error in (large.value, MemoryError()):
        code, text = told(monkeypatch, capsys, error)
        assert code == 2 and text.startswith("script.py: out of memory (") and text.count("\n") == 1
        assert "lower --num or --batch-size" in text
    for error, line in ((OSError("no model"), "no model"), (OSError(28, "no room"), "the output: no room"),
                        (OSError(28, "no room", "x.png"), "x.png: no room")):
        assert told(monkeypatch, capsys, error) == (2, f"script.py: {line}\n")
    assert told(monkeypatch, capsys, KeyboardInterrupt()) == (130, "script.py: stopped by Ctrl-C\n")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        told(monkeypatch, capsys, RuntimeError("a fault of ours"))
    bar = tqdm(total=3)
    code, text = told(monkeypatch, capsys, plain)
    assert text.replace("\r", "\n").splitlines()[-1] == f"script.py: {plain}" and bar.disable


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("--dataset x: none can be read")


def test_processes_without_a_group(monkeypatch, capsys):
    """Under torchrun the first to fail tells the error, whichever it is; else the first of its machine."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = dict(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port)
    for environment, telling in (({}, "0"), (torchrun, "3")):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        for rank in ("3", "0"):
            monkeypatch.setenv("LOCAL_RANK", rank)
            line = "script.py: no GPU\n" if rank == telling else ""
            assert told(monkeypatch, capsys, UserError("no GPU")) == (2, line)


def fail_in_group(folder, failing):
    """Of one of the processes of a group: those of these ranks fail, and the others live on meanwhile."""
    rank, told = int(os.environ["RANK"]), folder / f"told-{min(failing)}"
    sys.argv, sys.stderr = ["script.py"], open(folder / f"told-{rank}", "w")

    def main(argv):
        start_processes(torch.device("cpu"))
        if rank in failing:
            raise UserError("--out x: full")
        while not told.stat().st_size:
            time.sleep(0.1)

    with suppress(SystemExit):
        plumbing.cli.run_command(main)
    sys.stderr.close()


@pytest.mark.parametrize("failing", [(0, 1), (1,)])
def test_one_process_of_a_group_tells_the_error(failing, tmp_path):
    """Whichever it is; the same error of another is not told again."""
    ranks(2, fail_in_group, tmp_path, failing)
    assert "".join(file.read_text() for file in tmp_path.iterdir()) == "script.py: --out x: full\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_file_is_the_command(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__file__, "--lr", "0"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script.__file__, run_name="__main__")
    line = f"{script.__name__}.py: --lr 0.0: must be above 0\n"
    assert stopped.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "imagenet"], "--dataset imagenet: unknown; choose shapes"),
    (["--preset", "huge"], "--preset huge: unknown"),
    (["--adversary", "none"], "--adversary none: must be one of self, data, ufogen"),
    (["--rec-distance", "l1"], "--rec-distance l1: must be one of lpips, l2, latent"),
    (["--precision", "fp16"], "--precision fp16: must be one of fp32, tf32, bf16"),
    (["--device", "quantum"], "--device quantum: cannot be used"),
    (["--batch-size", "8", "--micro-batch", "3"], "--micro-batch 3: must be at least 4"),
    (["--batch-size", "6"], "--batch-size 6: gives each process 6 samples, which must be a multiple of 4"),
    (["--image-size", "20", "--channels", "8", "8", "8", "8"], "--image-size 20: must be a multiple of 8"),
    (["--channels", "7"], "--channels 7: must be at least 8"),
    (["--channels", "8", "--attention"], "--attention True: must be off"),
    (["--levels", "0"], "--levels 0: must be at least 1"),
    (["--r1-every", "0"], "--r1-every 0: must be at least 1"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--iterations", "0"], "--iterations 0: must be at least 1"),
    (["--lr", "nan"], "--lr nan: must be above 0"),
    (["--resume", "absent"], "--resume absent: there is no checkpoint"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_wrong_flags(tmp_path, monkeypatch, capsys, flags, words):
    assert words in fails(monkeypatch, capsys, yoso, *TINY, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_wrong_flags_of_sample(script, tmp_path, monkeypatch, capsys):
    for name, value, words in (
            ("--num", 0, "must be at least 1"), ("--num", 10**9, "must be at least 1 and at most 100000"),
            ("--seed", -1, "must be at least 0"), ("--seed", 2**64, "must be at least 0 and below 2**63"),
            ("--grid", tmp_path, "cannot be written (it is no file)"),
            ("--grid", "x.gif", "cannot be written (it must end in .png)"),
            ("--grid", "/proc/x.png", "cannot be written (No such file")):
        error = fails(monkeypatch, capsys, script, "sample", "--run", tmp_path, name, value)
        assert f"{name} {value}: {words}" in error
    assert "--run '': must be given" in fails(monkeypatch, capsys, script, "sample", "--run", "")
    assert "--nfe" in fails(monkeypatch, capsys, script, "sample", "--run", tmp_path, "--nfe", 0)
    assert str(tmp_path) in fails(monkeypatch, capsys, script, "sample", "--run", tmp_path), "an empty folder"


@pytest.mark.parametrize("flags, words", [
    (["--alpha", "nan"], "--alpha nan: must be finite"), (["--beta=-inf"], "--beta -inf: must be finite"),
    (["--out", "file/x"], "--out file/x: cannot be written"), (["--out", ""], "exists already"),
    (["--tuned"], "--tuned: expected one argument")])
def test_wrong_flags_of_merge(flags, words, tmp_path, monkeypatch, capsys):
    """Before any of the three pipelines is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    names = ["--base", "no", "--high", "no", "--tuned", "no", "--out", "new"]
    assert words in fails(monkeypatch, capsys, yoso, "merge", *names, *flags)
    assert "--base" in fails(monkeypatch, capsys, yoso, "merge"), "required"


def test_a_batch_that_the_processes_cannot_share(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    error = fails(monkeypatch, capsys, yoso, *TINY, "--out", tmp_path / "run")
    assert "--batch-size 8: the global batch is not divisible by 3 processes" in error


def test_out_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    error = fails(monkeypatch, capsys, yoso, *TINY, "--out", tmp_path / "file" / "run")
    assert f"--out {tmp_path / 'file' / 'run'}: cannot be written (Not a directory)" in error
    assert (tmp_path / "file").read_text() == "in the way"


def test_lpips_without_a_network(tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    error = fails(monkeypatch, capsys, yoso, *TINY, "--out", tmp_path / "run", "--rec-distance", "lpips")
    assert "choose the distance l2" in error


def test_prompts_that_are_no_text_are_refused(tmp_path):
    args = argparse.Namespace(run=tmp_path, num=1, nfe=1, seed=0, grid=str(tmp_path / "grid.png"),
                              save="", prompts=["a circle", "a \udcff circle"])
    with pytest.raises(UserError, match=r"--prompts 'a \\udcff circle': "):
        plumbing.cli.check_sample_flags(args)
    args.prompts.pop()
    plumbing.cli.check_sample_flags(args)
    args.run = tmp_path / "absent"
    with pytest.raises(UserError, match="--run .*absent: there is no such folder; train first"):
        plumbing.cli.check_sample_flags(args)
