"""The command diff_instruct_star.py on tiny pipelines: a run, resuming, where it starts, wrong input."""

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny
from helpers import (
    CAPTIONS,
    defaults_in_help,
    equal,
    fails,
    furthest,
    levels_apart,
    metrics,
    perturb,
    plain,
    ranks,
    state,
    stop_at,
    unexplained,
    weights,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import diff_instruct_star as di
from common import UserError, draw_many_steps, draw_samples, load, one_step
from plumbing.cli import parse_config
from plumbing.data import prompts_of
from plumbing.grids import save_grid
from plumbing.run import Run
from plumbing.students import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny models lie."""
    return tiny.save_models(tmp_path_factory.mktemp("models"))


def flags(folder, out, *more):
    """An iteration of each warm-up and two with the reward, with rates at which the weights move far."""
    return [str(a) for a in [
        "--preset", "shapes", "--model", folder / "sd", "--reward", folder / "clip",
        "--probe", folder / "judge", "--decoder", folder / "tae", "--out", out, "--device", "cpu",
        "--iterations", 2, "--warmup", 1, "--assistant-warmup", 1, "--convert-iterations", 2,
        "--batch-size", 4, "--rank", 4, "--alpha", 8, "--lr", 0.01, "--lr-assistant", 0.01, "--lr-warmup", 5,
        "--ema", 0.5, "--ema-ramp", "--log-every", 1, "--sample-every", 4, *more]]


pytestmark = pytest.mark.usefixtures("few_pictures")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a finished run."""
    out, references, load_teacher = tmp_path_factory.mktemp("runs") / "all", [], di.load_teacher

    def remember(*arguments):
        references.append(load_teacher(*arguments))
        return references[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(di, "load_teacher", remember)
        di.main(flags(folder, out))
    (reference, _), = references
    assert equal(dict(reference.net.state_dict()), weights(folder / "sd")), "the reference is as it was"
    return out


def test_a_run(finished):
    """Conversion, both warm-ups, reward: what is logged when, and the average as a pipeline."""
    rows = metrics(finished)
    assert ["L_divergence" in row for row in rows] == [False, True, True, True]
    assert ["grad_reward" in row for row in rows] == [False, False, True, True]
    assert all("L_assistant" in row for row in rows)
    assert all({"reward", "probe"} <= row.keys() for row in rows[1:])
    assert unexplained(finished) == []
    student, saved = weights(finished / "pipeline"), state(finished)
    assert furthest(student, weights(finished / "start" / "pipeline")) > 1e-3
    assert equal(student, saved["ema"]) and furthest(student, saved["student"]) > 1e-3
    assert (finished / "comparison.png").exists() and (finished / "samples" / "0000004.png").exists()


def test_the_export_is_a_one_step_student_in_diffusers(finished):
    student, codec = load(finished / "pipeline")
    z, y = torch.randn(2, *codec.shape), CAPTIONS[:2]
    call = dict(latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    theirs = plain(finished / "pipeline")(y, **call).images
    torch.testing.assert_close(one_step(student, z, codec.cond(y)), theirs, atol=1e-4, rtol=1e-4)


def test_pictures_are_the_averages(folder, finished, tmp_path):
    """Samples and comparison are the exported student's; those from before the reward its average's then."""
    student, codec = load(finished / "pipeline")
    prompts = prompts_of(parse_config(di.Config, di.PRESETS, flags(folder, finished), ""), codec)
    shown = [prompts[i % len(prompts)] for i in range(0, 64 * 7, 7)]
    draw = lambda number: draw_samples(student, codec, shown[:number], 0)
    save_grid(draw(64), tmp_path / "grid.png")
    assert levels_apart(finished / "samples" / "0000004.png", tmp_path / "grid.png") <= 1
    before = load_file(finished / "before.safetensors")["pictures"]
    many_steps = draw_many_steps(load(folder / "sd")[0], codec, shown[:8], 25, 2.0)
    save_grid(torch.cat([many_steps, before, draw(8)]), tmp_path / "grid.png", 8)
    assert levels_apart(finished / "comparison.png", tmp_path / "grid.png") <= 1
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        stop_at(patched, "run", 2)
        di.main(flags(folder, tmp_path / "run"))
    student.net.load_state_dict(state(tmp_path / "run")["ema"])
    torch.testing.assert_close(draw(8), before, atol=1e-4, rtol=0)


def test_stopping_and_resuming_is_exact(folder, finished, tmp_path):
    """Stopped in the conversion, in each warm-up and with the reward, the same command ends as if never."""
    for name, iteration in (("start", 1), ("run", 1), ("run", 2), ("run", 3)):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as stopped:
            stop_at(patched, name, iteration)
            di.main(flags(folder, tmp_path / "run"))
        assert stopped.value.code == 128 + 15 and not (tmp_path / "run" / "pipeline").exists()
    di.main(flags(folder, tmp_path / "run"))
    assert equal(state(tmp_path / "run"), state(finished))
    before = [load_file(out / "before.safetensors") for out in (tmp_path / "run", finished)]
    assert equal(*before)


def test_damage_of_what_was_before_is_told_first(folder, finished, tmp_path, monkeypatch):
    """Before an iteration is made, not in the comparison at the end."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "before.safetensors").write_bytes((finished / "before.safetensors").read_bytes()[:-1])
    monkeypatch.setattr(di, "train_step", None)
    monkeypatch.setattr(di, "export_student", None)
    with pytest.raises(UserError, match="before.safetensors: cannot be read"):
        di.main(flags(folder, out))


def test_nothing_is_measured_on_weights_that_are_not_finite(folder, tmp_path, monkeypatch):
    """They were spoiled in the last iteration without the reward, which nothing else looks at."""
    honest = di.train_step

    def poisoned(iteration, y, config, run, models):
        losses = honest(iteration, y, config, run, models)
        next(iter(models.student.net.parameters())).data.fill_(float("nan"))
        return losses
    monkeypatch.setattr(di, "train_step", poisoned)
    monkeypatch.setattr(di, "remember_before", None)
    with pytest.raises(UserError, match=r"iteration 1: student\..* is not finite"):
        di.main(flags(folder, tmp_path / "run", "--warmup", 1, "--assistant-warmup", 0, "--log-every", 100,
                      "--prediction", ""))
    assert not (tmp_path / "run" / "before.safetensors").exists()


def test_the_others_wait_for_what_the_first_measures(folder, tmp_path, monkeypatch):
    """As long as it takes, for their next exchange may only take as long as a step."""
    order, wait = [], Run.wait
    monkeypatch.setattr(Run, "wait", lambda run: (order.append("wait"), wait(run)))
    remember, step = di.remember_before, di.train_step
    monkeypatch.setattr(di, "remember_before", lambda *rest: (order.append("before"), remember(*rest)))
    monkeypatch.setattr(di, "train_step", lambda *rest: (order.append("step"), step(*rest))[1])
    di.main(flags(folder, tmp_path / "run", "--warmup", 0, "--assistant-warmup", 1, "--iterations", 1,
                  "--prediction", ""))
    assert order == ["step", "before", "wait", "step", "wait"]


def test_a_run_goes_on_in_other_folders(folder, finished, tmp_path):
    """A run, taken up by B, and B by C: pictures and rewards from before the reward travel along."""
    command = lambda out, num, *more: di.main(flags(folder, tmp_path / out, "--iterations", num, *more))
    command("a", 1)
    command("b", 1, "--resume", tmp_path / "a")
    assert not (tmp_path / "b" / "start").exists(), "what the checkpoint holds is not converted again"
    shutil.rmtree(tmp_path / "a")
    command("c", 2, "--resume", tmp_path / "b")
    before = [(out / "before.safetensors").read_bytes() for out in (tmp_path / "c", finished)]
    assert before[0] == before[1]
    assert equal(weights(tmp_path / "c" / "pipeline"), weights(finished / "pipeline"))
    (tmp_path / "c" / "before.safetensors").unlink()
    with pytest.raises(UserError, match="before.safetensors: missing"):
        command("c", 3)


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    """How far the weights are apart is at most 2 % of how far they have moved.

    Not 0: Adam's first steps are as large for a weight whose gradient is rounding as for any other. The rates
    are small, lest the next steps magnify these.
    """
    small = ["--lr", 1e-5, "--lr-assistant", 1e-5, "--convert-lr", 1e-5]
    di.main(flags(folder, tmp_path / "one", *small))
    ranks(2, di.main, flags(folder, tmp_path / "two", *small))
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    origins = dict(student=weights(tmp_path / "one" / "start" / "pipeline"), assistant=weights(folder / "sd"))
    for part, origin in origins.items():
        apart, moved = (torch.cat([(one[part][key] - other[key]).flatten() for key in origin]).norm()
                        for other in (two[part], origin))
        assert 0 < moved and apart < 0.02 * moved, (part, apart, moved)


@pytest.mark.parametrize("kind, divergence, suffix", [
    ("full", "score", "bin"), ("lora", "kl", "safetensors")])
def test_sdxl_from_a_file_of_weights_at_its_own_timestep(folder, tmp_path, kind, divergence, suffix):
    """DMD2's way: a bare file of weights, conditioned at 399; the export starts there in diffusers too."""
    tiny.sdxl().save_pretrained(tmp_path / "pipe")
    start = weights(tmp_path / "pipe")
    perturb(start, 0.01)
    file, out = tmp_path / f"student.{suffix}", tmp_path / "out"
    (torch.save if suffix == "bin" else save_file)(start, file)
    di.main(flags(folder, out, "--model", tmp_path / "pipe", "--student", file, "--student-timestep", 399,
                  "--precision", "bf16", "--prediction", "epsilon", "--assistant", kind, "--iterations", 1,
                  "--divergence", divergence, "--assistant-warmup", 0, "--lr", 1e-3, "--ema", 0))
    assert "grad_reward" in metrics(out)[0], "without the warm-up that a start from the teacher needs"
    student, codec = load(out / "pipeline")
    assert len(student.schedule) == 400 and 1e-4 < furthest(student.net.state_dict(), start) < 2e-3
    z, y, size = torch.randn(2, *codec.shape), CAPTIONS[:2], codec.picture_size
    call = dict(latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    theirs = plain(out / "pipeline")(y, height=size, width=size, **call).images
    f, schedule = one_step(student, z, codec.cond(y)), load(tmp_path / "pipe")[0].schedule
    torch.testing.assert_close(f, theirs, atol=1e-4, rtol=1e-4)
    eps = student.net(z, torch.tensor([399, 399]), **codec.cond(y)).sample
    expected = (z - schedule.sigma[399] * eps) / schedule.alpha[399]
    torch.testing.assert_close(f, expected, atol=1e-4, rtol=1e-4)


def test_a_converted_start_has_its_own_timestep_in_diffusers_too(folder, tmp_path):
    """OUT/start/pipeline, on which a LoRA student's file belongs, is the student that convert returns."""
    argv = flags(folder, tmp_path, "--iterations", 1)
    config = parse_config(di.Config, di.PRESETS, argv, "")
    start, codec = load(folder / "sd")
    start.schedule = start.schedule.up_to(399)
    student = convert(Run(config), codec, start, "v_prediction", CAPTIONS)
    exported, _ = load(tmp_path / "pipeline")
    assert exported.prediction_type == student.prediction_type == "v_prediction"
    assert equal(dict(exported.net.state_dict()), dict(student.net.state_dict()))
    assert not any(p.requires_grad for p in student.net.parameters())
    torch.testing.assert_close(exported.schedule.alpha, start.schedule.alpha, atol=1e-6, rtol=0)


def test_other_backbones_and_pixel_space(folder, tmp_path):
    """PixArt with a LoRA assistant, a model without any condition or reward, and one with classes."""
    tiny.pixart().save_pretrained(tmp_path / "pixart")
    tiny.pixel(tmp_path / "plain", classes=None)
    tiny.pixel(tmp_path / "classes")
    model = lambda name, *more: di.main(flags(folder, tmp_path / "out" / name, "--model", tmp_path / name,
                                              "--iterations", 1, "--convert-iterations", 1, *more))
    model("pixart", "--prediction", "epsilon", "--assistant", "lora")
    model("plain", "--preset", "cifar10", "--reward", "", "--probe", "")
    model("classes", "--decoder", "", "--cfg-choice", 1, "--divergence", "kl")
    assert load(tmp_path / "out" / "classes" / "pipeline")[1].classes == ["cat", "dog"]
    last = {name: metrics(tmp_path / "out" / name)[-1] for name in ("pixart", "plain", "classes")}
    assert ["reward" in row for row in last.values()] == [True, False, True]
    assert ["L_cfg" in row for row in last.values()] == [False, False, True]
    assert unexplained(tmp_path / "out") == []


def test_where_the_student_starts(folder, finished, tmp_path, monkeypatch, capsys):
    """SwiftBrush's run if it is there, without warm-up; a run that is continued keeps the start it had."""
    monkeypatch.chdir(tmp_path)
    config = di.Config(preset="shapes", warmup=7, assistant_warmup=2, iterations=5, out="out")
    resolved = lambda **changes: di.resolve_start(dataclasses.replace(config, **changes))
    found = resolved()
    assert (found.student, found.warmup, found.iterations) == ("", 7, 2 + 7 + 5)
    (tmp_path / di.SWIFTBRUSH).mkdir(parents=True)
    found = resolved()
    assert (found.student, found.warmup, found.iterations) == (di.SWIFTBRUSH, 0, 2 + 5)
    assert resolved(model="other").student == "" and resolved(student="given").student == "given"
    (tmp_path / "out").mkdir()
    for student, warmup in (("", 7), ("another", 0)):
        (tmp_path / "out" / "config.json").write_text(json.dumps(dict(student=student)))
        for found in (resolved(), resolved(out="new", resume="out")):
            assert (found.student, found.warmup) == (student, warmup)
    di.main(flags(folder, tmp_path / "run", "--student", finished / "pipeline", "--iterations", 1))
    assert f"starts from {finished / 'pipeline'}\n" in capsys.readouterr().out
    assert ["grad_reward" in row for row in metrics(tmp_path / "run")] == [False, True], "no warm-up but one"
    assert not (tmp_path / "run" / "start").exists(), "it predicts v already"


def test_sample_command(finished, tmp_path, capsys):
    grid = tmp_path / "grid.png"
    di.main(["sample", "--run", str(finished), "--device", "cpu", "--grid", str(grid), "--num", "3",
             "--prompts", CAPTIONS[0]])
    assert str(grid) in capsys.readouterr().out and Image.open(grid).size == (3 * 66 + 2, 68)
    with pytest.raises(UserError, match="no finished student"):
        di.main(["sample", "--run", str(tmp_path)])
    broken = shutil.copytree(finished, tmp_path / "broken")
    (broken / "config.json").write_text("")
    with pytest.raises(UserError, match="not the configuration of a run of this script"):
        di.main(["sample", "--run", str(broken)])


@pytest.mark.parametrize("arguments, preset", [
    ([], "shapes"), (["--model", "stabilityai/stable-diffusion-xl-base-1.0"], "sdxl"),
    (["--dataset", "cifar10"], "cifar10")])
def test_a_real_model_does_not_get_the_mini_models_rates(arguments, preset):
    assert parse_config(di.Config, di.PRESETS, arguments, "", di.preset_of).preset == preset


@pytest.mark.parametrize("arguments, preset, lr, guidance", [
    ([], "shapes", "0.0001", "2.0"), (["--model", "x/y"], "sdxl", "5e-07", "7.5"),
    (["--dataset", "cifar10"], "cifar10", "1e-05", "1.0")])
def test_help_shows_the_values_of_the_preset_that_the_flags_choose(arguments, preset, lr, guidance, capsys):
    shown = defaults_in_help(capsys, di, *arguments)
    assert (shown["--preset"], shown["--lr"], shown["--teacher-guidance"]) == (preset, lr, guidance)


@pytest.mark.parametrize("more, message", [
    (["--alpha-rew", "nan"], "--alpha-rew nan: must be at least 0"),
    (["--alpha-rew", -1], "--alpha-rew -1.0: must be at least 0"),
    (["--huber-c", "inf"], "--huber-c inf: must be at least 0"),
    (["--teacher-guidance", "nan"], "--teacher-guidance nan: must be at least 0"),
    (["--divergence", "js"], "--divergence js: must be one of score, kl"),
    (["--cfg-choice", 3], "--cfg-choice 3: must be one of 1, 2"),
    (["--score-updates", 0], "--score-updates 0: must be at least 1"),
    (["--iterations", 0], "--iterations 0: must be at least 1"),
    (["--lr-assistant", 0], "--lr-assistant 0.0: must be above 0"),
    (["--clip-norm", -1], "--clip-norm -1.0: must be above 0"),
    (["--t-min", 980], "--t-min 980: must be between 0 and --t-max"),
    (["--reward", ""], "--alpha-rew 10.0: needs a --reward")])
def test_values_out_of_range(folder, tmp_path, monkeypatch, capsys, more, message):
    """One line on stderr, exit code 2, before anything is loaded or written."""
    monkeypatch.setattr(di, "load_networks", None)
    assert message in fails(monkeypatch, capsys, di, *flags(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_wrong_input(folder, tmp_path):
    """Told before the first iteration, of whatever part it is."""
    tiny.pixel(tmp_path / "plain", classes=None)
    tiny.pixel(tmp_path / "without_null")
    (tmp_path / "without_null" / "classes.json").write_text(json.dumps(["cat", "dog", "bird"]))
    bad, headless = (shutil.copytree(folder / "clip", tmp_path / name) for name in ("bad", "headless"))
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | dict(projection_dim=20)))
    kept = {key: value for key, value in load_file(headless / "model.safetensors").items()
            if "projection.weight" not in key}
    save_file(kept, headless / "model.safetensors", dict(format="pt"))
    save_file(dict(a=torch.zeros(1)), tmp_path / "other.safetensors")
    (tmp_path / "broken.bin").write_bytes(b"no weights")
    blocks = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                  num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    AutoencoderTiny(latent_channels=16, **blocks).save_pretrained(tmp_path / "wide")
    zero_snr = tiny.sd()
    zero_snr.scheduler = tiny.scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    zero_snr.save_pretrained(tmp_path / "zero_snr")
    no_signal = ["--model", tmp_path / "zero_snr", "--weighting", "x0", "--t-max", 999]
    none = ["--alpha-rew", 0, "--reward", "", "--probe", ""]
    for more, message in (
            (["--reward", bad], "cannot be loaded as a CLIPModel"),
            (["--reward", headless], "lacks the weights"),
            (["--model", tmp_path / "plain"], "no empty condition to guide by"),
            (["--model", tmp_path / "without_null", *none], "no empty condition"),
            (["--student-timestep", 1000], "ends at 999"), (["--t-max", 1000], "0 to 999"),
            (no_signal, "--t-max 999: the model's alpha is 0 there"),
            (["--student", tmp_path / "other.safetensors"], "not weights of"),
            (["--student", tmp_path / "broken.bin"], "not weights of"),
            (["--student", tmp_path / "none.bin"], "not weights of"),
            (["--decoder", tmp_path / "wide"], "--decoder"),
            (["--decoder", folder / "sd" / "vae"], "--decoder"),
            (["--assistant", "lora", "--lora-targets", "nope"], "--lora-targets nope")):
        with pytest.raises(UserError, match=message):
            di.main(flags(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
