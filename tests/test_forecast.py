"""What tools/forecast.py says that a training will take, against what it takes."""

import re
import subprocess
import sys

import forecast
import pytest
import tiny
import torch
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

import yoso
from common import UserError
from plumbing.cli import parse_config

SLOW = pytest.mark.slow
SCRATCH = "yoso --preset shapes --channels 8 16 --batch-size 8"
CONFIGS = [
    pytest.param(SCRATCH, marks=SLOW),
    f"{SCRATCH} --precision bf16",
    f"{SCRATCH} --micro-batch 4 --gradient-checkpointing",
    pytest.param("yoso --preset mini-epsilon --batch-size 4", marks=SLOW),
    "yoso --preset mini-epsilon --batch-size 4 --rank 8 --gradient-checkpointing",
    pytest.param("yoso --preset mini-epsilon --batch-size 4 --precision bf16", marks=SLOW),
    pytest.param("swiftbrush_v2 --batch-size 4 --stage a", marks=SLOW),
    "swiftbrush_v2 --batch-size 4 --stage a --precision bf16 --gradient-checkpointing",
    pytest.param("swiftbrush_v2 --batch-size 4 --stage b --micro-batch 2", marks=SLOW),
    pytest.param("diff_instruct_star --batch-size 4", marks=SLOW),
    "diff_instruct_star --batch-size 4 --assistant lora --precision bf16",
    "diff_instruct_star --batch-size 4 --divergence kl --gradient-checkpointing",
]
COMMAND = SCRATCH.replace("yoso", "yoso.py", 1).split()
SHARDED = [
    "yoso --preset mini-epsilon --batch-size 4 --rank 4 --micro-batch 2",
    pytest.param("swiftbrush_v2 --batch-size 4 --stage a --rank 4", marks=SLOW),
    pytest.param("swiftbrush_v2 --batch-size 4 --stage b --rank 4 --rank-b 4", marks=SLOW),
    pytest.param("diff_instruct_star --batch-size 4 --gradient-checkpointing", marks=SLOW),
    pytest.param("diff_instruct_star --batch-size 4 --assistant lora --rank 4", marks=SLOW),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tiny.sd().save_pretrained(path := tmp_path_factory.mktemp("model") / "sd")
    return path


def training_of(line, model, folder):
    """(script, configuration) of a line of flags; every run but one from scratch gets the model."""
    name, *argv = line.split()
    if line.startswith("yoso"):
        argv += [] if line.startswith(SCRATCH) else ["--model", str(model)]
    else:
        argv += ["--model", str(model), "--preset", "shapes"]
    script = forecast.SCRIPTS[f"{name}.py"]
    config = parse_config(script.Config, script.PRESETS, [*argv, "--device", "cpu", "--out", str(folder)], "")
    return script, forecast.trainings_of(script, config)[0][1]


def peak_of_steps(device, step, iteration):
    """Bytes of all tensors that two real steps hold at their most, those that are there already included."""
    counter = forecast.TensorCounter()
    for tensor in forecast.tensors_on(device):
        counter.memory.count(tensor)
    with torch.compiler.set_stance("force_eager"), counter:
        for _ in range(2):
            step(iteration)
    return counter.memory.peak


@pytest.mark.parametrize("line", CONFIGS)
def test_the_forecast_holds(line, model, tmp_path):
    """Memory as two real steps hold it, FLOPs as torch counts them; the forecast itself changes nothing."""
    script, config = training_of(line, model, tmp_path)
    run, networks, optimizers, step, iterations = forecast.step_of(script, config)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    before, iteration = [p.detach().clone() for p in trained], max(iterations)
    cost = forecast.cost_of_step(run, networks, optimizers, step, {iteration: 1.0})
    assert all(torch.equal(b, p) and p.grad is None and p.requires_grad for b, p in zip(before, trained))
    assert not any(o.state for o in optimizers) and cost["trained"] == sum(p.numel() for p in trained)
    truth = peak_of_steps(run.device, step, iteration)
    assert cost["memory_GB"] * 2**30 == pytest.approx(truth, rel=0.02)
    # torch's counter cannot follow autograd.grad.
    if script.__name__ != "diff_instruct_star" and "checkpointing" not in line:
        with FlopCounterMode(display=False) as flops:
            step(iteration)
        assert cost["TFLOP"] == pytest.approx(flops.get_total_flops() / 1e12, rel=1e-6)


@pytest.mark.parametrize("line", SHARDED)
def test_the_forecast_of_shards(line, model, tmp_path):
    """Memory as FSDP holds it in one of four processes, and the work of a process alone."""
    script, config = training_of(f"{line} --shard", model, tmp_path)
    whole = forecast.cost_of_step(*forecast.step_of(script, config))
    with forecast.processes_that_share(4):
        run, *_, step, iterations = forecast.step_of(script, config)
        truth = peak_of_steps(run.device, step, max(iterations))
        del run, _, step
        cost = forecast.cost_of_step(*forecast.step_of(script, config))
    memory = cost.pop("memory_GB")
    assert memory * 2**30 == pytest.approx(truth, rel=0.02)
    assert memory < whole.pop("memory_GB") and cost == whole


@pytest.mark.parametrize("line, calls, units", [
    (SCRATCH, dict(generator=[2, 1], discriminator=[2, 2]), [4, 5]),
    ("yoso --preset mini-epsilon --batch-size 4",
     dict(generator=[3, 1], discriminator=[2, 2], half=[2, 1]), [5, 5, 3]),
    ("yoso --preset mini-epsilon --batch-size 4 --generator {model}",
     dict(generator=[3, 1], discriminator=[2, 2], half=[2, 1], data_generator=[1, 0]), [5, 5, 3, 1]),
    ("swiftbrush_v2 --batch-size 4 --stage a",
     dict(teacher=[5, 1], lora_teacher=[5, 1], student=[1, 1]), [7, 7, 3]),
    ("diff_instruct_star --batch-size 4",
     dict(reference=[2, 2], assistant=[2, 2], student=[2, 1]), [4, 5, 4])])
def test_the_calls_of_a_step(line, calls, units, model, tmp_path):
    """A forward is one unit, a backward to the input one more, to the weights two more."""
    training = training_of(line.format(model=model), model, tmp_path)
    run, networks, optimizers, step, iterations = forecast.step_of(*training)
    if "swiftbrush" in line:
        assert networks["lora_teacher"] is networks["teacher"]
    cost = forecast.cost_of_step(run, networks, optimizers, step, {max(iterations): 1.0})
    assert cost["calls"] == calls and list(cost["units"].values()) == units


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny pipelines of every kind and a CLIPModel."""
    root = tmp_path_factory.mktemp("models")
    for name in ("sd", "sdxl", "pixart"):
        getattr(tiny, name)().save_pretrained(root / name)
    tiny.pixel(root / "pixel", classes=None)
    tiny.pixel(root / "classes")
    for part in tiny.clip():
        part.save_pretrained(root / "clip")
    return root


YOSO, SWIFTBRUSH, DIFF_INSTRUCT = (
    "yoso.py --preset mini-epsilon", "swiftbrush_v2.py --preset shapes --clip {root}/clip --decoder=",
    "diff_instruct_star.py --preset shapes --decoder= --probe= --reward {root}/clip")
PIXELS = "--preset cifar10 --guidance 1 --clip-weight 0"


@pytest.mark.parametrize("line", [
    f"{YOSO} --model {{root}}/sd --adapt --precision bf16 --gradient-checkpointing",
    f"{YOSO} --model {{root}}/sdxl --rank 4 --cache-latents",
    f"{YOSO} --model {{root}}/pixart --discriminator {{root}}/sd --dataset folder --cache-latents",
    f"{SWIFTBRUSH} --model {{root}}/sd --stage b --rank-b 4 --cache-latents",
    pytest.param(f"{SWIFTBRUSH} --model {{root}}/sdxl --stage a --gradient-checkpointing", marks=SLOW),
    f"{SWIFTBRUSH} --model {{root}}/pixart --stage a --regularise pairs --cache-latents",
    f"{SWIFTBRUSH} --model {{root}}/pixel --stage a {PIXELS}",
    f"{SWIFTBRUSH} --model {{root}}/classes --stage a {PIXELS}",
    pytest.param(f"{DIFF_INSTRUCT} --model {{root}}/sd --assistant lora --rank 4", marks=SLOW),
    f"{DIFF_INSTRUCT} --model {{root}}/sdxl --cache-latents --precision bf16",
    f"{DIFF_INSTRUCT} --model {{root}}/pixart --prediction epsilon --gradient-checkpointing"])
def test_every_kind_of_run_has_one(line, models, capsys):
    forecast.main([*line.format(root=models).split(), "--batch-size", "4", "--device", "cpu"])
    TFLOP, memory = (float(re.search(pattern, out).group(1)) for out in [capsys.readouterr().out]
                     for pattern in (r"; (\S+) TFLOP for 4 samples", r"about (\S+) GB"))
    assert TFLOP > 0 and memory > 0


def test_the_command(tmp_path):
    """The real command prints its forecast and leaves no file; R1's steps are averaged in."""
    command = [sys.executable, str(ROOT / "tools" / "forecast.py"), *COMMAND]
    command += ["--iterations", "100", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())
    assert "generator 2 (1), discriminator 2 (2)" in done.stdout and "100 steps: at least" in done.stdout
    TFLOP = float(re.search(r"(\S+) TFLOP for 8", done.stdout).group(1))
    _, config = training_of(SCRATCH, None, tmp_path)
    *parts, iterations = forecast.step_of(yoso, config)
    with_r1, without = (forecast.cost_of_step(*parts, {i: 1.0})["TFLOP"] for i in iterations)
    assert with_r1 > without and list(iterations.values()) == [1 / 8, 7 / 8]
    assert TFLOP == pytest.approx(with_r1 / 8 + without * 7 / 8, rel=5e-3)


@SLOW
def test_stages_do_not_add_up(model, tmp_path, capsys):
    """Each stage has its own iterations, and the memory that it takes alone."""
    flags = ["--preset", "shapes", "--model", str(model), "--batch-size", "4", "--device", "cpu"]
    flags += ["--iterations", "5", "--iterations-b", "7"]
    forecast.main(["swiftbrush_v2.py", *flags])
    both = capsys.readouterr().out.splitlines()
    forecast.main(["swiftbrush_v2.py", *flags, "--stage", "b"])
    alone = capsys.readouterr().out.splitlines()
    memory = lambda lines: float(re.search(r"about (\S+) GB.* 7 steps", lines[-1]).group(1))
    assert " 5 steps" in both[3] and both[-4:-1] == alone[:-1]
    assert memory(both) == pytest.approx(memory(alone), rel=0.02)


@pytest.mark.parametrize("line, message", [
    ("ablate.py", "ablate.py: no such script"), ("swiftbrush_v2.py --stage merge", "nothing to forecast"),
    ("--processes 3 yoso.py --batch-size 4", "--processes 3"), ("yoso.py --image-size 17", "--image-size"),
    ("--processes 0 yoso.py", "--processes 0: must be at least 1"), ("", "required: script, flags"),
    ("--processes x yoso.py", "--processes: invalid int value: 'x'"),
    ("yoso.py --speed 3", "unrecognized arguments: --speed 3"), ("yoso.py --lr nan", "--lr nan: must be"),
    ("yoso.py --preset mini-epsilon --model no/where/at/all", "no such directory")])
def test_errors_are_one_line(line, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        forecast.main(line.split())
    assert "\n" not in str(error.value)


def test_processes_take_their_part_of_the_batch(capsys):
    """Of two processes each does half of the work, and holds the same states where they are not sharded."""
    outputs = []
    for processes in ("1", "2"):
        forecast.main(["--processes", processes, *COMMAND, "--device", "cpu"])
        outputs.append(capsys.readouterr().out)
    (all_of_it, n), (half, m) = (re.search(r"(\S+) TFLOP for (\d)", out).groups() for out in outputs)
    assert (n, m) == ("8", "4") and float(half) == pytest.approx(float(all_of_it) / 2, rel=5e-3)


def test_what_counts():
    """A storage counts once, whatever its views, with the size that it has now, and not after its end."""
    counter = forecast.TensorCounter()
    with counter:
        a = torch.empty(256)
        view = a.view(16, 16)
        assert counter.memory.live == 1024
        a.untyped_storage().resize_(0)
        assert counter.memory.live == 0
        a.untyped_storage().resize_(2048)
        assert (counter.memory.live, counter.memory.peak) == (2048, 2048)
        del a, view
        assert (counter.memory.live, counter.memory.peak) == (0, 2048)
    assert torch.empty(64).untyped_storage() not in counter.memory.sizes
