"""What a run says it will take, against what it takes."""

import json

import benchmark
import forecast
import ladder
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import diff_instruct_star
import plumbing.checkpoint
import plumbing.cli
import plumbing.run
import swiftbrush_v2
import yoso

SLOW = pytest.mark.slow
CONFIGS = [
    pytest.param("yoso --preset shapes --channels 8 16 --batch-size 8", marks=SLOW),
    "yoso --preset shapes --channels 8 16 --batch-size 8 --precision bf16",
    "yoso --preset shapes --channels 8 16 --batch-size 8 --micro-batch 4 --gradient-checkpointing",
    pytest.param("yoso_t2i --batch-size 4", marks=SLOW),
    "yoso_t2i --batch-size 4 --rank 8 --gradient-checkpointing",
    pytest.param("yoso_t2i --batch-size 4 --precision bf16", marks=SLOW),
    pytest.param("swiftbrush_v2 --batch-size 4 --stage a", marks=SLOW),
    "swiftbrush_v2 --batch-size 4 --stage a --precision bf16 --gradient-checkpointing",
    pytest.param("swiftbrush_v2 --batch-size 4 --stage b --micro-batch 2", marks=SLOW),
    pytest.param("diff_instruct_star --batch-size 4", marks=SLOW),
    "diff_instruct_star --batch-size 4 --assistant lora --precision bf16",
    "diff_instruct_star --batch-size 4 --divergence kl --gradient-checkpointing",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tiny.sd().save_pretrained(path := tmp_path_factory.mktemp("model") / "sd")
    return path


@pytest.mark.parametrize("line", CONFIGS)
def test_the_forecast_holds(line, model, tmp_path):
    """Memory within 15 % of what two real steps hold, FLOPs as torch counts them; the forecast itself changes nothing."""
    method, *argv = line.split()
    if method != "yoso":
        argv += ["--model", str(model), "--preset", "shapes"]
    _, kind, presets, parts_of = benchmark.METHODS[method]
    config = plumbing.cli.parse_config(kind, presets, [*argv, "--device", "cpu"], "")
    measured = benchmark.peak_of_steps(parts_of, config, tmp_path / "measured") / 2**30
    others = forecast.held_bytes(torch.device("cpu")) / 2**30
    parts, networks, run = parts_of(config, tmp_path / "run")
    optimizers = list(run.parts.values())
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    before = [p.detach().double() for p in trained]
    cost = forecast.cost_of_step(run, networks, optimizers, parts["step"], {0: 1.0})
    assert cost["memory_GB"] - others - sum(b.nbytes for b in before) / 2**30 == pytest.approx(measured, rel=0.15)
    assert all(torch.equal(b, p) and p.device.type == "cpu" and p.grad is None and p.requires_grad for b, p in zip(before, trained))
    assert not any(o.state for o in optimizers) and (cost["trained"], run.world) == (sum(p.numel() for p in trained), 1)
    if method != "diff_instruct_star" and "checkpointing" not in line:  # torch's counter cannot follow autograd.grad
        with FlopCounterMode(display=False) as flops:
            parts["step"]()
        assert cost["TFLOP"] == pytest.approx(flops.get_total_flops() / 1e12, rel=1e-6)


@pytest.mark.parametrize("line", [
    "yoso_t2i --rank 4 --micro-batch 2", pytest.param("swiftbrush_v2 --stage a --rank 4", marks=SLOW),
    pytest.param("swiftbrush_v2 --stage b --rank 4 --rank-b 4", marks=SLOW),
    pytest.param("diff_instruct_star --gradient-checkpointing", marks=SLOW), "diff_instruct_star --assistant lora --rank 4"])
def test_a_forecast_leaves_shards_as_they_were(line, model, tmp_path):
    """A second one says the same, before and after a step, and the work is that of a process alone."""
    method, *argv = line.split()
    _, kind, presets, parts_of = benchmark.METHODS[method]
    argv += ["--model", str(model), "--preset", "shapes", "--batch-size", "4", "--shard", "--device", "cpu"]
    config = plumbing.cli.parse_config(kind, presets, argv, "")

    def cost(parts, networks, run):
        others = forecast.held_bytes(torch.device("cpu")) / 2**30
        cost = forecast.cost_of_step(run, networks, list(run.parts.values()), parts["step"], {0: 1.0})
        return cost.pop("memory_GB") - others, cost

    alone = cost(*parts_of(config, tmp_path / "alone"))
    with ladder.processes_that_share(4):
        parts, networks, run = parts_of(config, tmp_path / "one of four")
        hooks = [(list(m._forward_pre_hooks.items()), list(m._forward_hooks.items())) for n in networks.values() for m in n.modules()]
        first, second = (cost(parts, networks, run) for _ in range(2))
        assert hooks == [(list(m._forward_pre_hooks.items()), list(m._forward_hooks.items())) for n in networks.values() for m in n.modules()]
        parts["step"]()
        for optimizer in run.parts.values():
            optimizer.state.clear()  # or the moments would count among the others
        third = cost(parts, networks, run)
    assert first == second and third[1] == first[1] == alone[1]
    assert third[0] == pytest.approx(first[0], rel=0.01)


@pytest.mark.parametrize("line, calls, units", [
    ("yoso --preset shapes --channels 8 16 --batch-size 8", dict(generator=[2, 1], discriminator=[2, 2]), [4, 5]),
    ("yoso_t2i --batch-size 4", dict(generator=[3, 1], discriminator=[2, 2], features=[2, 1]), [5, 5, 3]),
    ("swiftbrush_v2 --batch-size 4 --stage a", dict(student=[1, 1], teacher=[5, 1], lora_teacher=[5, 1]), [3, 7, 7]),
    ("diff_instruct_star --batch-size 4", dict(student=[2, 1], reference=[2, 2], assistant=[2, 2]), [4, 4, 5])])
def test_the_calls_of_a_step(line, calls, units, model, tmp_path):
    """A forward is one unit, a backward to the input one more, to the weights two more; the teachers are one network."""
    method, *argv = line.split()
    if method != "yoso":
        argv += ["--model", str(model), "--preset", "shapes"]
    _, kind, presets, parts_of = benchmark.METHODS[method]
    parts, networks, run = parts_of(plumbing.cli.parse_config(kind, presets, [*argv, "--device", "cpu"], ""), tmp_path)
    shared = {} if method != "swiftbrush_v2" else {"lora_teacher": networks.pop("lora_teacher")}
    assert all(network is networks["teacher"] for network in shared.values())
    cost = forecast.cost_of_step(run, networks, list(run.parts.values()), parts["step"], {0: 1.0})
    assert cost["calls"] == {name: calls[name] for name in networks} and list(cost["units"].values()) == units[:len(networks)]


class Enough(Exception):
    """The forecast is made; no step is wanted."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny pipelines of every kind, a CLIPModel, and prompts whose first is longer than the text encoders take."""
    root = tmp_path_factory.mktemp("models")
    for name in ("sd", "sdxl", "pixart"):
        getattr(tiny, name)().save_pretrained(root / name)
    tiny.pixel(root / "pixel", classes=None)
    for part in tiny.clip():
        part.save_pretrained(root / "clip")
    (root / "prompts.txt").write_text("a red circle on white " * 30 + "\na blue square\n")
    return root


@pytest.mark.parametrize("script, model, more", [
    (yoso, "sd", "--adapt --adapt-iterations 0 --precision bf16 --gradient-checkpointing"),
    (yoso, "sdxl", "--rank 4 --cache-latents"), (yoso, "pixart", "--discriminator {root}/sd --cache-latents --micro-batch 2"),
    (swiftbrush_v2, "sd", "--stage b --rank-b 4 --cache-latents"), pytest.param(swiftbrush_v2, "sdxl", "--stage a --gradient-checkpointing", marks=SLOW),
    (swiftbrush_v2, "pixart", "--stage a --regularise pairs --regularise-num 4 --regularise-steps 2 --cache-latents"),
    (swiftbrush_v2, "pixel", "--stage a --preset cifar10"),
    pytest.param(diff_instruct_star, "sd", "--assistant lora --rank 4", marks=SLOW), (diff_instruct_star, "sdxl", "--cache-latents --precision bf16"),
    (diff_instruct_star, "pixart", "--divergence kl --gradient-checkpointing"), pytest.param(diff_instruct_star, "pixel", "--preset cifar10", marks=SLOW)])
def test_every_kind_of_run_has_one(script, model, more, models, tmp_path, monkeypatch, capsys):
    make = plumbing.run.Run.forecast

    def forecast(run, *arguments):
        make(run, *arguments)
        raise Enough

    monkeypatch.setattr(plumbing.run.Run, "forecast", forecast)
    argv = ["--preset", "shapes", "--model", f"{models}/{model}", "--batch-size", "4", "--iterations", "2", "--device", "cpu",
            "--out", f"{tmp_path}/out", *more.format(root=models).split()]
    if script is yoso:
        argv += ["--prior-num", "4"]
    else:
        argv += ["--prediction", "epsilon", "--decoder", "", *([] if model == "pixel" else ["--prompts", f"{models}/prompts.txt"])]
        argv += ["--clip", f"{models}/clip"] if script is swiftbrush_v2 else (
            ["--reward", "", "--probe", ""] if model == "pixel" else ["--reward", f"{models}/clip", "--probe", ""])
    with pytest.raises(Enough):
        script.main(argv)
    assert "no forecast" not in capsys.readouterr().err
    cost = json.loads(next((tmp_path / "out").rglob("forecast.json")).read_text())
    assert cost["TFLOP"] > 0 and cost["memory_GB"] > 0 and all(calls > 0 for calls, _ in cost["calls"].values())


def test_a_run_goes_on_without_a_forecast(tmp_path, monkeypatch, capsys):
    """Where the forecast fails, one line says so, and the run ends with the weights that it has without one."""
    argv = ["--preset", "shapes", "--channels", "8", "16", "--batch-size", "8", "--iterations", "2", "--device", "cpu", "--out"]
    step, calls = yoso.update_generator, []

    def failing(*arguments):
        calls.append(step(*arguments))
        if len(calls) == 1:  # in the forecast, with a graph alive
            raise RuntimeError("no such kernel")
        return calls[-1]

    monkeypatch.setattr(yoso, "update_generator", failing)
    yoso.main([*argv, str(tmp_path / "a")])
    assert "no forecast of time and memory: RuntimeError: no such kernel" in capsys.readouterr().err
    assert not (tmp_path / "a" / "forecast.json").exists() and len(calls) == 3
    monkeypatch.setattr(yoso, "update_generator", step)
    yoso.main([*argv, str(tmp_path / "b")])
    a, b = (plumbing.checkpoint.read_checkpoint(tmp_path / name / "checkpoint")["state"]["generator"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_says_what_it_will_take(tmp_path, capsys):
    """Before the first step, on stderr and in forecast.json; R1's steps are averaged in; the same run without it ends alike."""
    argv = ["--preset", "shapes", "--channels", "8", "16", "--batch-size", "8", "--iterations", "2", "--device", "cpu", "--out"]
    yoso.main([*argv, str(tmp_path / "a")])
    shown = capsys.readouterr().err
    cost = json.loads((tmp_path / "a" / "forecast.json").read_text())
    assert "a step calls" in shown and "at least" in shown and cost["calls"] == dict(generator=[2, 1], discriminator=[2, 2])
    assert cost["least_hours"] == pytest.approx(2 * cost["TFLOP"] / cost["matmul_TFLOP_per_second"] / 3600, rel=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.run.Run, "forecast", lambda *_: None)
        yoso.main([*argv, str(tmp_path / "b")])
    a, b = (plumbing.checkpoint.read_checkpoint(tmp_path / name / "checkpoint")["state"]["generator"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
