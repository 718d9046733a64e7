"""--shard: two processes with half of every weight each train as two with all weights do, and as one."""

import json
from functools import partialmethod

import pytest
import tiny
import torch
from helpers import CAPTIONS, drawings, metrics, perturb, ranks, state
from safetensors.torch import load_file, save_file

import diff_instruct_star
import plumbing.run
import swiftbrush_v2
import yoso
from common import Denoiser, Weights, load
from plumbing.checkpoint import flat_state
from plumbing.cli import bound_flags, parse_config
from plumbing.run import Run
from plumbing.shapes import Shapes
from plumbing.shard import part_here, shard, whole

EVERY = ["--batch-size", 4, "--device", "cpu", "--log-every", 1, "--save-every", 2, "--sample-every", 3]
YOSO = ["--preset", "mini", "--prior-num", 8, *EVERY]
DISTILL = ["--preset", "shapes", "--rank", 4, "--alpha", 8, "--convert-iterations", 1, *EVERY]
SWIFTBRUSH = [*DISTILL, "--rank-b", 4, "--alpha-b", 8]
DIFF_INSTRUCT = [*DISTILL, "--assistant-warmup", 0, "--warmup", 0]
LORA = ["--assistant", "lora", "--gradient-checkpointing"]
MEMORY = ["--micro-batch", 1, "--gradient-checkpointing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny models lie."""
    return tiny.save_models(tmp_path_factory.mktemp("models"))


def command(script, folder, out, flags):
    """The flags, completed by those that name the tiny models and the run's folder."""
    more = ["--decoder", folder / "tae"] if script is not yoso else []
    if script is swiftbrush_v2:
        more += ["--clip", folder / "clip"]
    if script is diff_instruct_star:
        more += ["--reward", folder / "clip", "--probe", folder / "judge"]
    return [str(flag) for flag in ("--model", folder / "sd", "--out", out, *more, *flags)]


def share_of(tensors):
    """The share of the bytes of some tensors that this process holds."""
    tensors = list(tensors)
    here, everywhere = (sum(t.numel() * t.element_size() for t in some)
                        for some in (map(part_here, tensors), tensors))
    return here / everywhere


def same(a, b):
    """Weights by name, to 1e-5 but for one in a hundred.

    Where a gradient is almost 0, rounding gives Adam's step its sign.
    """
    assert a.keys() == b.keys()
    difference = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    assert difference.quantile(0.99) < 1e-5 and difference.max() < 1e-2, difference.max()


# One update; the rates of networks on which another's gradient depends are 0, for the same reason

STEPS = {
    "yoso": (yoso, [*YOSO, "--lr-d", 1e-30]),
    "yoso-lora": (yoso, [*YOSO, "--lr-d", 1e-30, "--rank", 4, *MEMORY]),
    "student a": (swiftbrush_v2, [*SWIFTBRUSH, "--stage", "a"]),
    "student b": (swiftbrush_v2, [*SWIFTBRUSH, "--stage", "b", "--gradient-checkpointing"]),
    "diff-instruct": (diff_instruct_star, [*DIFF_INSTRUCT, "--lr-assistant", 1e-30]),
    "diff-instruct-lora": (diff_instruct_star, [*DIFF_INSTRUCT, "--lr-assistant", 1e-30, *LORA]),
}


def cast(name, folder, *more):
    """(run, models, the trained weights by role) of a method, without zeros behind which gradients vanish."""
    script, flags = STEPS[name]
    argv = command(script, folder, "unused", [*flags, *more])
    config = parse_config(script.Config, script.PRESETS, argv, "")
    run = Run(config)
    if script is swiftbrush_v2:
        frozen = script.load_networks(config, run.device)
        shard(config, frozen.teacher.net, frozen.start.net)
        models = script.build(config, run, config.stage, frozen)
    else:
        models = script.build(config, run)
    denoisers = {role: value for role, value in vars(models).items() if isinstance(value, Denoiser)}
    trained = {role: denoiser.trainable() for role, denoiser in denoisers.items()}
    torch.manual_seed(1)
    for role, denoiser in denoisers.items():
        if denoiser.adapter:
            perturb(trained[role])
    if script is yoso:
        trained["discriminator"] = Weights(models.discriminator.named_parameters())
        with torch.no_grad():
            models.discriminator.end.weight.add_(0.1)
    return run, models, {role: weights for role, weights in trained.items() if weights}


def step(name, folder, out, *more):
    """One update; writes the gradients, weights, averages, and the shares of bytes that a process holds."""
    run, models, trained = cast(name, folder, *more)
    script, captions = STEPS[name][0], CAPTIONS[run.rows]
    pictures = [drawings(4, models.codec.picture_size)[run.rows]] if script is yoso else []
    script.train_step(0, *pictures, captions, run.config, run, models)
    tensors = flat_state(trained | dict(ema=models.ema))
    for role, weights in trained.items():
        tensors |= {f"gradient.{role}.{key}": p.grad for key, p in weights.items()}
    optimizers = {key: part for key, part in vars(models).items() if isinstance(part, torch.optim.Optimizer)}
    networks = [value.net if isinstance(value, Denoiser) else value for value in vars(models).values()]
    bare = [p for net in networks if isinstance(net, torch.nn.Module) for key, p in net.named_parameters()
            if "lora_" not in key]
    out.mkdir(parents=True, exist_ok=True)
    trained = [*tensors.values(), *flat_state(optimizers).values()]
    shares = dict(networks=share_of(bare), trained=share_of(trained))
    (out / f"share{run.rank}.json").write_text(json.dumps(shares))
    tensors = {key: whole(tensor).detach().contiguous() for key, tensor in tensors.items()}
    if run.rank == 0:
        save_file(tensors, out / "tensors.safetensors")


def steps(folder, out):
    """One update of every method in a process of several, with all of each weight, then with half."""
    for name in STEPS:
        step(name, folder, out / name / "all")
        step(name, folder, out / name / "half", "--shard")


@pytest.fixture(scope="module")
def updates(folder, tmp_path_factory):
    """Where the updates of two processes lie."""
    ranks(2, steps, folder, out := tmp_path_factory.mktemp("updates"))
    return out


@pytest.mark.parametrize("name", STEPS)
def test_one_update_is_that_of_one_process(folder, updates, name):
    """On two processes with all of each weight, or half: the same clipped gradients, weights and averages.

    Half: of networks, gradients, moments and averages; LoRAs stay whole.
    """
    step(name, folder, updates / name / "one")
    one, *others = (load_file(updates / name / out / "tensors.safetensors") for out in ("one", "all", "half"))
    is_gradient = lambda key: key.startswith("gradient.")
    scale = max(tensor.abs().max().item() for key, tensor in one.items() if is_gradient(key))
    for tensors in others:
        assert tensors.keys() == one.keys()
        for key in filter(is_gradient, one):
            torch.testing.assert_close(tensors[key], one[key], atol=1e-5 * scale, rtol=1e-3)
        same(*({key: found[key] for key in found if not is_gradient(key)} for found in (tensors, one)))
    for out, least, most in (("one", 1, 1), ("all", 1, 1), ("half", 0.45, 0.55)):
        for path in (updates / name / out).glob("share*.json"):
            shares = json.loads(path.read_text())
            assert least <= shares["networks"] <= most
            if name in ("yoso", "diff-instruct"):
                assert least <= shares["trained"] <= most


def bf16_steps(folder, out):
    """One update under bf16 of two methods, with all of each weight, then with half."""
    for name in ("yoso", "student a"):
        step(name, folder, out / name / "all", "--precision", "bf16")
        step(name, folder, out / name / "half", "--precision", "bf16", "--shard")


def test_shards_are_gathered_in_bf16(folder, tmp_path):
    """The update is that of whole weights under autocast, up to bf16's rounding; what is kept is float32."""
    ranks(2, bf16_steps, folder, tmp_path)
    for name in ("yoso", "student a"):
        whole, half = (load_file(tmp_path / name / out / "tensors.safetensors") for out in ("all", "half"))
        assert all(tensor.dtype == torch.float32 for tensor in half.values())
        for role in {key.split(".")[1] for key in whole if key.startswith("gradient.")}:
            a, b = (torch.cat([found[key].flatten() for key in sorted(found)
                               if key.startswith(f"gradient.{role}.")]) for found in (whole, half))
            assert torch.cosine_similarity(a, b, dim=0) > 0.999
            assert b.norm().item() == pytest.approx(a.norm().item(), rel=0.02)


def test_sharded_networks_run_in_bf16_wherever_they_are_called(folder, tmp_path):
    """Also where samples are drawn, without autocast around them; the adaptation's teacher stays float32."""
    ranks(2, called_in_bf16, folder)


def called_in_bf16(folder):
    for more, dtype in ((), torch.bfloat16), (("--adapt",), torch.float32):
        argv = command(yoso, folder, "unused", [*YOSO, "--shard", "--precision", "bf16", *more])
        config = parse_config(yoso.Config, yoso.PRESETS, argv, "")
        start, codec, *_ = yoso.load_networks(config, Run(config))
        x_t, t = torch.randn(1, *codec.shape), torch.tensor([3])
        assert start.net(x_t, timestep=t, **codec.cond(["a"])).sample.dtype == dtype


# Whole runs

def train(folder, out, iterations, *more):
    """YOSO's loop up to so many iterations, with its checkpoints, but without samples and exports."""
    argv = command(yoso, folder, out, [*YOSO, "--iterations", iterations, *more])
    config = parse_config(yoso.Config, yoso.PRESETS, argv, "")
    run = Run(config, bound_flags(yoso.Config, but=("iterations",)))
    models = yoso.build(config, run)
    run.begin(dict(generator=models.generator.trainable(), discriminator=models.discriminator, ema=models.ema,
                   optimizer_g=models.optimizer_g, optimizer_d=models.optimizer_d))
    dataset = Shapes(models.codec.picture_size)
    for iteration, (pictures, captions) in enumerate(run.batches(dataset), run.start):
        run.finish_iteration(iteration, yoso.train_step(iteration, pictures, captions, config, run, models))
    run.end()


def test_a_run_moves_into_shards_and_back(folder, tmp_path):
    """On one process, on two with all of each weight, on two with half, on one again: as one that stayed."""
    train(folder, tmp_path / "moved", 1)
    ranks(2, train, folder, tmp_path / "moved", 2)
    ranks(2, train, folder, tmp_path / "moved", 3, "--shard")
    train(folder, tmp_path / "moved", 4)
    train(folder, tmp_path / "stayed", 4)
    assert [row["iteration"] for row in metrics(tmp_path / "moved")] == [1, 2, 3, 4]
    moved, stayed = state(tmp_path / "moved"), state(tmp_path / "stayed")
    keys = lambda saved: {part: value.keys() for part, value in saved.items()}
    assert keys(moved) == keys(stayed)
    for part in ("generator", "discriminator", "ema"):
        same(moved[part], stayed[part])


RUNS = {
    "yoso": (yoso, [*YOSO, "--iterations", 2, *MEMORY]),
    "yoso-lora": (yoso, [*YOSO, "--iterations", 2, "--adapt", "--adapt-iterations", 2, "--rank", 4]),
    "swiftbrush": (swiftbrush_v2, [*SWIFTBRUSH, "--iterations", 2, "--iterations-b", 2]),
    "diff-instruct": (diff_instruct_star, [*DIFF_INSTRUCT, "--iterations", 2]),
    "diff-instruct-lora": (diff_instruct_star, [*DIFF_INSTRUCT, "--iterations", 2, *LORA]),
}


def note_share(run, end, out):
    """Notes the share of a run's parts that this process holds, then ends the run."""
    (out / f"share{run.rank}.json").write_text(json.dumps(share_of(flat_state(run.parts).values())))
    end(run)


def sharded(name, out, argv):
    """A command with --shard; each of its processes writes its share of the last run's parts to out."""
    plumbing.run.Run.end = partialmethod(note_share, plumbing.run.Run.end, out)
    RUNS[name][0].main([*argv, "--shard"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_is_that_of_one_process(folder, tmp_path, name):
    """Checkpoints, pipelines, and which grids there are."""
    one, two, (script, flags) = tmp_path / "one", tmp_path / "two", RUNS[name]
    ranks(2, sharded, name, tmp_path, command(script, folder, two, flags))
    script.main(command(script, folder, one, flags))
    stages = [path.parent.relative_to(one) for path in one.rglob("checkpoint")]
    assert stages
    for stage in stages:
        whole, parts = state(one / stage), state(two / stage)
        assert whole.keys() == parts.keys()
        for part in whole:
            if not part.startswith("optimizer"):
                same(parts[part], whole[part])
    same(*(load(out / "pipeline")[0].net.state_dict() for out in (one, two)))
    grids = [sorted(path.relative_to(out) for path in out.rglob("*.png")) for out in (one, two)]
    assert grids[0] == grids[1] and grids[0]
    if name in ("yoso", "diff-instruct"):
        assert all(json.loads((tmp_path / f"share{rank}.json").read_text()) < 0.55 for rank in (0, 1))
