"""YOSO as a fine-tune: its losses' closed forms, one update, and the real command on tiny SD and PixArt pipelines."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from test_run import equal
from test_schedule import PIXART, SD

import common
import plumbing.checkpoint
import plumbing.cli
import plumbing.run
import plumbing.shapes
import yoso
from common import Denoiser, HalfUNet, InformativePrior, NoiseSchedule, UserError, load

CAPTIONS = ["a large red circle on white", "a small blue square on black", "a large green triangle on gray", "a small red square on white"]


# Mathematics

def test_the_boundary_is_that_of_lcm():
    """G(x, 0) = x; from t = 1 on nearly the prediction; at every level what LCMScheduler does in diffusers."""
    scheduler, t = LCMScheduler(), torch.tensor([0, 1, 25, 249, 999])
    skip, out = yoso.boundary(t)
    assert (skip[0], out[0]) == (1, 0) and skip[1].item() == pytest.approx(0.0025, rel=0.01)
    for i, timestep in enumerate(t.tolist()):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        assert (skip[i].item(), out[i].item()) == pytest.approx([float(v) for v in theirs], rel=1e-6)
    x = torch.randn(5, 4, 2, 2)
    denoiser = Denoiser(lambda x, timestep: type("Out", (), dict(sample=torch.ones_like(x))), NoiseSchedule.from_config(SD), "epsilon")
    assert torch.equal(yoso.predict_x0(denoiser, x, t, {})[0], x[0])


def test_weights_on_the_schedule_of_sd():
    """With m = 25 the authors' weight is above its limit 5 for t <= 606, SNR(t) for t <= 146; both are 0 where SNR(t) is."""
    schedule, t = NoiseSchedule.from_config(SD), torch.arange(1000)
    snr, snr_con = schedule.snr(t), schedule.snr((t - 25).clamp(min=0))
    weight = yoso.sqrt_consistency_weight(snr, snr_con)
    assert (weight >= 5).nonzero().max() == 606 and (snr > 5).nonzero().max() == 146
    torch.testing.assert_close(weight[700], 1 / (schedule.sigma[700] / schedule.alpha[700] - schedule.sigma[675] / schedule.alpha[675]))
    zero = schedule.zero_terminal_snr()
    for function in (yoso.sqrt_consistency_weight, yoso.consistency_weight):
        assert function(zero.snr(t), zero.snr((t - 25).clamp(min=0)))[999] < 1e-6
        assert function(snr, snr_con)[0] == torch.inf  # t = t - m = 0: the limit makes it finite


@pytest.mark.parametrize("config, leak", [(PIXART, 0.0064), (SD, 0.068)], ids=["pixart", "sd"])
def test_y7_adaptation_targets(config, leak):
    """An exact teacher's target is the true v of either schedule; the printed one of stage II would leave noise in x0."""
    schedule, t = NoiseSchedule.from_config(config), torch.arange(1000)
    rescaled = schedule.zero_terminal_snr()
    x0, eps = torch.randn(1000, 4, 2, 2), torch.randn(1000, 4, 2, 2)
    for student in (schedule, rescaled):
        target = yoso.adaptation_target(eps, x0, student, t)
        x_t = student.add_noise(x0, eps, t)
        torch.testing.assert_close(student.convert(target, x_t, t, "v_prediction", "sample"), x0, atol=1e-5, rtol=0)
    printed = yoso.adaptation_target(eps, x0, schedule, t)
    wrong = rescaled.convert(printed, rescaled.add_noise(x0, eps, t), t, "v_prediction", "sample")
    of_x0 = rescaled.alpha**2 + schedule.sigma * rescaled.sigma
    of_eps = rescaled.sigma * (rescaled.alpha - schedule.alpha)
    torch.testing.assert_close(wrong, of_x0.view(-1, 1, 1, 1) * x0 + of_eps.view(-1, 1, 1, 1) * eps, atol=1e-5, rtol=0)
    assert of_eps.abs().max().item() == pytest.approx(leak, rel=0.02)
    assert yoso.adaptation_loss(x0, eps).item() == pytest.approx((x0 - eps).square().mean().item())


def test_the_generators_loss_with_two_distances_and_without_consistency():
    fake, x0, target, logits = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.randn(3)
    rec, con = torch.rand(3), torch.rand(3)
    absolute = lambda a, b: (a - b).abs().mean((1, 2, 3))
    total, parts = yoso.generator_loss(fake, x0, target, logits, rec, con, con_distance=absolute)
    assert parts["L_con"].item() == pytest.approx((con * absolute(fake, target)).mean().item())
    assert parts["L_rec"].item() == pytest.approx((rec * common.squared_distance(fake, x0)).mean().item())
    alone, parts = yoso.generator_loss(fake, x0, None, logits, rec, con)
    assert parts["L_con"] == 0 and alone.item() == pytest.approx((parts["L_rec"] + parts["L_adv"]).item())


def test_equation_7_on_linear_weights_is_exact():
    base, high, tuned = (dict(w=torch.randn(3, 3, dtype=torch.float64), size=torch.randn(n), **more) for n, more in (
        (4, {}), (8, dict(resolution=torch.ones(2))), (4, {})))
    merged = yoso.add_differences(base, high, tuned, 0.5, 2.0)
    torch.testing.assert_close(merged["w"], base["w"] + 0.5 * (high["w"] - base["w"]) + 2 * (tuned["w"] - base["w"]), atol=1e-15, rtol=0)
    assert torch.equal(merged["size"], high["size"]) and torch.equal(merged["resolution"], high["resolution"])
    # Linear maps: the merged map's answer is the same combination of answers.
    x = torch.randn(3, dtype=torch.float64)
    answers = [state["w"] @ x for state in (base, high, tuned)]
    torch.testing.assert_close(merged["w"] @ x, answers[0] + 0.5 * (answers[1] - answers[0]) + 2 * (answers[2] - answers[0]))
    assert torch.equal(yoso.add_differences(base, high, base, 1.0, 1.0)["w"], high["w"])


def test_a_shared_half_has_the_weights_and_not_the_lora():
    net = tiny.unet()
    net.requires_grad_(False)
    half, own = HalfUNet(net, share=True), HalfUNet(net)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), dict(encoder_hidden_states=torch.randn(2, 5, 32))
    before = half(x, t, cond)
    assert torch.equal(before, own(x, t, cond))
    adapter = common.add_lora(net, "student", 4, 4)
    with torch.no_grad():
        for p in adapter.values():
            p.normal_()
    assert torch.equal(half(x, t, cond), before)
    addresses = {p.data_ptr() for p in net.parameters()}
    assert all(p.data_ptr() in addresses for p in half.parameters()) and not any(p.data_ptr() in addresses for p in own.parameters())


# The command

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny SD and PixArt pipelines."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny.sd().save_pretrained(root / "sd")
    tiny.pixart().save_pretrained(root / "pixart")
    return root


def flags(models, out, *more):
    return ["--preset", "shapes", "--model", models / "sd", "--out", out, "--iterations", 3, "--adapt-iterations", 3, "--batch-size", 4,
            "--device", "cpu", "--log-every", 1, "--save-every", 2, "--sample-every", 3, "--prior-num", 8, *more]


def run(arguments):
    yoso.main([str(a) for a in arguments])


def state(out):
    return plumbing.checkpoint.read_checkpoint(out / "checkpoint")["state"]


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """Runs of all weights, of a LoRA, and with the adaptation, each of three iterations a stage."""
    root = tmp_path_factory.mktemp("runs")
    for name, more in dict(full=[], lora=["--rank", 4, "--alpha", 8], adapt=["--adapt"]).items():
        run(flags(models, root / name, *more))
    return root


def plain(path, kind=DiffusionPipeline, **parts):
    pipe = kind.from_pretrained(path, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["full", "lora", "adapt"])
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_the_export_samples_in_diffusers_as_here(finished, name, nfe):
    """1, 2 and 4 steps from the informative prior as the README does it, or without one after --adapt, against our own sampler."""
    denoiser, codec = load(finished / name / "pipeline")
    prior = InformativePrior.read(finished / name / "pipeline")
    pipe, y = plain(finished / name / "pipeline"), CAPTIONS[:2]
    x_T, eps_prime, *noise = torch.randn(1 + nfe + 1, 2, *codec.shape)
    if name == "adapt":
        assert prior is None
        start = x_T
    else:
        start = pipe.scheduler.add_noise(prior.mean + prior.std * eps_prime, x_T, torch.tensor([999, 999]))
        torch.testing.assert_close(prior.start(denoiser.schedule, x_T, eps_prime), start, atol=1e-6, rtol=0)
    remaining = iter(noise)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: next(remaining))
        theirs = pipe(y, latents=start, num_inference_steps=nfe, guidance_scale=1.0, output_type="latent").images
    levels = yoso.sampling_levels(999, nfe)
    ours = yoso.sample(yoso.partial(yoso.predict_x0, denoiser), denoiser.schedule, levels, start, codec.cond(y), noise, limit=float("inf"))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_what_a_run_leaves(models, finished):
    """The adaptation's scheduler, the prior of the data's latents, logs of every stage, and the model itself as it was."""
    config = json.loads((finished / "adapt" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"], config["timestep_spacing"]) == ("v_prediction", True, "trailing")
    denoiser, codec = load(finished / "adapt" / "pipeline")
    assert denoiser.schedule.alpha[-1] < 1e-3 and load(finished / "full" / "pipeline")[0].schedule.alpha[-1] > 0.06
    pictures = torch.stack([plumbing.shapes.Shapes(codec.picture_size)[i]["image"] for i in range(8)]).float() / 127.5 - 1
    prior = InformativePrior.read(finished / "full" / "pipeline")
    torch.testing.assert_close(prior.mean, codec.encode(pictures).mean(0), atol=1e-5, rtol=0)
    for stage in ("adapt-1", "adapt-2"):
        assert "L_adapt" in (finished / "adapt" / stage / "metrics.jsonl").read_text()
    for name in ("full", "lora", "adapt"):
        assert (finished / name / "comparison.png").exists() and (finished / name / "samples" / "0000003.png").exists()
        net, origin = load(finished / name / "pipeline")[0].net.state_dict(), load(models / "sd")[0].net.state_dict()
        assert any(not torch.equal(net[k], v) for k, v in origin.items())


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "kohya.safetensors"])
def test_the_lora_gives_the_same_picture_in_plain_diffusers(models, finished, file):
    z, y = torch.randn(2, 4, 8, 8), CAPTIONS[:2]
    call = dict(prompt=y, latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    expected = plain(finished / "lora" / "pipeline")(**call).images
    pipe = plain(models / "sd", StableDiffusionPipeline)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=4)
    bare = pipe(**call).images
    pipe.load_lora_weights(finished / "lora", weight_name=file)
    found = pipe(**call).images
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (bare - expected).abs().max() > 10 * (found - expected).abs().max()


def build(models, *more, seed=1):
    """fine_tune_step's arguments, with D's last layer away from zero, so that its gradients are seen."""
    config = plumbing.cli.parse_config(yoso.FineTune, yoso.FINE_TUNE_PRESETS, [str(f) for f in flags(models, "unused", *more)], "", yoso.preset_of)
    teacher, codec = load(models / "sd")
    torch.manual_seed(seed)
    features = HalfUNet(teacher.net, share=config.rank > 0)
    discriminator = yoso.LatentDiscriminator(teacher.net, 8)
    torch.nn.init.normal_(discriminator.end.weight)
    if config.rank:
        generator, parameters = Denoiser(teacher.net, teacher.schedule, "epsilon", "student"), common.add_lora(teacher.net, "student", 4, 4)
        with torch.no_grad():
            for p in parameters.values():
                p.add_(0.05 * torch.randn_like(p))
    else:
        generator, parameters = teacher, common.Weights(teacher.net.requires_grad_(True).named_parameters())
    if config.gradient_checkpointing:
        common.enable_checkpointing(generator.net), common.enable_checkpointing(discriminator.features.unet)
    none = torch.optim.SGD([torch.zeros(1)], 1.0)
    pictures = torch.stack([plumbing.shapes.Shapes(32)[i]["image"] for i in range(4)]).float() / 127.5 - 1
    return dict(iteration=0, pictures=pictures, captions=CAPTIONS, run=plumbing.run.Run(config), config=config, codec=codec, codec_d=codec,
                generator=generator, discriminator=discriminator, features=features, parameters=parameters, optimizer_g=none, optimizer_d=none)


def calls_of(step):
    """(forwards of G, of D, of the frozen features) in one step, each as a list of whether its output carries a graph."""
    seen = dict(generator=[], discriminator=[], features=[])
    networks = dict(generator=step["generator"].net, discriminator=step["discriminator"], features=step["features"])
    for name, network in networks.items():
        note = lambda _, inputs, output, name=name: seen[name].append((output if torch.is_tensor(output) else output.sample).requires_grad)
        network.register_forward_hook(note)
    yoso.fine_tune_step(**step)
    return [seen[name] for name in networks]


@pytest.mark.parametrize("more, expected", [
    ([], ([True, False, False], [True, True], [True, False])),
    (["--rank", 4], ([True, False, False], [True, True], [True, False])),
    (["--rec-distance", "latent"], ([True, False, False], [True, True], [True, False, False])),
    (["--lambda-con", 0], ([True, False], [True, True], [])),
    (["--con-distance", "l2"], ([True, False, False], [True, True], [])),
    (["--adversary", "data"], ([True, False], [True, True], [True, False]))],
    ids=["Eq. 6", "LoRA", "both latent", "no consistency", "l2", "data"])
def test_no_network_pass_is_spent_twice(models, more, expected):
    """G at t with its graph, at t_k and t_m without; D once for both sides, once for G; the features of fake and of the others once."""
    generator, discriminator, features = calls_of(build(models, *more))
    assert (generator, discriminator, sorted(features, reverse=True)) == expected


@pytest.mark.parametrize("rank", [0, 4])
def test_who_moves_whom(models, rank):
    """L_D's gradient stays in D, L_G's in the trained parameters; the frozen half and a LoRA's base get none."""
    step = build(models, "--rank", rank)
    seen = {}
    update = yoso.update_pretrained

    def watched(*arguments):
        seen["after D"] = [p.grad is None for p in step["parameters"].values()]
        seen["D"] = [p.grad.clone() for p in step["discriminator"].parameters()]
        return update(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(yoso, "update_pretrained", watched)
        yoso.fine_tune_step(**step)
    assert all(seen["after D"]) and all(p.grad is not None for p in step["parameters"].values())
    assert all(torch.equal(p.grad, before) for p, before in zip(step["discriminator"].parameters(), seen["D"]))
    assert all(p.requires_grad for p in step["discriminator"].parameters())
    assert all(p.grad is None for p in step["features"].parameters())
    trained = {id(p) for p in step["parameters"].values()}
    assert all(p.grad is None for p in step["generator"].net.parameters() if id(p) not in trained)


def test_the_levels_share_data_and_noise(models, monkeypatch):
    """Eq. 6: t - 250, t - 25 and t of the same x0 and eps, the first two not below 0; D is told t and the captions for both sides."""
    step, inputs, told = build(models), [], []
    predict = yoso.predict_x0
    monkeypatch.setattr(yoso, "predict_x0", lambda denoiser, x_t, t, cond: inputs.append((x_t, t)) or predict(denoiser, x_t, t, cond))
    step["discriminator"].register_forward_pre_hook(lambda _, arguments: told.append(arguments[1:]))
    yoso.fine_tune_step(**step)
    (x_t, t), (x_k, t_k), (x_m, t_m) = inputs
    assert torch.equal(t_k, (t - 250).clamp(min=0)) and torch.equal(t_m, (t - 25).clamp(min=0))
    text = step["codec"].cond(CAPTIONS)["encoder_hidden_states"]
    for (level, cond), copies in zip(told, (2, 1)):
        assert torch.equal(level, t.repeat(copies)) and torch.equal(cond["encoder_hidden_states"], text.repeat(copies, 1, 1))
    draw = step["run"].draws(0)
    draw.randint(0, 1000), (eps := draw.randn(4, 8, 8))
    x0 = step["codec"].encode(step["pictures"])
    for x, level in inputs:
        torch.testing.assert_close(x, step["generator"].schedule.add_noise(x0, eps, level), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [[], ["--rank", 4], ["--adapt", "--adapt-iterations", 1]], ids=["full", "lora", "adapt"])
def test_the_frozen_half_stays_the_originals(models, tmp_path, monkeypatch, more):
    """Whatever is trained, Eq. 5's features are those of the pretrained network, also where they share its weights."""
    step, seen = yoso.fine_tune_step, []
    monkeypatch.setattr(yoso, "fine_tune_step", lambda *a: seen.append((a[7], a[8], a[9])) or step(*a))
    run(flags(models, tmp_path, "--lr", 0.01, "--lr-d", 0.01, *more))
    generator, discriminator, features = seen[-1]
    original = HalfUNet(load(models / "sd")[0].net).state_dict()
    assert equal(dict(features.state_dict()), dict(original)) and not equal(dict(discriminator.features.state_dict()), dict(original))
    if more != ["--rank", 4]:
        net = generator.net.state_dict()
        assert not all(torch.equal(net[k.removeprefix("unet.")], v) for k, v in original.items())


@pytest.mark.parametrize("con_weight", ["sqrt", "snr"])
def test_the_weights_are_limited_and_scaled(models, monkeypatch, con_weight):
    """0.5 min(SNR(t), 5) and 2 min(w(t), 5), at timesteps on both sides of the limits."""
    step, seen = build(models, "--con-weight", con_weight, "--lambda-con", 2), []
    loss, t = yoso.generator_loss, torch.tensor([3, 30, 300, 900])
    monkeypatch.setattr(yoso, "generator_loss", lambda *arguments: seen.append(arguments[4:6]) or loss(*arguments))
    monkeypatch.setattr(common.Draws, "randint", lambda self, low, high: t)
    yoso.fine_tune_step(**step)
    schedule = step["generator"].schedule
    snr_t, snr_con = schedule.snr(t).double(), schedule.snr((t - 25).clamp(min=0)).double()
    power = 0.5 if con_weight == "sqrt" else 1.0
    torch.testing.assert_close(seen[0][0].double(), 0.5 * snr_t.clamp(max=5), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen[0][1].double(), 2 * (1 / (snr_t**-power - snr_con**-power)).clamp(max=5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("more", [["--micro-batch", 2], ["--gradient-checkpointing"], ["--gradient-checkpointing", "--rank", 4]],
                         ids=["micro-batches", "checkpointing", "checkpointing, lora"])
def test_memory_flags_change_nothing(models, more):
    gradients = []
    for flags_of in (more, more[2:] if "--micro-batch" in more else more[1:]):
        step = build(models, *flags_of)
        yoso.fine_tune_step(**step)
        gradients.append([p.grad for p in (*step["parameters"].values(), *step["discriminator"].parameters())])
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


def test_the_discriminator_starts_undecided_and_reads_everything():
    torch.manual_seed(0)
    discriminator = yoso.LatentDiscriminator(tiny.unet(), 8)
    x, t, cond = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), dict(encoder_hidden_states=torch.randn(3, 5, 32))
    logits = discriminator(x, t, cond)
    assert torch.equal(logits, torch.zeros(3))
    assert yoso.discriminator_loss(logits, logits).item() == pytest.approx(2 * 0.693147, rel=1e-5)
    torch.nn.init.normal_(discriminator.end.weight)
    logits = discriminator(x, t, cond)
    others = (discriminator(-x, t, cond), discriminator(x, t.flip(0), cond), discriminator(x, t, dict(encoder_hidden_states=0 * cond["encoder_hidden_states"])),
              discriminator(x.flip(3), t, cond))
    assert all((other - logits).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize("name, more, stage", [
    ("full", [], "out"), ("lora", ["--rank", 4, "--alpha", 8], "out"), *(("adapt", ["--adapt"], s) for s in ("adapt-1", "adapt-2", "out"))])
def test_stopping_and_resuming_is_exact(models, finished, tmp_path, monkeypatch, name, more, stage):
    finish = plumbing.run.Run.finish_iteration

    def stop(self, iteration, losses):
        if self.out.name == stage and iteration + 1 == 2:
            self.signal = 15
        return finish(self, iteration, losses)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(plumbing.run.Run, "finish_iteration", stop)
        run(flags(models, tmp_path / "out", *more))
    run(flags(models, tmp_path / "out", *more))
    assert equal(state(tmp_path / "out"), state(finished / name))


def test_two_processes_equal_one(models, finished, tmp_path):
    command = ["--standalone", "--nproc-per-node", "2", ROOT / "yoso.py", *flags(models, tmp_path / "two", "--adapt")]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for stage in ("adapt-1", "adapt-2", "."):
        rows = [[json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()] for out in (finished / "adapt", tmp_path / "two")]
        for one, two in zip(*rows):
            for key in one.keys() & {"L_adapt", "L_D", "L_rec", "L_con", "L_adv"}:
                assert one[key] == pytest.approx(two[key], rel=1e-3 if stage == "." else 1e-4), (stage, key)


@pytest.mark.parametrize("more", [[], ["--adapt"], ["--rank", 4], ["--adapt", "--adapt-iterations", 0], ["--precision", "bf16"]],
                         ids=["full", "adapt", "lora", "direct", "bf16"])
def test_pixart_with_sds_half(models, tmp_path, more):
    run(flags(models, tmp_path / "out", "--model", models / "pixart", "--discriminator", models / "sd", *more))
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["iteration"] == 3 and all(torch.tensor(v).isfinite() for v in row.values())
    denoiser, codec = load(tmp_path / "out" / "pipeline")
    assert denoiser.prediction_type == ("v_prediction" if "--adapt" in more else "epsilon")
    if "--rank" in more:
        merged = load(models / "pixart", lora=tmp_path / "out")[0].net.state_dict()
        for key, value in denoiser.net.state_dict().items():
            torch.testing.assert_close(merged[key], value, atol=1e-5, rtol=1e-4)


def test_a_v_model_skips_the_first_stage(tmp_path):
    tiny.sd("v_prediction").save_pretrained(tmp_path / "v")
    run(flags(tmp_path, tmp_path / "out", "--model", tmp_path / "v", "--adapt"))
    assert (tmp_path / "out" / "adapt-2").exists() and not (tmp_path / "out" / "adapt-1").exists()


def test_image_to_image_in_one_step(finished):
    """diffusers' own pipeline at any strength: noise the picture to t = 1000 strength - 1, one call."""
    path = finished / "full" / "pipeline"
    pipe, (denoiser, codec) = plain(path, StableDiffusionImg2ImgPipeline), load(path)
    picture, noise = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, *codec.shape)
    encoded, t = codec.encode(picture), torch.tensor([599])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor", lambda *a, **k: noise)
        patched.setattr("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.retrieve_latents", lambda output, **k: output.latent_dist.mean)
        theirs = pipe(CAPTIONS[0], image=picture / 2 + 0.5, strength=1.0, timesteps=[599], guidance_scale=1.0, output_type="latent").images
    ours = yoso.predict_x0(denoiser, denoiser.schedule.add_noise(encoded, noise, t), t, codec.cond(CAPTIONS[:1]))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_controlnet_on_the_one_step(finished):
    path = finished / "full" / "pipeline"
    denoiser, codec = load(path)
    torch.manual_seed(1)
    control = ControlNetModel.from_unet(denoiser.net, conditioning_embedding_out_channels=(8, 16, 16)).eval()
    for p in control.parameters():  # a fresh one ends in zeros and would change nothing
        torch.nn.init.normal_(p, std=0.05)
    pipe = plain(path, StableDiffusionControlNetPipeline, controlnet=control)
    z, edges = torch.randn(1, *codec.shape), torch.rand(1, 3, 32, 32)
    call = dict(prompt=CAPTIONS[0], image=edges, latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="latent", height=32, width=32)
    cond, t = codec.cond(CAPTIONS[:1]), torch.tensor([999])
    with torch.no_grad():
        down, mid = control(z, t, controlnet_cond=edges, return_dict=False, **cond)
        ours = yoso.predict_x0(denoiser, z, t, dict(**cond, down_block_additional_residuals=down, mid_block_additional_residual=mid))
        bare = yoso.predict_x0(denoiser, z, t, cond)
    theirs = pipe(**call).images
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert (bare - ours).abs().max() > 0.01


def test_data_made_by_a_model(models, finished, tmp_path, monkeypatch):
    """A captioned folder; a killed generation goes on to the same pictures; other flags are refused."""
    monkeypatch.setattr(yoso, "chunk_for", lambda codec: 4)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:3]))
    made = ["--generate", 10, "--generator", finished / "adapt" / "pipeline", "--nfe", 2, "--prompts", tmp_path / "prompts.txt"]
    run(flags(models, tmp_path / "one", *made))
    files = sorted((tmp_path / "one" / "data").glob("*.png"))
    assert len(files) == 10 and [f.with_suffix(".txt").read_text().strip() for f in files[:4]] == [*CAPTIONS[:3], CAPTIONS[0]]
    config = yoso.FineTune(**{**json.loads((tmp_path / "one" / "config.json").read_text()), "out": str(tmp_path / "two")})
    draw, count = yoso.draw_pictures, []

    def killed(*arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(yoso, "draw_pictures", killed)
        yoso.prepare_data(config, torch.device("cpu"))
    assert len(list((tmp_path / "two" / "data").glob("*.txt"))) == 4
    yoso.prepare_data(config, torch.device("cpu"))
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / "data" / file.name).read_bytes()
    generator = finished / "adapt" / "pipeline"
    pictures = torch.cat(list(draw(*load(generator), [*CAPTIONS[:3], CAPTIONS[0]], 2, 0, InformativePrior.read(generator))))
    shown = torch.from_numpy(np.array(Image.open(files[0]))).permute(2, 0, 1)
    assert (shown / 127.5 - 1 - pictures[0]).abs().max() < 0.005  # half a grey level
    with pytest.raises(UserError, match="made with other flags"):
        yoso.prepare_data(common.dataclasses.replace(config, nfe=1), torch.device("cpu"))
    with pytest.raises(UserError, match="holds 2 pictures more"):
        yoso.prepare_data(common.dataclasses.replace(config, generate=8), torch.device("cpu"))
    monkeypatch.setattr(yoso, "load", None)  # complete: the generator is not read again, here or where another run left it
    elsewhere = common.dataclasses.replace(config, out=str(tmp_path / "three"), resume=config.out)
    assert yoso.prepare_data(elsewhere, torch.device("cpu")) == str(tmp_path / "two" / "data")


def test_merge_command(models, finished, tmp_path):
    """With high = base the tuned model itself comes out, with its scheduler; an existing folder is refused."""
    command = ["merge", "--base", models / "sd", "--high", models / "sd", "--tuned", finished / "adapt" / "pipeline", "--out", tmp_path / "merged"]
    run(command)
    merged, tuned = (load(path)[0] for path in (tmp_path / "merged", finished / "adapt" / "pipeline"))
    assert merged.prediction_type == "v_prediction" and torch.equal(merged.schedule.alpha, tuned.schedule.alpha)
    for key, value in tuned.net.state_dict().items():
        torch.testing.assert_close(merged.net.state_dict()[key], value, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="exists already"):
        run(command)
    with pytest.raises(UserError, match="one architecture"):
        run(["merge", "--base", models / "sd", "--high", models / "pixart", "--tuned", models / "sd", "--out", tmp_path / "other"])


def test_sample_command(finished, tmp_path, capsys):
    run(["sample", "--run", finished / "full", "--device", "cpu", "--grid", tmp_path / "a.png", "--num", 3, "--nfe", 2, "--prompts", CAPTIONS[0]])
    run(["sample", "--run", finished / "full", "--device", "cpu", "--grid", tmp_path / "b.png", "--num", 3, "--nfe", 2, "--prompts", CAPTIONS[0],
         "--no-prior"])
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match="--nfe 3"):
        run(["sample", "--run", finished / "full", "--nfe", 3])


def test_every_logged_key_is_explained_in_the_readme(finished):
    keys = {key for log in finished.rglob("metrics.jsonl") for row in log.read_text().splitlines() for key in json.loads(row)}
    assert {"L_adapt", "L_D", "L_rec", "L_con", "L_adv"} <= keys
    readme = (ROOT / "README.md").read_text()
    assert [key for key in keys if f"| `{key}` |" not in readme] == []


@pytest.mark.parametrize("arguments, preset", [
    ([], "shapes-epsilon"), (["--adapt"], "shapes"), (["--model", "stable-diffusion-v1-5/stable-diffusion-v1-5"], "full"),
    (["--model", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--rank", "64"], "lora")])
def test_a_real_model_does_not_get_the_mini_models_rates(arguments, preset):
    assert plumbing.cli.parse_config(yoso.FineTune, yoso.FINE_TUNE_PRESETS, arguments, "", yoso.preset_of).preset == preset


def test_wrong_input(models, tmp_path):
    tiny.pixel(tmp_path / "pixels", classes=None)
    wordless = tmp_path / "wordless"
    wordless.mkdir()
    for i in range(8):
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(wordless / f"{i}.png")
    for more, message in ((["--model", models / "pixart"], "has no UNet"), (["--model", tmp_path / "pixels"], "works on pixels"),
                          (["--con-distance", "lpips"], "--con-distance lpips: unknown"), (["--rank", -1], "--rank -1"),
                          (["--generate", 5], "needs a --generator"), (["--generate", 5, "--generator", models / "none"], "no such directory"),
                          (["--nfe", 3], "--nfe 3: unknown"), (["--ema", 1], "--ema 1"), (["--micro-batch", 3], "does not divide"),
                          (["--dataset", "none"], "--dataset none: unknown"), (["--alpha", 0], "--alpha 0"),
                          (["--dataset", ""], "give a folder of captioned pictures"), (["--con-offset", 0], "--con-offset 0"),
                          (["--lr-d", 0], "--lr-d 0"), (["--weight-limit", "inf"], "--weight-limit inf"),
                          (["--generator", models / "sd"], "only draws pictures with --generate"),
                          (["--dataset", wordless], "have no captions")):
        with pytest.raises(UserError, match=message):
            run(flags(models, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_more_wrong_input_after_a_run(models, finished, tmp_path):
    with pytest.raises(UserError, match="has zero terminal SNR already"):
        run(flags(models, tmp_path / "out", "--model", finished / "adapt" / "pipeline", "--adapt"))
    with pytest.raises(UserError, match="--seed -1"):
        run(["sample", "--run", finished / "full", "--seed", -1])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pipeline").symlink_to(finished / "full" / "pipeline")
    (tmp_path / "other" / "config.json").write_text(json.dumps(dict(model="x", divergence="kl")))
    with pytest.raises(UserError, match="not the configuration of a run of this script"):
        run(["sample", "--run", tmp_path / "other"])
    tiny.sdxl().save_pretrained(tmp_path / "sdxl")
    with pytest.raises(UserError, match="must be of one architecture"):
        run(["merge", "--base", models / "sd", "--high", tmp_path / "sdxl", "--tuned", models / "sd", "--out", tmp_path / "merged"])


def test_a_lora_after_an_adaptation_continues_in_another_folder(models, tmp_path):
    """--resume takes the adaptation along: the LoRA lies on the very network that it was trained on."""
    both = ["--adapt", "--rank", 2]
    run(flags(models, tmp_path / "whole", *both))
    run(flags(models, tmp_path / "half", *both, "--iterations", 2))
    run(flags(models, tmp_path / "rest", *both, "--resume", tmp_path / "half"))
    for part in ("adapt-2/pipeline", "pipeline"):
        a, b = (load(tmp_path / name / part)[0].net.state_dict() for name in ("whole", "rest"))
        assert all(torch.equal(a[key], b[key]) for key in a)
