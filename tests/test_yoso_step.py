"""One update of YOSO: who moves whom, what the networks are given, how often each is called, memory flags.

Whole steps against an independent implementation: test_reference_steps.py.
"""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import CAPTIONS, TINY, drawings, equal, perturb, random_vgg

import common
import plumbing.cli
import yoso
from common import Codec, Denoiser, Draws, HalfUNet, InformativePrior, NoiseSchedule
from plumbing.data import FreshData
from plumbing.run import Run
from plumbing.students import dense_copy

KINDS = dict(scratch=["--latent-z", 8], full=[], lora=["--rank", 4, "--alpha", 8])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny Stable Diffusion."""
    torch.manual_seed(0)
    tiny.sd().save_pretrained(folder := tmp_path_factory.mktemp("model") / "sd")
    return folder


def prepare(kind, model, *more):
    """The arguments of a train_step, its rates 0 so that the gradients stay for the tests to see.

    D's last layer and a LoRA do not have the zeros that they start with, behind which gradients vanish.
    """
    flags = [*TINY, "--flip"] if kind == "scratch" else [
        "--preset", "mini", "--model", model, "--batch-size", 4, "--clip-norm", "inf", "--device", "cpu"]
    flags = [str(flag) for flag in (*flags, "--out", "unused", *KINDS[kind], *more)]
    config = plumbing.cli.parse_config(yoso.Config, yoso.PRESETS, flags, "")
    run = Run(config)
    models = yoso.build(config, run)
    torch.manual_seed(1)
    torch.nn.init.normal_(models.discriminator.end.weight, std=0.1)
    if config.rank:
        perturb(models.generator.trainable(), 0.05)
    for optimizer in (models.optimizer_g, models.optimizer_d):
        optimizer.param_groups[0]["lr"] = 0.0
    size = models.codec.picture_size
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(config.batch_size)]
    return dict(iteration=0, pictures=drawings(config.batch_size, size), captions=captions, config=config,
                run=run, models=models)


def gradients(step):
    """(losses, gradients of G's trained weights and of D's by name) of the step."""
    losses = yoso.train_step(**step)
    networks = step["models"].generator.trainable(), dict(step["models"].discriminator.named_parameters())
    return losses, [{name: p.grad for name, p in parameters.items()} for parameters in networks]


def watch_updates(step, note):
    """Calls note(whose update, its parts) before each update of the step, note(None, parts) after it."""
    descend, models = step["run"].descend, step["models"]

    def watched(optimizer, parts, *rest):
        note("G" if optimizer is models.optimizer_g else "D", parts)
        losses = descend(optimizer, parts, *rest)
        note(None, parts)
        return losses
    step["run"].descend = watched


# Data that a generator draws

@pytest.mark.parametrize("with_prior", [False, True])
def test_fresh_data_are_what_the_generator_draws(model, tmp_path, with_prior):
    """x0 of one call at T, of the sample's own noise and prompt; the step trains on them as they are."""
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:3]))
    torch.manual_seed(2)
    (pipe := tiny.sd("v_prediction")).save_pretrained(tmp_path / "v")
    prior = InformativePrior(torch.randn(4, 8, 8), torch.rand(4, 1, 1) + 0.5)
    if with_prior:
        prior.save(tmp_path / "v")
    step = prepare("full", model, "--generator", tmp_path / "v", "--prompts", tmp_path / "prompts.txt",
                   "--seed", 3)
    run, codec = step["run"], step["models"].codec
    data = FreshData(step["config"], run, codec)
    run.skipped, seen = set(), []
    x0, captions = next(batches := run.batches(data))
    x0_next, captions_next = next(batches)
    assert sorted(captions[:3]) == sorted([*captions[3:], *captions_next[:2]]) == sorted(CAPTIONS[:3])
    assert [captions, captions_next] == list(islice(run.prompts(data.prompts), 2))
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    for i, (x, caption) in enumerate(zip([*x0, *x0_next], [*captions, *captions_next], strict=True)):
        draw = Draws(3, 2**62 + i, 1, slice(None), "cpu")
        eps, eps_prime = draw.randn(4, 8, 8), draw.randn(4, 8, 8)
        x_T = alpha * (prior.mean + prior.std * eps_prime) + sigma * eps if with_prior else eps
        with torch.no_grad():
            v = pipe.unet(x_T, 999, **Codec(pipe).cond([caption])).sample
        torch.testing.assert_close(x, (alpha * x_T - sigma * v)[0], atol=1e-5, rtol=1e-4)
    assert not x0.requires_grad and len({x.sum().item() for x in (*x0, *x0_next)}) == 8
    watch_updates(step, lambda updated, parts: seen.extend(p.x0 for p in parts))
    yoso.train_step(**step | dict(pictures=x0, captions=captions))
    assert all(torch.equal(x, x0) for x in seen) and seen
    # Two processes draw each their half.
    for rows in (slice(0, 2), slice(2, 4)):
        run.rows = rows
        half, texts = next(run.batches(data))
        torch.testing.assert_close(half, x0[rows], atol=1e-5, rtol=1e-4)
        assert texts == captions[rows]


def test_fresh_data_are_drawn_in_micro_batches(model):
    """So that the batch is not bound by memory here either; the same pictures."""
    drawn, seen = [], []
    for micro in (0, 2):
        step = prepare("full", model, "--generator", model, "--micro-batch", micro)
        data = FreshData(step["config"], step["run"], step["models"].codec)
        data.generator.net.conv_in.register_forward_hook(lambda layer, x, y: seen.append(len(y)))
        drawn.append(torch.stack([sample["image"] for sample in data.__getitems__(range(4))]))
    assert seen == [4, 2, 2]
    torch.testing.assert_close(*drawn, atol=1e-5, rtol=1e-4)


# Who moves whom

@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_where_they_belong(kind, model):
    """L_D's to D alone, L_G's to G's trained weights alone; nothing else is made with a graph."""
    step = prepare(kind, model, "--r1", 1.0, "--real-offset", 400 if kind == "scratch" else 250)
    models, seen = step["models"], {}
    D, trained = models.discriminator, models.generator.trainable()

    def note(updated, parts):
        if updated == "G":
            seen["G before its update"] = [p.grad is None for p in trained.values()]
            seen["D"] = [p.grad.clone() for p in D.parameters()]
        tensors = {key: value for key, value in vars(parts[0]).items() if torch.is_tensor(value)}
        seen["graphs"] = {key for key, value in tensors.items() if value.requires_grad}

    watch_updates(step, note)
    yoso.train_step(**step)
    assert all(seen["G before its update"])
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_" in name or "conv" in name)
    assert all(torch.equal(p.grad, before) for p, before in zip(D.parameters(), seen["D"]))
    assert seen["graphs"] == {"fake"}
    assert all(p.requires_grad for p in D.parameters())
    ids = {id(p) for p in trained.values()}
    assert all(p.grad is None for p in models.generator.net.parameters() if id(p) not in ids)
    if kind != "scratch":
        others = (models.half, models.codec.vae, models.codec.pipe.text_encoder)
        assert all(p.grad is None for module in others for p in module.parameters() if id(p) not in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_what_is_trained_and_its_average(kind, model):
    """G and D move, each at its own rate; the average follows; the frozen half and a LoRA's base stay."""
    step = prepare(kind, model, "--ema", 0.75)
    models = step["models"]
    states = lambda: [{key: value.clone() for key, value in state.items()} for state in (
        models.generator.net.state_dict(), models.discriminator.state_dict(),
        models.half.state_dict() if models.half else {}, models.ema.state_dict())]
    trained = set(models.generator.trainable())
    (net, D, half, average), moved = states(), {}
    for name in ("D", "G"):  # D alone, then G too
        optimizer = models.optimizer_d if name == "D" else models.optimizer_g
        optimizer.param_groups[0]["lr"] = 1e-3
        yoso.train_step(**step)
        after = states()
        moved[name] = [{key for key in new if not torch.equal(new[key], old[key])}
                       for old, new in zip((net, D, half), after)]
    assert moved["D"][0] == set() and moved["G"][0] == trained
    assert moved["D"][1] == moved["G"][1] == set(dict(models.discriminator.named_parameters()))
    assert moved["G"][2] == set()
    for name, value in after[3].items():
        expected = 0.75 * (0.75 * average[name] + 0.25 * net[name]) + 0.25 * after[0][name]
        torch.testing.assert_close(value, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_discriminators_model(kind, model, tmp_path):
    """D, features and their condition are of --discriminator; without it, features that stay are shared."""
    torch.manual_seed(7)
    tiny.sd().save_pretrained(tmp_path / "other")
    other, codec = common.load(tmp_path / "other")
    expected = HalfUNet(other.net).state_dict()
    models = prepare(kind, model, "--discriminator", tmp_path / "other")["models"]
    for half in (models.half, models.discriminator.features):
        assert equal(dict(half.state_dict()), dict(expected))
    assert equal(models.codec_d.cond(CAPTIONS), codec.cond(CAPTIONS))
    assert not equal(models.codec.cond(CAPTIONS), codec.cond(CAPTIONS))
    models = prepare(kind, model)["models"]
    of_G = {p.data_ptr() for p in models.generator.net.parameters()}
    shared = [p.data_ptr() in of_G for p in models.half.parameters()]
    assert all(shared) if kind == "lora" else not any(shared)
    assert not any(p.data_ptr() in of_G for p in models.discriminator.parameters())


def test_each_optimiser_has_its_own_rate():
    """Before the first iteration, too, in which train() sets them."""
    flags = [*TINY, "--out", "unused", "--lr", "0.1", "--lr-d", "0.2", "--weight-decay", "0.3"]
    config = plumbing.cli.parse_config(yoso.Config, yoso.PRESETS, flags, "")
    models = yoso.build(config, Run(config))
    groups = [optimizer.param_groups[0] for optimizer in (models.optimizer_g, models.optimizer_d)]
    assert [(g["lr"], g["betas"][0], g["weight_decay"]) for g in groups] == [(0.1, 0.9, 0.3), (0.2, 0.0, 0.3)]


def test_a_shared_half_has_the_weights_and_not_the_lora():
    net = tiny.unet().requires_grad_(False)
    half, own = HalfUNet(net, share=True), HalfUNet(net)
    text = dict(encoder_hidden_states=torch.randn(2, 5, 32))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), text
    before = half(*inputs)
    assert torch.equal(before, own(*inputs))
    perturb(common.add_lora(net, "student", 4, 4))
    assert torch.equal(half(*inputs), before)
    addresses = {p.data_ptr() for p in net.parameters()}
    assert all(p.data_ptr() in addresses for p in half.parameters())
    assert not any(p.data_ptr() in addresses for p in own.parameters())


def test_the_limit_of_the_gradients_norm_is_the_generators(model):
    """D is not clipped."""
    (_, plain), (_, found) = (gradients(prepare("full", model, "--clip-norm", c)) for c in ("inf", 1e-3))
    norms = [torch.cat([g.flatten() for g in of_G.values()]).norm().item() for of_G, _ in (plain, found)]
    assert norms[0] > 1e-2 and norms[1] == pytest.approx(1e-3, rel=1e-2)
    assert all(torch.equal(g, plain[1][name]) for name, g in found[1].items())
    assert torch.cat([g.flatten() for g in plain[1].values()]).norm() > 1e-2


# What the networks are given

OFFSETS = dict(scratch=(1, 1), full=(250, 25))


@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize("adversary", ["self", "data", "ufogen"])
def test_the_levels_share_data_noise_and_condition(kind, adversary, model):
    """Algorithm 1: t, t - k and t - m of the same x0 and eps, none below 0; D is told one level for both.

    At level 0 the real side is the data.
    """
    step, given, told = prepare(kind, model, "--adversary", adversary), [], []
    models, seen = step["models"], {}
    models.generator.net.register_forward_pre_hook(
        lambda _, positional, named: given.append((positional[0], named)), with_kwargs=True)
    models.discriminator.register_forward_pre_hook(lambda _, inputs: told.append(inputs))
    watch_updates(step, lambda updated, parts: seen.update(p=parts[0]))
    yoso.train_step(**step)
    p, (k, m), schedule, shape = seen["p"], OFFSETS[kind], models.generator.schedule, models.codec.shape
    draw = step["run"].draws(0)
    t, eps, noise = draw.randint(1, len(schedule)), draw.randn(*shape), draw.randn(*shape)
    pictures = step["pictures"]
    if kind == "scratch":
        mirrored = draw.randint(0, 2).bool()
        assert mirrored.any() and not mirrored.all()
        pictures = torch.stack([x.flip(2) if coin else x for x, coin in zip(pictures, mirrored)])
        cond = dict(class_labels=draw.randn(8))
        assert set(t.tolist()) == {1, 2, 3, 4}
    else:
        cond = models.codec.cond(step["captions"])
    x0 = models.codec.encode(pictures)
    torch.testing.assert_close(p.x0, x0)
    t_real, t_con = ((t - offset).clamp(min=0) for offset in (k, m))
    levels = [t] + [t_real] * (adversary == "self") + [t_con] * (k != m or adversary != "self")
    assert [named["timestep"].tolist() for _, named in given] == [level.tolist() for level in levels]
    (key, text), = cond.items()
    for (x_t, named), level in zip(given, levels):
        torch.testing.assert_close(x_t, schedule.add_noise(x0, eps, level), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(named[key], text)
    level = t_real if adversary == "ufogen" else t
    for (pictures, told_level, told_cond), copies in zip(told, (2, 1)):
        assert torch.equal(told_level, level.repeat(copies))
        torch.testing.assert_close(told_cond[key], text.repeat(copies, *[1] * (text.ndim - 1)))
        assert len(pictures) == copies * len(t)
    with torch.no_grad():
        torch.testing.assert_close(p.target, yoso.predict_x0(models.generator, p, t_con))
    real, fake = told[0][0].chunk(2)
    assert torch.equal(fake, told[1][0])
    if adversary == "self":
        assert [torch.equal(a, b) for a, b in zip(real, x0)] == (t_real == 0).tolist()
        assert torch.equal(real, p.real) and torch.equal(fake, p.fake)
    elif adversary == "data":
        assert torch.equal(real, p.x0) and torch.equal(fake, p.fake)
    else:
        torch.testing.assert_close(real, schedule.add_noise(x0, eps, t_real), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(fake, schedule.add_noise(p.fake, noise, t_real), atol=1e-6, rtol=1e-5)


def test_a_discriminator_of_another_model_reads_captions_as_that_does(model, tmp_path):
    """PixArt's text encoder serves G alone; D and the features are told what Stable Diffusion's says."""
    tiny.pixart().save_pretrained(tmp_path)
    step = prepare("full", tmp_path, "--discriminator", model)
    models, told = step["models"], dict(G=[], D=[], half=[])
    models.generator.net.register_forward_pre_hook(
        lambda _, positional, named: told["G"].append(named["encoder_hidden_states"]), with_kwargs=True)
    for name, network in dict(D=models.discriminator, half=models.half).items():
        network.register_forward_pre_hook(
            lambda _, inputs, name=name: told[name].append(inputs[2]["encoder_hidden_states"]))
    yoso.train_step(**step)
    codecs = dict(G=models.codec, D=models.codec_d, half=models.codec_d)
    texts = {name: codec.cond(step["captions"])["encoder_hidden_states"] for name, codec in codecs.items()}
    assert not torch.allclose(texts["G"].mean(1), texts["D"].mean(1), atol=1e-3)
    for name, conds in told.items():
        assert conds
        for cond in conds:
            torch.testing.assert_close(cond, texts[name].repeat(len(cond) // len(texts[name]), 1, 1))


def test_the_steps_weights_are_those_of_its_levels(model, monkeypatch):
    """What reaches the generator's loss, with the preset's factors and limits."""
    step, seen = prepare("full", model), []
    loss, t = yoso.generator_loss, torch.tensor([3, 30, 300, 900])
    watched = lambda *arguments: seen.append(arguments[3:]) or loss(*arguments)
    monkeypatch.setattr(yoso, "generator_loss", watched)
    monkeypatch.setattr(common.Draws, "randint", lambda self, low, high: t)
    yoso.train_step(**step)
    expected = yoso.weights_of(step["config"], step["models"].generator.schedule, t, (t - 25).clamp(min=0))
    assert len(seen) == 1 and all(torch.equal(a, b) for a, b in zip(seen[0], expected))


# No pass is spent twice

def calls_of(step):
    """(forwards of G, of D, of the frozen half), each as a list of whether its output carries a graph."""
    models = step["models"]
    seen, networks = [[], [], []], (models.generator.net, models.discriminator, models.half)
    for noted, network in zip(seen, networks):
        if network is not None:
            network.register_forward_hook(lambda _, inputs, output, noted=noted: noted.append(
                (output if torch.is_tensor(output) else output.sample).requires_grad))
    yoso.train_step(**step)
    return seen


T, F = True, False


@pytest.mark.parametrize("kind, more, expected", [
    ("full", [], ([T, F, F], [T, T], [T, F])),
    ("lora", [], ([T, F, F], [T, T], [T, F])),
    ("full", ["--rec-distance", "latent"], ([T, F, F], [T, T], [T, F, F])),
    ("full", ["--lambda-con", 0], ([T, F], [T, T], [])),
    ("full", ["--con-distance", "l2"], ([T, F, F], [T, T], [])),
    ("full", ["--adversary", "data"], ([T, F], [T, T], [T, F])),
    ("full", ["--con-offset", 250], ([T, F], [T, T], [T, F])),
    ("full", ["--con-offset", 250, "--adversary", "data"], ([T, F], [T, T], [T, F])),
    ("scratch", [], ([T, F], [T, T], [])),
    ("scratch", ["--con-offset", 400], ([T, F, F], [T, T], [])),
    ("scratch", ["--adversary", "ufogen"], ([T, F], [T, T], [])),
    ("scratch", ["--adversary", "ufogen", "--lambda-con", 0], ([T], [T, T], [])),
    ("scratch", ["--micro-batch", 4], ([F, F, F, F, T, T], [T, T, T, T], []))],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None)
def test_no_network_pass_is_spent_twice(kind, more, expected, model):
    """G at t with its graph, at t - k and t - m without, once where these coincide; D on both sides, for G.

    The frozen half: once on fake, and once on each picture that it is compared with. Micro-batches repeat
    G(x_t, t) rather than keep all graphs.
    """
    generator, discriminator, half = calls_of(prepare(kind, model, *more))
    assert (generator, discriminator, sorted(half, reverse=True)) == expected


@pytest.mark.parametrize("more, calls, images", [
    ([], [T, F, F], 24), (["--con-distance", "l2"], [T, F], 16), (["--lambda-con", 0], [T, F], 16),
    (["--rec-distance", "l2"], [T, F], 16), (["--micro-batch", 4], [T, F, F] * 2, 24)],
    ids=["both", "reconstruction", "no consistency", "consistency", "micro-batches"])
def test_lpips_sees_every_picture_once(model, monkeypatch, more, calls, images):
    """VGG's forwards: on fake once, with the graph, for both distances; on x0 and target without."""
    interpolate = common.F.interpolate
    smaller = lambda x, size=None, **rest: interpolate(x, size=32 if size == 224 else size, **rest)
    monkeypatch.setattr(common.F, "interpolate", smaller)  # VGG takes any size, and this one quickly
    layers, seen, total = random_vgg(monkeypatch), [], []
    distances = ["--rec-distance", "lpips", "--con-distance", "lpips", "--no-flip"]
    step = prepare("scratch", model, *distances, *more)
    layers[0].register_forward_hook(lambda _, inputs, output: total.append(len(output)))
    layers[0].register_forward_hook(lambda _, inputs, output: seen.append(output.requires_grad))
    losses, (of_G, _) = gradients(step)
    assert sorted(seen, reverse=True) == sorted(calls, reverse=True) and sum(total) == images
    assert losses["L_rec"] > 0 and all(p.grad is None for p in layers.parameters())
    assert any(g.abs().sum() > 0 for g in of_G.values())


# Memory flags

@pytest.mark.parametrize("kind, common_flags, flags", [
    ("full", [], ["--micro-batch", 2]), ("full", [], ["--gradient-checkpointing"]),
    ("lora", [], ["--gradient-checkpointing", "--micro-batch", 1]),
    ("scratch", [], ["--gradient-checkpointing"]),
    ("full", ["--r1", 0.1], ["--gradient-checkpointing", "--micro-batch", 2]),
    *(("scratch", ["--adversary", adversary, "--r1", 0.1, "--con-offset", 400], ["--micro-batch", 4])
      for adversary in ("self", "data", "ufogen"))],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None)
def test_memory_flags_change_nothing(kind, common_flags, flags, model):
    """Losses and gradients are the same to rounding."""
    (losses, plain), (others, found) = (
        gradients(prepare(kind, model, *common_flags, *more)) for more in ([], flags))
    assert losses.keys() == others.keys()
    for name, value in losses.items():
        assert others[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    for a, b in zip(found, plain):
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-3)


def test_bf16_keeps_float32_weights_and_losses(model):
    """Of a LoRA on a frozen network too."""
    for kind in ("scratch", "lora"):
        r1 = ["--r1", 1.0]
        (exact, _), (losses, found) = (
            gradients(prepare(kind, model, *r1, *more)) for more in ([], ["--precision", "bf16"]))
        values = (*losses.values(), *found[0].values(), *found[1].values())
        assert all(value.dtype == torch.float32 for value in values)
        assert losses["L_rec"] != exact["L_rec"]
        assert losses["L_rec"].item() == pytest.approx(exact["L_rec"].item(), rel=0.05)


# The adaptation

def test_a_step_of_the_adaptation(model):
    """The teacher is asked at x_t of its schedule, the student at x_t of its own; the student alone moves."""
    step = prepare("full", model)
    teacher, codec = common.load(model)
    net = dense_copy(teacher.net, teacher.net.state_dict(), "cpu").requires_grad_(True)
    student = Denoiser(net, teacher.schedule.zero_terminal_snr(), "v_prediction")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    given = []
    for denoiser in (teacher, student):
        denoiser.net.register_forward_pre_hook(
            lambda _, positional, named, d=denoiser: given.append((d, positional[0], named["timestep"])),
            with_kwargs=True)
    step["models"] = yoso.Adaptation(teacher, student, codec, optimizer)
    losses = yoso.adapt_step(**step)
    draw = step["run"].draws(0)
    t, eps = draw.randint(0, 1000), draw.randn(*codec.shape)
    x0 = codec.encode(step["pictures"])
    assert [d for d, *_ in given] == [teacher, student]
    for denoiser, x_t, timestep in given:
        assert torch.equal(timestep, t)
        torch.testing.assert_close(x_t, denoiser.schedule.add_noise(x0, eps, t), atol=1e-6, rtol=1e-5)
    original = common.load(model)[0].net.state_dict()
    assert all(torch.equal(value, original[key]) for key, value in teacher.net.state_dict().items())
    assert all(not torch.equal(value, original[key]) for key, value in net.state_dict().items())
    assert list(losses) == ["L_adapt", "grad_student"] and losses["L_adapt"] > 0


class Exact(torch.nn.Module):
    """A network that knows x0 and predicts its prediction type without an error."""

    def __init__(self, x0, schedule, prediction_type):
        super().__init__()
        self.x0, self.schedule, self.prediction_type = x0, schedule, prediction_type
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t, timestep, **cond):
        exact = self.schedule.convert(self.x0, x_t, timestep, "sample", self.prediction_type)
        return SimpleNamespace(sample=exact + self.zero)


def test_the_adaptations_teacher_runs_in_float32(model):
    """Under bf16 too, for at T an error of its eps is magnified in x0; its student runs in bf16."""
    step, seen = prepare("full", model, "--precision", "bf16"), []
    nets = [common.load(model)[0].net for _ in range(2)]
    for net in nets:
        net.conv_in.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    nets[1].requires_grad_(True)
    teacher, student = (Denoiser(net, step["models"].generator.schedule, "v_prediction") for net in nets)
    optimizer = torch.optim.SGD(nets[1].parameters(), 0.0)
    yoso.adapt_step(**step | dict(models=yoso.Adaptation(teacher, student, step["models"].codec, optimizer)))
    assert seen == [torch.float32, torch.bfloat16]


def test_a_student_that_knows_the_data_has_nothing_to_learn(model):
    """Against an exact teacher its loss is 0; where the teacher's x0 is clamped, it is what is cut off."""
    step = prepare("full", model)
    codec, schedule = step["models"].codec, step["models"].generator.schedule
    rescaled, x0 = schedule.zero_terminal_snr(), codec.encode(step["pictures"]).detach()
    kinds = (schedule, "epsilon"), (rescaled, "v_prediction")
    teacher, student = (Denoiser(Exact(x0, s, kind), s, kind) for s, kind in kinds)
    optimizer = torch.optim.SGD(student.net.parameters(), 0.0)
    step["models"] = yoso.Adaptation(teacher, student, codec, optimizer)
    for clamp in (4.0, 0.02):
        step["config"] = replace(step["config"], adapt_clamp=clamp)
        for iteration in range(3):
            t = step["run"].draws(iteration).randint(0, 1000)
            cut = rescaled.sigma[t].view(-1, 1, 1, 1) * (x0 - x0.clamp(-clamp, clamp))
            step["iteration"] = iteration
            found = yoso.adapt_step(**step)["L_adapt"].item()
            expected = cut.square().mean().item()
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert clamp == 4.0 or expected > 1e-4
