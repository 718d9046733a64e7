"""The real command of YOSO: what a run leaves, resuming, exports, sampling, other commands, flags and errors.

What from scratch it shares with every method is in test_run.py.
"""

import dataclasses
import json
import math
import operator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from helpers import (
    CAPTIONS,
    TINY,
    drawings,
    equal,
    fails,
    levels_apart,
    metrics,
    plain,
    ranks,
    state,
    stop_at,
    unexplained,
    weights,
)
from PIL import Image
from safetensors.torch import load_file

import plumbing.cli
import yoso
from common import HalfUNet, InformativePrior, UserError, load
from plumbing.data import FreshData
from plumbing.grids import save_grid
from plumbing.run import Run
from plumbing.shapes import Shapes

# Rates at which two iterations change pictures visibly.
FINE_TUNE = ["--preset", "mini", "--iterations", 2, "--adapt-iterations", 2, "--batch-size", 4, "--lr", 0.02,
             "--lr-d", 0.01, "--lr-warmup", 3, "--ema", 0.5, "--ema-ramp", "--device", "cpu",
             "--log-every", 1, "--sample-every", 2, "--prior-num", 8]
KINDS = dict(full=[], lora=["--rank", 4, "--alpha", 8], adapt=["--adapt", "--rank", 4, "--alpha", 4],
             scratch=["--latent-z", 8])


def run(arguments):
    yoso.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny Stable Diffusion and PixArt pipelines."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny.sd().save_pretrained(root / "sd")
    tiny.pixart().save_pretrained(root / "pixart")
    return root


def flags(kind, models, out, *more):
    """The command line of a run of two iterations (a stage)."""
    if kind == "scratch":
        return [*TINY, "--iterations", 2, "--log-every", 1, "--out", out, *KINDS[kind], *more]
    return [*FINE_TUNE, "--model", models / "sd", "--out", out, *KINDS[kind], *more]


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A finished run of each kind; its folder is `out`, who took part in its steps `models`."""
    root, runs, step = tmp_path_factory.mktemp("runs"), {}, yoso.train_step

    def noting(iteration, pictures, captions, config, run, cast):
        runs[run.out.name] = SimpleNamespace(out=run.out, models=cast)
        return step(iteration, pictures, captions, config, run, cast)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(yoso, "train_step", noting)
        for kind in KINDS:
            run(flags(kind, models, root / kind))
    return runs


# What a run leaves

def test_what_a_run_leaves(finished):
    """The adaptation's scheduler, the prior of the data's latents, pictures, and logs of every stage."""
    out = finished["adapt"].out
    config = json.loads((out / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    expected = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert expected.items() <= config.items() and InformativePrior.read(out / "pipeline") is None
    assert load(out / "pipeline")[0].schedule.alpha[-1] < 1e-3
    for stage in ("adapt-1", "adapt-2"):
        assert [set(row) & {"L_adapt", "L_D"} for row in metrics(out / stage)] == [{"L_adapt"}] * 2
    out = finished["full"].out
    denoiser, codec = load(out / "pipeline")
    assert denoiser.schedule.alpha[-1] > 0.06 and denoiser.prediction_type == "epsilon"
    prior, latents = InformativePrior.read(out / "pipeline"), codec.encode(drawings(8, codec.picture_size))
    torch.testing.assert_close(prior.mean, latents.mean(0), atol=1e-5, rtol=0)
    for kind in ("full", "lora", "adapt"):
        out = finished[kind].out
        assert {p.name for p in (out / "samples").iterdir()} == {"0000002.png", "final.png"}
        with Image.open(out / "comparison.png") as grid:  # five rows of eight pictures, doubled to 64 pixels
            assert grid.width > 8 * 66 + 50 and grid.height > 5 * 66 + 20, "and their labels"
        keys = {"L_D", "D_real", "D_fake", "L_rec", "L_con", "L_adv"}
        assert [keys <= set(row) and row["iteration"] for row in metrics(out)] == [1, 2]
        assert metrics(out)[0]["L_D"] == pytest.approx(2 * math.log(2), rel=1e-5), "D starts undecided"


def test_the_export_is_the_average(models, finished):
    """Its weights are the checkpoint's averages; those of a LoRA are folded into what it was trained on."""
    adapted = finished["adapt"].out / "adapt-2" / "pipeline"
    for kind, base in dict(full=None, lora=models / "sd", adapt=adapted).items():
        out = finished[kind].out
        exported, saved = weights(out / "pipeline"), state(out)
        assert not equal(saved["ema"], saved["generator"])
        if kind == "full":
            assert equal(exported, saved["ema"])
            continue
        start, scale, changed = weights(base), dict(lora=2.0, adapt=1.0)[kind], 0
        for key, value in start.items():
            a, b = (saved["ema"].get(key.replace(".weight", f".lora_{side}.student.weight")) for side in "AB")
            if a is not None:
                delta = scale * (b.flatten(1) @ a.flatten(1)).view(value.shape)
                changed += delta.abs().max() > 1e-3
                value = value + delta
            torch.testing.assert_close(exported[key], value, atol=1e-6, rtol=1e-5)
        assert changed == len(saved["ema"]) / 2, "every layer of the LoRA"


def test_the_comparison_is_of_the_average(finished, tmp_path):
    """Below the original, the exported model by 1, 2 and 4 calls."""
    out = finished["full"].out
    sampler, _ = yoso.load_sampler(out)
    captions = [Shapes(32)[i]["caption"] for i in range(8)]
    pictures = [picture for nfe in (1, 2, 4) for picture in yoso.draw_pictures(sampler, captions, nfe, 0)]
    original = load_file(out / "original.safetensors")["pictures"]
    save_grid(torch.cat([original, *pictures]), tmp_path / "grid.png")
    assert levels_apart(out / "comparison.png", tmp_path / "grid.png") <= 1


def test_the_frozen_half_stays_the_originals(models, finished):
    """Whatever is trained, Eq. 5's features are those of the pretrained network, which they may share."""
    original = HalfUNet(load(models / "sd")[0].net).state_dict()
    for kind in ("full", "lora", "adapt"):
        cast = finished[kind].models
        assert equal(dict(cast.half.state_dict()), dict(original))
        assert not equal(dict(cast.discriminator.features.state_dict()), dict(original))
        trained = cast.generator.trainable()
        assert trained and all(("lora_" in name) == (kind != "full") for name in trained)


def test_a_run_with_a_latent_leaves_its_unet(finished, tmp_path, capsys):
    """Its class embedding is the mapping network of z; diffusers reads the rest."""
    out = finished["scratch"].out
    average, unet = state(out)["ema"], out / "pipeline" / "unet"
    exported = load_file(unet / "diffusion_pytorch_model.safetensors")
    assert equal(exported, average) and not (out / "pipeline" / "model_index.json").exists()
    assert any(key.startswith("class_embedding.layers.") for key in exported)
    assert UNet2DModel.load_config(unet)["class_embed_type"] == "identity"
    run(["sample", "--run", out, "--device", "cpu", "--grid", tmp_path / "grid.png"])
    assert (tmp_path / "grid.png").read_bytes() == (out / "samples" / "final.png").read_bytes()
    assert "64 samples with 1 network call(s)" in capsys.readouterr().out
    sampler, config = yoso.load_sampler(out)
    assert equal(dict(sampler.generator.net.state_dict()), average)
    assert config.latent_z == sampler.latent_z == 8


def test_every_logged_key_is_explained_in_the_readme(finished):
    assert unexplained(*(one.out for one in finished.values())) == []


# Exports in other tools

@pytest.mark.parametrize("kind", ["full", "adapt"])
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_the_export_samples_in_diffusers_as_here(finished, kind, nfe):
    """From the informative prior as the README does it, or without one after --adapt."""
    path = finished[kind].out / "pipeline"
    (denoiser, codec), prior, pipe, y = load(path), InformativePrior.read(path), plain(path), CAPTIONS[:2]
    x_T, eps_prime, *noise = torch.randn(2 + nfe, 2, *codec.shape)
    start = x_T
    if prior:
        start = pipe.scheduler.add_noise(prior.mean + prior.std * eps_prime, x_T, torch.tensor([999, 999]))
        torch.testing.assert_close(prior.start(denoiser.schedule, x_T, eps_prime), start, atol=1e-6, rtol=0)
    remaining = iter(noise)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: next(remaining))
        theirs = pipe(y, latents=start, num_inference_steps=nfe, guidance_scale=1.0,
                      output_type="latent").images
    ours = yoso.sample(denoiser, yoso.sampling_levels(999, nfe), start, noise, codec.cond(y))
    close = dict(atol=1e-4 * ours.abs().max().item(), rtol=0)
    torch.testing.assert_close(ours, theirs, **close)
    # draw_pictures does the same from its own numbers.
    draws = iter([x_T, eps_prime, *noise[:nfe - 1]])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(yoso.Draws, "randn", lambda self, *shape: next(draws))
        pictures, = yoso.draw_pictures(yoso.Sampler(denoiser, codec, prior), y, nfe, 0)
    torch.testing.assert_close(pictures, codec.decode(ours).clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "kohya.safetensors"])
def test_the_lora_gives_the_same_picture_in_plain_diffusers(models, finished, file):
    """In both formats, to a thousandth of what the LoRA changes."""
    out = finished["lora"].out
    call = dict(prompt=CAPTIONS[:2], latents=torch.randn(2, 4, 8, 8), num_inference_steps=1,
                guidance_scale=1.0, output_type="latent")
    expected = plain(out / "pipeline")(**call).images
    pipe = plain(models / "sd", StableDiffusionPipeline)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=4)
    change = (pipe(**call).images - expected).abs().max().item()
    assert change > 0.1 * expected.abs().max()
    pipe.load_lora_weights(out, weight_name=file)
    torch.testing.assert_close(pipe(**call).images, expected, atol=1e-3 * change, rtol=0)


def test_image_to_image_in_one_step(finished):
    """diffusers' own pipeline at any strength: noise the picture to t = 1000 strength - 1, one call."""
    path = finished["full"].out / "pipeline"
    pipe, (denoiser, codec) = plain(path, StableDiffusionImg2ImgPipeline), load(path)
    picture, noise = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, *codec.shape)
    encoded, t = codec.encode(picture), torch.tensor([599])
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"{module}.randn_tensor", lambda *a, **k: noise)
        patched.setattr(f"{module}.retrieve_latents", lambda output, **k: output.latent_dist.mean)
        theirs = pipe(CAPTIONS[0], image=picture / 2 + 0.5, strength=1.0, timesteps=[599],
                      guidance_scale=1.0, output_type="latent").images
    x_t = denoiser.schedule.add_noise(encoded, noise, t)
    ours = denoiser.predict(x_t, t, "sample", codec.cond(CAPTIONS[:1])).detach()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_controlnet_on_the_one_step(finished):
    path = finished["full"].out / "pipeline"
    denoiser, codec = load(path)
    torch.manual_seed(1)
    control = ControlNetModel.from_unet(denoiser.net, conditioning_embedding_out_channels=(8, 16, 16)).eval()
    for p in control.parameters():  # a fresh one ends in zeros and would change nothing
        torch.nn.init.normal_(p, std=0.05)
    pipe = plain(path, StableDiffusionControlNetPipeline, controlnet=control)
    z, edges = torch.randn(1, *codec.shape), torch.rand(1, 3, 32, 32)
    theirs = pipe(prompt=CAPTIONS[0], image=edges, latents=z, num_inference_steps=1, guidance_scale=1.0,
                  output_type="latent", height=32, width=32).images
    cond, t = codec.cond(CAPTIONS[:1]), torch.tensor([999])
    with torch.no_grad():
        down, mid = control(z, t, controlnet_cond=edges, return_dict=False, **cond)
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        ours, bare = (denoiser.predict(z, t, "sample", cond | more) for more in (residuals, {}))
    change = (bare - ours).abs().max().item()
    assert change > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-3 * change, rtol=1e-5)


# Resuming and processes

@pytest.mark.parametrize("kind, stage, elsewhere", [
    ("scratch", "out", False), ("full", "out", False), ("adapt", "adapt-2", False), ("adapt", "out", True),
    pytest.param("adapt", "adapt-1", False, marks=pytest.mark.slow),
    pytest.param("lora", "out", False, marks=pytest.mark.slow)])
def test_stopping_and_resuming_is_exact(models, finished, tmp_path, monkeypatch, kind, stage, elsewhere):
    """By the same command, or with --resume in another folder, which takes the adaptation along."""
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        stop_at(patched, stage, 1)
        run(flags(kind, models, tmp_path / "out"))
    assert stopped.value.code == 128 + 15 and not (tmp_path / "out" / "pipeline").exists()
    out, more = tmp_path / "out", []
    if elsewhere:
        monkeypatch.setattr(yoso, "adapt_step", None)  # not called: all of its iterations are done
        out, more = tmp_path / "elsewhere", ["--resume", out]
    run(flags(kind, models, out, *more))
    assert equal(state(out), state(finished[kind].out))
    if kind == "adapt":
        for part in ("adapt-2/pipeline", "pipeline"):
            assert equal(weights(out / part), weights(finished[kind].out / part))
    elif kind != "scratch":
        ours, theirs = (path / "comparison.png" for path in (out, finished[kind].out))
        assert ours.read_bytes() == theirs.read_bytes()


def test_two_processes_equal_one(models, finished, tmp_path):
    """In all stages, whose batch is shared out."""
    ranks(2, yoso.main, [str(flag) for flag in flags("adapt", models, tmp_path)])
    for stage in ("adapt-1", "adapt-2", "."):
        one, two = metrics(finished["adapt"].out / stage), metrics(tmp_path / stage)
        assert len(one) == len(two) == 2
        for a, b in zip(one, two):
            keys = a.keys() & {"L_adapt", "L_D", "L_rec", "L_con", "L_adv"}
            assert len(keys) == (4 if stage == "." else 1)
            for key in keys:
                assert a[key] == pytest.approx(b[key], rel=1e-3 if stage == "." else 1e-4), (stage, key)
    assert state(tmp_path).keys() == state(finished["adapt"].out).keys()


def test_the_rates_rise_and_fall(models, tmp_path, monkeypatch):
    """--lr-decay 0.5: constant for half of the iterations, then linearly to 0; their number is bound.

    --lr-warmup 8 is a factor, 1 / 8 more in each.
    """
    rates = []

    def step(iteration, pictures, captions, config, run, cast):
        rates.append([o.param_groups[0]["lr"] for o in (cast.optimizer_g, cast.optimizer_d)])
        return dict(L_D=torch.zeros(()))

    monkeypatch.setattr(yoso, "train_step", step)
    decaying = ["--lr", 1.0, "--lr-d", 10.0, "--lr-decay", 0.5, "--lr-warmup", 8, "--save-every", 8]
    run(flags("scratch", models, tmp_path, *decaying, "--iterations", 8))
    expected = [(i + 1) / 8 * left for i, left in enumerate([1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])]
    assert rates == [[pytest.approx(rate), pytest.approx(10 * rate)] for rate in expected]
    with pytest.raises(UserError, match="--iterations was 8, is 9"):
        run(flags("scratch", models, tmp_path, *decaying, "--iterations", 9))


# Other models and data

@pytest.mark.parametrize("more", [
    ["--adapt", "--precision", "bf16"], ["--adapt", "--adapt-iterations", 0, "--rank", 4, "--alpha", 8],
    pytest.param([], marks=pytest.mark.slow)], ids=["adapt, bf16", "direct switch, LoRA", "epsilon"])
def test_pixart_with_sds_half(models, tmp_path, more):
    """PixArt predicts x0, half of Stable Diffusion judges it; the LoRA is an adapter folder of peft."""
    out, networks = tmp_path / "out", ["--model", models / "pixart", "--discriminator", models / "sd"]
    run([*FINE_TUNE, *networks, "--out", out, *more])
    row = metrics(out)[-1]
    assert row["iteration"] == 2 and all(math.isfinite(value) for value in row.values())
    denoiser, codec = load(out / "pipeline")
    assert denoiser.prediction_type == ("v_prediction" if "--adapt" in more else "epsilon")
    assert (InformativePrior.read(out / "pipeline") is None) == ("--adapt" in more)
    trained, base = weights(out / "pipeline"), weights(models / "pixart")
    assert not equal(trained, base)
    if "--rank" in more:
        merged = load(out / "adapt-2" / "pipeline", lora=out)[0].net.state_dict()
        for key, value in trained.items():
            torch.testing.assert_close(merged[key], value, atol=1e-5, rtol=1e-4)
        assert max((value - base[key]).abs().max() for key, value in trained.items()) > 1e-3


def test_a_v_model_skips_the_first_stage(tmp_path):
    tiny.sd("v_prediction").save_pretrained(tmp_path / "v")
    arguments = [*FINE_TUNE, "--model", tmp_path / "v", "--out", tmp_path / "out", "--adapt"]
    config = plumbing.cli.parse_config(yoso.Config, yoso.PRESETS, [str(a) for a in arguments], "")
    student = yoso.adapt(config, *load(tmp_path / "v"), yoso.load_dataset("shapes", 32))
    assert student.prediction_type == "v_prediction" and yoso.ends_in_noise(student)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapt-2"}
    assert len(metrics(tmp_path / "out" / "adapt-2")) == 2


def test_data_made_by_a_model(models, finished, tmp_path, monkeypatch):
    """A captioned folder; a killed generation goes on to the same pictures; other flags are refused."""
    monkeypatch.setattr(yoso, "chunk_for", lambda codec: 4)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:3]))
    lora = finished["lora"].out
    made = ["--generate", 10, "--generator", models / "sd", "--generator-lora", lora, "--nfe", 2, "--prompts",
            tmp_path / "prompts.txt"]
    run(flags("lora", models, tmp_path / "one", *made, "--iterations", 1))
    files = sorted((tmp_path / "one" / "data").glob("*.png"))
    captions = [file.with_suffix(".txt").read_text().strip() for file in files]
    assert len(files) == 10 and captions == [CAPTIONS[i % 3] for i in range(10)]
    drawn = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    sampler = yoso.Sampler(*load(models / "sd", lora=lora))
    pictures = torch.cat(list(yoso.draw_pictures(sampler, captions, 2, 0)))
    assert (drawn / 127.5 - 1 - pictures).abs().max() < 0.005  # half a grey level

    config = plumbing.cli.read_config(yoso.Config, tmp_path / "one" / "config.json")
    two = dataclasses.replace(config, out=str(tmp_path / "two"))
    draw, count = yoso.draw_pictures, []

    def killed(*arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(yoso, "draw_pictures", killed)
        yoso.generated_data(two, torch.device("cpu"))
    assert len(list((tmp_path / "two" / "data").glob("*.txt"))) == 4
    yoso.generated_data(two, torch.device("cpu"))
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / "data" / file.name).read_bytes()
    # Complete, it needs no generator any more, here or where the run that this one continues left it.
    monkeypatch.setattr(yoso, "load", None)
    elsewhere = dataclasses.replace(config, out=str(tmp_path / "three"), resume=two.out)
    assert Path(yoso.generated_data(elsewhere, torch.device("cpu"))) == tmp_path / "two" / "data"
    monkeypatch.undo()
    refused = (dict(nfe=1), "made with other flags"), (dict(generate=8), "holds 2 pictures more")
    for change, message in refused:
        with pytest.raises(UserError, match=message):
            yoso.generated_data(dataclasses.replace(two, **change), torch.device("cpu"))


@pytest.mark.parametrize("kind, more", [("full", []), ("adapt", ["--cache-latents"])])
def test_data_drawn_every_step(models, tmp_path, kind, more):
    """Nothing is stored of them, and a run that was stopped ends with the same weights and prior."""
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:3]))
    drawn = ["--generator", models / "sd", "--dataset", "", "--prompts", tmp_path / "prompts.txt", *more]
    one, two = (flags(kind, models, tmp_path / name, *drawn) for name in ("one", "two"))
    run(one)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        stop_at(patched, "two", 1)
        run(two)
    run(two)
    assert equal(state(tmp_path / "one"), state(tmp_path / "two"))
    assert not list(tmp_path.glob("*/data")) and not list(tmp_path.glob("*/cache/latents"))
    priors = [InformativePrior.read(tmp_path / name / "pipeline") for name in ("one", "two")]
    if kind == "full":
        config = plumbing.cli.read_config(yoso.Config, tmp_path / "one" / "config.json")
        data = FreshData(config, Run(config), load(models / "sd")[1])
        expected = InformativePrior.of(torch.stack([data[i]["image"] for i in range(8)]))
        for prior in priors:
            torch.testing.assert_close(prior.mean, expected.mean, atol=1e-5, rtol=0)
            torch.testing.assert_close(prior.std, expected.std, atol=1e-5, rtol=0)
    else:
        assert priors == [None, None]


# Other commands

def test_merge_command(models, finished, tmp_path, capsys):
    """With high = base the tuned model itself comes out, with its scheduler and its prior."""
    for kind in ("full", "adapt"):
        tuned, out = finished[kind].out / "pipeline", tmp_path / kind
        command = ["merge", "--base", models / "sd", "--high", models / "sd", "--tuned", tuned, "--out", out]
        run(command)
        assert f"{out}: a diffusers pipeline" in capsys.readouterr().out
        (merged, _), (expected, _) = load(out), load(tuned)
        assert merged.prediction_type == expected.prediction_type
        assert torch.equal(merged.schedule.alpha, expected.schedule.alpha)
        for key, value in expected.net.state_dict().items():
            torch.testing.assert_close(merged.net.state_dict()[key], value, atol=1e-6, rtol=1e-5)
        assert (out / InformativePrior.FILE).exists() == (kind == "full")
    with pytest.raises(UserError, match="exists already"):
        run(command)
    tiny.sdxl().save_pretrained(tmp_path / "sdxl")
    for high in (models / "pixart", tmp_path / "sdxl"):
        with pytest.raises(UserError, match="must be of one architecture"):
            run([*command[:4], high, "--tuned", models / "sd", "--out", tmp_path / "other"])
    assert not (tmp_path / "other").exists()


def test_sample_command(finished, tmp_path, monkeypatch, capsys):
    """From the prior or without it, by 1, 2 or 4 calls; its own prompts where none are given."""
    def grid(*more):
        path = tmp_path / "grid.png"
        run(["sample", "--run", finished["full"].out, "--device", "cpu", "--grid", path, "--num", 3, *more])
        return path.read_bytes()

    one = grid("--prompts", *CAPTIONS[:2])
    assert one == grid("--prompts", *CAPTIONS[:2], CAPTIONS[0])
    others = (["--no-prior"], ["--nfe", 2], ["--seed", 1])
    pictures = {one, grid(), *(grid("--prompts", *CAPTIONS[:2], *more) for more in others)}
    assert len(pictures) == 5, "all different"
    command = ["sample", "--run", finished["full"].out]
    assert "--nfe 3: choose 1, 2 or 4" in fails(monkeypatch, capsys, yoso, *command, "--nfe", 3)
    assert "--seed -1: must be at least 0" in fails(monkeypatch, capsys, yoso, *command, "--seed", -1)
    scratch = ["sample", "--run", finished["scratch"].out, "--prompts", "x"]
    assert "was trained without captions" in fails(monkeypatch, capsys, yoso, *scratch)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(dict(model="x", divergence="kl")))
    error = fails(monkeypatch, capsys, yoso, "sample", "--run", tmp_path / "other")
    assert "not the configuration of a run of this script" in error
    (tmp_path / "other" / "config.json").write_text(json.dumps(dict(model="x")))
    assert "not finished" in fails(monkeypatch, capsys, yoso, "sample", "--run", tmp_path / "other")


@pytest.mark.parametrize("arguments, words", [
    ([], ["Defaults are those of --preset shapes", "sample, merge"]),
    (["--model", "a/b", "--rank", "64"], ["Defaults are those of --preset lora"]),
    (["sample"], ["yoso.py sample", "--no-prior"]),
    (["merge"], ["yoso.py merge", "base + alpha (high - base)"])],
    ids=lambda value: " ".join(value))
def test_help(arguments, words, capsys):
    """Every flag with its default in the preset that the others choose, and its range."""
    with pytest.raises(SystemExit) as stopped:
        yoso.main([*arguments, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and all(word in text for word in words)
    if not arguments or arguments[0] == "--model":
        for field in dataclasses.fields(yoso.Config):
            assert f"--{field.name.replace('_', '-')}" in text
        assert ("[0.02; at least 0" if not arguments else "[0.0; at least 0") in text, "--r1"


# Flags

def parse(*arguments):
    arguments = [str(argument) for argument in arguments]
    return plumbing.cli.parse_config(yoso.Config, yoso.PRESETS, arguments, "", yoso.preset_of)


@pytest.mark.parametrize("arguments, preset", [
    ([], "shapes"), (["--dataset", "cifar10"], "cifar10"), (["--dataset", "folder"], "small"),
    (["--model", "assets/mini-sd"], "mini-epsilon"), (["--model", "./assets/mini-sd/", "--adapt"], "mini"),
    (["--model", "assets/mini-sd", "--adapt", "--rank", 8], "mini-lora"), (["--model", "a/b"], "full"),
    (["--model", "a/b", "--rank", 64], "lora"), (["--model", "a/b", "--preset", "pixart"], "pixart")])
def test_the_preset_that_fits(arguments, preset):
    """A real model does not get the mini model's rates."""
    assert parse(*arguments).preset == preset


@pytest.mark.parametrize("preset", yoso.PRESETS)
def test_every_preset_can_be_trained(preset):
    """Its values are in range and work together."""
    more = ["--model", "a/b", "--dataset", "folder"] if preset in yoso.FINE_TUNE else []
    yoso.check(parse("--preset", preset, *more))
    more += ["--image-size", 32, "--latent-z", 0] if more else []  # what they are anyway
    yoso.check(parse("--preset", preset, *more))


def test_the_papers_numbers():
    config = parse("--dataset", "cifar10")
    assert (config.batch_size, config.iterations, config.lr, config.ema) == (256, 200_000, 2e-4, 0.9999)
    assert (config.levels, config.latent_z) == (4, 100)
    assert config.rec_distance == config.con_distance == "lpips"
    config = parse("--model", "a/b", "--rank", 64)
    assert (config.real_offset, config.con_offset, config.lr, config.ema) == (250, 25, 2e-5, 0.999)
    assert (config.rec_distance, config.con_distance, config.weight_limit) == ("l2", "latent", 5.0)


def in_range(value, limits):
    """Whether a number is a flag's, by its range as the dataclass states it."""
    compare = dict(above=operator.gt, least=operator.ge, below=operator.lt, most=operator.le)
    bounds = [name for name in compare if limits[name] is not None]
    return ((math.isfinite(value) or value == math.inf and limits["infinite"])
            and all(compare[name](value, limits[name]) for name in bounds))


NUMBERS = [field for field in dataclasses.fields(yoso.Config)
           if field.type in (int, float) and not field.metadata["choices"]]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_numbers_are_checked_against_their_range(field):
    """NaN never passes, infinity where a flag says so, and no number beyond the range."""
    limits, name = field.metadata, f"--{field.name.replace('_', '-')}"
    values = [-1, 0, 1, 2, *([math.nan, math.inf, 0.5, 1e-6] if field.type is float else [])]
    for value in values:
        if in_range(value, limits):
            assert getattr(parse(name, value), field.name) == value
        else:
            with pytest.raises(UserError, match=f"^{name} {field.type(value)}: must be "):
                parse(name, value)


@pytest.mark.parametrize("arguments, message", [
    (["--r1", "nan"], "--r1 nan: must be"), (["--r1", "inf"], "--r1 inf: must be"),
    (["--r1", -1], "--r1 -1.0: must be at least 0"), (["--lr", 0], "--lr 0.0: must be above 0"),
    (["--lambda-rec", -1], "--lambda-rec -1.0: must be at least 0"),
    (["--lambda-con", "nan"], "--lambda-con nan: must be"),
    (["--lr-decay", 1.5], "--lr-decay 1.5: must be at least 0 and at most 1"),
    (["--ema", 1], "--ema 1.0: must be at least 0 and below 1"),
    (["--clip-norm", 0], "--clip-norm 0.0: must be above 0"),
    (["--clip-norm", "nan"], "--clip-norm nan: must be"),
    (["--weight-limit", 0], "--weight-limit 0.0: must be above 0"),
    (["--nfe", 3], "--nfe 3: must be one of 1, 2, 4"),
    (["--con-weight", "x"], "--con-weight x: must be one of snr, sqrt"),
    (["--rec-distance", "l1"], "--rec-distance l1: must be one of lpips, l2, latent"),
    (["--channels", 8, 3], "--channels 3: must be at least 8"),
    (["--seed", 2**63], "--seed 9223372036854775808: must be at least 0 and below")])
def test_flags_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


def test_infinite_limits_are_no_limits():
    config = parse("--clip-norm", "inf", "--weight-limit", "inf")
    assert config.clip_norm == config.weight_limit == math.inf
    yoso.check(config)


@pytest.mark.parametrize("arguments, message", [
    (["--rank", 4], "--rank 4: needs --model"), (["--adapt"], "--adapt True: needs --model"),
    (["--lora", "x"], "--lora x: needs --model"), (["--generate", 5], "--generate 5: needs --model"),
    (["--con-distance", "latent"], "--con-distance latent: compares latents of --model"),
    (["--preset", "full"], "--preset full: needs --model"),
    (["--image-size", 20], "--image-size 20: must be a multiple of 8"),
    (["--channels", 8, "--channels-d", 8, "--attention"], "--attention True: must be off")])
def test_flags_that_do_not_fit_a_run_from_scratch(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run(["--out", tmp_path / "out", *arguments])
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_fit_a_model(models, finished, tmp_path):
    """Found before anything is written."""
    tiny.pixel(tmp_path / "pixels", classes=None)
    (wordless := tmp_path / "wordless").mkdir()
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(wordless / "0.png")
    zero_snr = finished["adapt"].out / "pipeline"
    (other := tiny.sd()).vae.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "other")
    drawn = ["--generator", models / "sd"]
    for more, message in (
            (["--preset", "cifar10"], "--preset cifar10: trains from scratch"),
            (["--latent-z", 8], "--latent-z 8: is for a run from scratch"),
            (["--image-size", 64], "--image-size 64: is for a run from scratch; leave it out with --model"),
            (["--levels", 8], "--levels 8: is for a run from scratch"),
            (["--channels", 8, 16], "--channels .*: is for a run from scratch"),
            (["--channels-d", 8, 16], "--channels-d .*: is for a run from scratch"),
            (["--layers", 1], "--layers 1: is for a run from scratch"),
            (["--no-attention"], "--attention False: is for a run from scratch"),
            (["--con-distance", "lpips"], "--con-distance lpips: compares pictures"),
            (["--flip", "--cache-latents"], "--flip True: cannot mirror cached latents"),
            (["--generate", 5], "--generate 5: needs a --generator"),
            (["--generator-lora", "x"], "--generator-lora x: needs a --generator"),
            (["--prompts", "x"], "--prompts x: needs a --generator"),
            ([*drawn, "--flip"], "--flip True: is for stored pictures"),
            ([*drawn, "--workers", 2], "--workers 2: is for stored pictures"),
            ([*drawn, "--nfe", 4], "--nfe 4: is for stored pictures; leave it out, or give --generate"),
            ([*drawn, "--dataset", ""], "or have them drawn by --generator and --prompts"),
            ([*drawn, "--prompts", "absent"], "--prompts absent: cannot be read"),
            (["--generator", tmp_path / "other"], r"shape and scale \(.*, 0.5\), --model's \(.*, 0.18215\)"),
            (["--generator", tmp_path / "pixels"], "--model's .*; give two of the same VAE, or --generate"),
            (["--dataset", ""], "give a folder of captioned pictures"),
            (["--model", models / "pixart"], "has no UNet"),
            (["--model", tmp_path / "pixels"], "works on pixels"),
            (["--discriminator", tmp_path / "other"], "its latents have 4 channels and the scale 0.5"),
            (["--model", zero_snr, "--adapt"], "has zero terminal SNR already"),
            (["--generate", 5, "--generator", models / "none"], "no such directory"),
            (["--dataset", "none"], "--dataset none: unknown"),
            (["--dataset", wordless], "have no captions")):
        with pytest.raises(UserError, match=message):
            run(flags("full", models, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
