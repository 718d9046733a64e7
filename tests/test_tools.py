"""The measures against closed forms, and the tools' commands."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import ablate
import benchmark
import evaluate
import numpy as np
import plot
import pretrain
import pytest
import tiny
import torch
import torch_fidelity
from forecast import cost_of_step
from helpers import ROOT, TINY, fails, random_vgg, ranks, tiny_config
from PIL import Image

import diff_instruct_star
import swiftbrush_v2
import yoso
from common import Draws, InformativePrior, NoiseSchedule, UserError, load
from plumbing.cli import parse_config
from plumbing.data import load_dataset
from plumbing.grids import save_grid, to_levels
from plumbing.shapes import COLOURS, Shapes

SCRIPTS = {f"{script.__name__}.py": script for script in (yoso, swiftbrush_v2, diff_instruct_star)}


def drawings(n, seed=0):
    dataset = Shapes(16, seed)
    return dataset.draw(dataset.attributes(range(n)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run of yoso.py from scratch."""
    out = tmp_path_factory.mktemp("finished") / "run"
    yoso.main([*TINY, "--iterations", "4", "--out", str(out)])
    return out


# evaluate.py

def test_frechet_distance_of_gaussians():
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), for commuting covariances a sum over eigenvalues.

    The samples are whitened, so that their own mean and covariance are exactly the wanted ones.
    """
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    a, b, m = rng.uniform(0.5, 2, 5), rng.uniform(0.5, 2, 5), rng.normal(size=5)

    def gaussian(mean, eigenvalues):
        x = rng.normal(size=(1000, 5))
        x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
        return torch.tensor(mean + x * eigenvalues**0.5 @ q.T)

    expected = m @ m + ((a**0.5 - b**0.5)**2).sum()
    found = evaluate.distances(gaussian(0, a), gaussian(m, b))["frechet"]
    assert found == pytest.approx(expected, rel=0.01)


@pytest.fixture(scope="module")
def embed():
    return evaluate.load_features("random-conv")


def test_distances_tell_good_from_bad(embed):
    """Halves of the shapes are near 0, inverted ones far; noise costs precision, one picture repeated recall.

    The last is the orientation that released versions of torch-fidelity have swapped.
    """
    real, good = drawings(600, seed=1), drawings(600, seed=2)
    noisy = (good.float() + 60 * torch.randn(600, 3, 16, 16)).clamp(0, 255).to(torch.uint8)
    jitter = torch.randint(0, 2, (600, 3, 16, 16), dtype=torch.uint8)
    collapsed = real[:1].repeat(600, 1, 1, 1) + jitter * (real[:1] < 255)
    same, inverted, noisy, collapsed = (
        evaluate.distances(embed(x), embed(real)) for x in (good, 255 - good, noisy, collapsed))
    assert same["frechet"] * 4 < min(noisy["frechet"], inverted["frechet"])
    assert abs(same["kid"]) < 0.001 and inverted["kid"] > 0.01
    assert same["precision"] > 0.9 and same["recall"] > 0.9
    assert noisy["precision"] < 0.4 and noisy["recall"] > 0.9
    assert collapsed["precision"] > 0.9 and collapsed["recall"] < 0.1


def test_evaluate_a_run_from_scratch(finished, tmp_path, capsys):
    """Its report is printed and written; it draws what yoso.py draws, in several chunks too."""
    path = tmp_path / "report.json"
    evaluate.main(["--run", str(finished), "--num", "20", "--nfe", "2", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert (report["num"], report["size"], report["nfe"]) == (20, 16, 2)
    assert report["features"] == "random-conv" and report["torch_fidelity"] == torch_fidelity.__version__
    assert {"frechet", "precision", "recall", "clean", "modes"} <= report.keys() and "right" not in report
    sampler, _ = yoso.load_sampler(finished)
    chunks = list(evaluate.few_step_chunks(sampler, [""] * 300, 1, 0))
    assert [len(captions) for _, captions in chunks] == [len(x) for x, _ in chunks] == [256, 44]
    first = next(yoso.draw_pictures(sampler, [""] * 300, 1, 0))
    assert torch.equal(chunks[0][0], evaluate.to_uint8(first))


def test_evaluate_a_run_that_fine_tunes(tmp_path):
    """Its pipeline is measured, from the informative prior that lies beside it; without one, one line."""
    config = yoso.Config(**yoso.PRESETS["mini"] | dict(preset="mini"))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(UserError, match="not finished"):
        evaluate.evaluate(run=tmp_path, num=5, device="cpu")
    tiny.sd().save_pretrained(tmp_path / "pipeline")
    InformativePrior(torch.zeros(4, 8, 8), torch.ones(4, 1, 1)).save(tmp_path / "pipeline")
    reports = [evaluate.evaluate(run=tmp_path, num=5, prior=prior, device="cpu") for prior in (True, False)]
    assert [report["informative_prior"] for report in reports] == [True, False]
    assert all(report["steps"] == 1 and report["model"] == str(tmp_path / "pipeline") for report in reports)
    assert reports[0]["frechet"] != reports[1]["frechet"] and "right" in reports[0]


def test_evaluate_a_run_on_its_own_pictures(tmp_path, monkeypatch, capsys):
    """And with their captions; where they are gone, or the run had prompts alone, --dataset says which."""
    (pictures := tmp_path / "pictures").mkdir()
    for i, image in enumerate(drawings(8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"a red circle {i}")
    tiny.sd().save_pretrained(tmp_path / "run" / "pipeline")
    measured = lambda run, **more: evaluate.evaluate(run=run, num=6, device="cpu", **more)
    own = dict(dataset=str(pictures), prompts=f"captions of {pictures}, seed 30000", reference_num=6)
    mini = yoso.PRESETS["mini"] | dict(preset="mini", dataset=str(pictures))
    for config, stage in ((yoso.Config(**mini), ""), (swiftbrush_v2.Config(dataset=str(pictures)), "a"),
                          (diff_instruct_star.Config(dataset=str(pictures)), "")):
        (tmp_path / "run" / "config.json").unlink(missing_ok=True)
        (place := tmp_path / "run" / stage / "config.json").parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(dataclasses.asdict(config)))
        assert own.items() <= measured(tmp_path / "run").items()
        place.unlink()
    assert measured(tmp_path / "run", dataset="shapes")["dataset"] == "shapes"
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(dict(model="sd", dataset=str(pictures), prompts="prompts.txt")))
    assert measured(tmp_path / "run")["dataset"] == "shapes", "its pictures were not asked for"
    config.write_text(json.dumps(dict(model="sd", dataset=str(tmp_path / "gone"))))
    error = fails(monkeypatch, capsys, evaluate, "--run", tmp_path / "run", "--num", 6)
    assert f"--dataset {tmp_path / 'gone'}: unknown; choose" in error


def test_evaluate_two_folders(tmp_path, embed):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(drawings(40, seed)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    report = evaluate.evaluate(images=tmp_path / "a", dataset=str(tmp_path / "b"), num=100, size=16)
    assert report["num"] == report["reference_num"] == 40
    direct = evaluate.distances(embed(drawings(40, 1)), embed(drawings(40, 2)))
    assert report["frechet"] == pytest.approx(direct["frechet"], rel=1e-6)


IMAGES = ["--images", "a", "--dataset", "a"]


@pytest.mark.parametrize("flags, message", [
    ([], "give one of --run"), (["--run", "a", "--model", "b"], "give one of --run"),
    (["--images", "a"], "give one of --run"),
    (["--images", "no/where", "--dataset", "shapes"], "no such folder"),
    (["--model", "a", "--json", "no/where/at.json"], "--json no/where/at.json: cannot be written"),
    (["--model", "a", "--json", ""], "--json '': must be given"),
    (["--model", "a", "--json", "/proc/x"], "--json /proc/x: cannot be written"),
    (["--model", "a", "--save", "/proc/x"], "--save /proc/x: cannot be written"),
    (["--model", "a", "--save", "tests"], "--save tests: exists already"),
    (["--model", "a", "--num", "4"], "--num 4: must be at least 5"),
    (["--model", "a", "--num", 10**9], "--num .*: must be at least 5 and at most 1000000"),
    (["--model", "a", "--steps", "0"], "--steps 0: must be at least 1"),
    (["--model", "a", "--nfe", "0"], "--nfe 0: must be at least 1"),
    (["--model", "a", "--guidance", "nan"], "--guidance nan: must be at least 0 and finite"),
    (["--model", "a", "--guidance=-1"], "--guidance -1.0: must be at least 0"),
    (["--model", "a", "--seed", "-1"], "--seed -1: must be at least 0"),
    (["--model", "a", "--seed", 2**64], "--seed .*: must be at least 0 and below 2..63"),
    ([*IMAGES, "--size", "0"], "--size 0: must be at least 1"),
    (["--model", "a", "--size", "8"], "--size: means nothing beside --model"),
    (["--model", "a", "--nfe", "1", "--steps", "2"], "--steps: means nothing beside --nfe"),
    (["--run", "a", "--guidance", "2"], "--guidance: means nothing beside --run"),
    ([*IMAGES, "--seed", "2"], "--seed: means nothing beside --images"),
    ([*IMAGES, "--features", ""], "--features '': must be given")])
def test_evaluate_names_what_is_wrong(flags, message, monkeypatch):
    monkeypatch.setattr(evaluate, "load_features", None)  # nothing is loaded before
    with pytest.raises(UserError, match=message):
        evaluate.main(list(map(str, flags)))


def test_evaluate_names_what_is_wrong_with_a_run(finished, tmp_path, monkeypatch, capsys):
    """Before it measures: nothing is saved."""
    refused = lambda *flags: fails(monkeypatch, capsys, evaluate, "--num", 5, *flags)
    more = ["--save", tmp_path / "new"]
    assert "1 to 4 network calls" in refused("--run", finished, "--nfe", 5, *more)
    assert "leave them out" in refused("--run", finished, "--prompts", "x", *more)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not the configuration" in refused("--run", tmp_path, *more)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    assert "config.json: cannot be read" in refused("--run", tmp_path, *more)
    assert not (tmp_path / "new").exists()


def test_pictures_that_cannot_be_measured(tmp_path, monkeypatch, capsys):
    """Too few, or too few readable ones; of a folder with some unreadable ones the others are measured once.
    """
    folders = {"one": 1, "four": 4, "half": 12}
    for name, number in folders.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(drawings(number)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:02d}.png")
    for i in range(4):
        (tmp_path / "half" / f"{i:02d}.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    refused = lambda *flags: fails(monkeypatch, capsys, evaluate, *flags)
    few = "too few pictures ({}), a distance needs at least 5"
    assert f"--images one: {few.format(1)}" in refused("--images", "one", "--dataset", "shapes")
    assert f"--dataset four: {few.format(4)}" in refused("--images", "half", "--dataset", "four")
    evaluate.main(["--images", "half", "--dataset", "half", "--num", "12", "--size", "16"])
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["num"] == report["reference_num"] == 8 and report["frechet"] < 1e-6
    assert err.count("left out, cannot be read as a picture: half/0") == 8  # on either side
    for i in range(4, 8):
        (tmp_path / "half" / f"{i:02d}.png").write_text("no picture")
    with pytest.raises(UserError, match="^--images half: too few pictures .4., a distance"):
        evaluate.main(["--images", "half", "--dataset", "shapes", "--num", "12"])
    (tmp_path / "half" / "config.json").write_text("{")
    assert "half: cannot be loaded as a CLIPModel" in refused("--model", "x", "--features", "half")


def test_another_palette_is_read_as_what_it_shows():
    """Rolled drawings are the same drawings in the next colours, and all right by their own attributes."""
    plain, rolled = load_dataset("shapes", 32), load_dataset("shapes-rolled", 32)
    attributes = plain.attributes(range(32))
    pictures = rolled.draw(attributes)
    assert rolled.captions(attributes) == plain.captions(attributes)
    assert not torch.equal(pictures, plain.draw(attributes))
    assert torch.equal(pictures, plain.draw(rolled.shown(attributes)))
    assert evaluate.shapes_report(pictures, rolled.shown(attributes))["right"] == 1
    assert evaluate.shapes_report(pictures, attributes)["right"] == 0


def test_the_backgrounds_colour_error():
    dataset = Shapes(32)
    attributes = dataset.attributes(range(32))
    pictures = dataset.draw(attributes)
    assert evaluate.shapes_report(pictures, attributes)["background_error"] < 0.003
    darker = evaluate.shapes_report((pictures.float() * 0.9).byte(), attributes)["background_error"]
    expected = 0.1 * torch.tensor([1.0, 0.5, 0.0])[attributes["background"]].mean().item()
    assert darker == pytest.approx(expected, abs=0.005)


# pretrain.py

@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_denoiser_has_no_loss(prediction_type):
    schedule = NoiseSchedule.from_config(tiny.scheduler().config).zero_terminal_snr()
    x0, draw = torch.randn(16, 4, 8, 8), Draws(0, 0, 16, slice(None), "cpu")

    def perfect(x_t, t):
        return SimpleNamespace(sample=schedule.convert(x0, x_t, t, "sample", prediction_type))

    blind = lambda x_t, t: SimpleNamespace(sample=0 * x_t)
    assert pretrain.denoising_loss(perfect, schedule, x0, {}, draw, prediction_type) < 1e-6
    assert pretrain.denoising_loss(blind, schedule, x0, {}, draw, prediction_type) > 0.5


def test_a_base_is_trained_on(tmp_path):
    """Another palette and PixArt's schedule: the UNet moves, nothing else does."""
    tiny.sd().save_pretrained(tmp_path / "sd")
    pretrain.main(["--base", f"{tmp_path}/sd", "--dataset", "shapes-rolled", "--schedule", "pixart",
                   "--iterations", "2", "--out", f"{tmp_path}/out", "--runs", f"{tmp_path}/runs",
                   "--batch-size", "8", "--device", "cpu"])
    (before, codec), (after, other) = load(tmp_path / "sd"), load(tmp_path / "out")
    assert after.schedule.alpha[-1].item() == pytest.approx(0.00635282, rel=1e-4)
    old, new = before.net.state_dict(), after.net.state_dict()
    assert any(not torch.equal(v, old[k]) for k, v in new.items())
    assert all(torch.equal(v, codec.vae.state_dict()[k]) for k, v in other.vae.state_dict().items())


def test_a_bases_autoencoder_is_trained_on(tmp_path):
    """With --vae: it moves, and its scaling factor gives the dataset's latents unit variance."""
    tiny.sd().save_pretrained(tmp_path / "sd")
    pretrain.main(["--base", f"{tmp_path}/sd", "--vae", "--dataset", "shapes-two", "--scale", "0.003",
                   "--out", f"{tmp_path}/out", "--runs", f"{tmp_path}/runs", "--batch-size", "8",
                   "--device", "cpu"])
    (_, codec), (_, other) = load(tmp_path / "sd"), load(tmp_path / "out")
    assert any(not torch.equal(v, codec.vae.state_dict()[k]) for k, v in other.vae.state_dict().items())
    pictures = torch.stack([load_dataset("shapes-two", 32)[i]["image"] for i in range(1000)])
    assert other.encode(evaluate.to_floats(pictures)).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("flags, message", [
    (["--base", "sd", "--schedule", "cosine", "--out", "no"], "--schedule cosine: must be one of sd, pixart"),
    (["--base", "sd"], "--out .*replaced as a whole"), (["--dataset", "folder"], "--out .*replaced"),
    (["--base", "sd", "--out", "./sd"], "--out .*replaced"), (["--scale", "0"], "--scale 0.0: must be above"),
    (["--dataset", "folder", "--out", "tools"], "--out tools: would be replaced as a whole"),
    (["--dataset", "folder", "--out", "."], "--out .: would be replaced as a whole"),
    (["--schedule", "pixart", "--out", "no"], "--schedule: only with --base"),
    (["--vae", "--out", "no"], "--vae: only with --base"),
    (["--scale", "inf"], "--scale inf: must be above 0 and at most 1000 and finite"),
    (["--dataset", "folder", "--out", "no", "--channels", "16", "40"], "--channels 40: .* multiple of 16"),
    (["--dataset", "folder", "--out", "no", "--image-size", "18"], "--image-size 18: .* multiple of 4"),
    (["--out", "LICENSE"], "--out LICENSE/.*: cannot be written"),
    (["--dataset", "folder", "--out", "/proc/x"], "--out /proc/x/.*: cannot be written"),
    (["--runs", "LICENSE/x"], "--runs LICENSE/x/.*: cannot be written"),
    (["--base", "no/where", "--out", "no"], "no/where: neither a local directory nor"),
    (["--base", "assets/mini-clip", "--out", "no"], "assets/mini-clip: not a diffusers pipeline"),
    (["--base", "assets/mini-sd", "--out", "no", "--dataset", "nowhere"], "--dataset nowhere: unknown"),
    (["--dataset", "assets/mini-clip", "--out", "no"], "--dataset assets/mini-clip: no pictures")])
def test_pretrain_names_what_is_wrong(flags, message, monkeypatch):
    """Before anything is trained."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pretrain, "train", None)
    with pytest.raises(UserError, match=message):
        pretrain.main([*flags, "--device", "cpu"])


def test_pretrain_without_room(tmp_path, monkeypatch):
    """What was there before stays."""
    def save(path):
        path.mkdir()
        raise OSError(28, "No space left on device")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: cannot be written .No space left on device"):
        pretrain.write(tmp_path / "out", save)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ablate.py and plot.py

@pytest.mark.parametrize("flags, message", [
    (["--iterations", "-1"], "--iterations -1: must be at least 0"), (["--jobs", "0"], "--jobs 0: must be"),
    (["--num", "0"], "--num 0: must be at least 5"), (["--seeds", "0", "-1"], "--seeds -1: must be at least"),
    (["--arms", "GAN"], "--arms GAN: unknown"), (["--out", ""], "--out '': must be given"),
    (["--out", "LICENSE"], "--out LICENSE/.*: cannot be written"), (["--out", "/proc/x"], "--out /proc/x/"),
    (["--table", "--out", "no/where"], "--out no/where: there is no such folder"),
    (["--job", "2"], "unrecognized arguments: --job 2"), (["GAN"], "unrecognized arguments: GAN")])
def test_ablate_names_what_is_wrong(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ablate, "run_row", None)
    with pytest.raises(UserError, match=message):
        ablate.main(["yoso", *flags])


def test_ablation_rows_are_kept(tmp_path, monkeypatch):
    """An existing row is not run again, and does not stand for another setting."""
    columns = ablate.COLUMNS["yoso"]
    rows = [dict(arm="yoso", seed=s, num=10, flags=["--iterations", "10", "--seed", str(s)]) | dict.fromkeys(
        columns, s) for s in (0, 1)]
    for row in rows:
        (tmp_path / f"yoso-seed{row['seed']}.json").write_text(json.dumps(row))
    assert [ablate.run_row("yoso", "yoso", s, 10, tmp_path, 10) for s in (0, 1)] == rows
    with pytest.raises(UserError, match="choose another --out"):
        ablate.run_row("yoso", "yoso", 0, 20, tmp_path, 10)
    monkeypatch.setattr(ablate, "train", None)  # not even of the arms before it
    flags = ["yoso", "--seeds", "3", "1", "--iterations", "20", "--num", "10", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="choose another --out"):
        ablate.main(flags)
    (tmp_path / "yoso-seed1.json").write_text('{"arm": ')
    with pytest.raises(UserError, match="yoso-seed1.json: cannot be read"):
        ablate.main(flags)
    table = ablate.table("yoso", rows)
    assert "| yoso | 2 | 0.5 ± 0.71 |" in table and "| UFOGen | 0 | not run |" in table


class InThisThread:
    """Stands for a ThreadPoolExecutor: a run catches signals, which only the main thread can."""

    def __init__(self, jobs):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def in_this_process(command, stdout, stderr):
    """Stands for subprocess.run on one of the scripts."""
    try:
        SCRIPTS[command[1].name].main([*map(str, command[2:]), *TINY[2:]])
    except UserError as error:
        stderr.write(f"{error}\n")
        stderr.flush()
        return SimpleNamespace(returncode=2)
    return SimpleNamespace(returncode=0)


def test_an_ablation_is_trained_and_measured(tmp_path, monkeypatch, capsys):
    """What fails is named, and its row is tried again next time; the curves and the rows are drawn."""
    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(ablate, "ThreadPoolExecutor", InThisThread)
    monkeypatch.setitem(ablate.YOSO, "UFOGen", (["--adversary", "none"], None, None))
    flags = ["--seeds", "7", "7", "--iterations", "4", "--num", "10", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["yoso", "--arms", "UFOGen", "no consistency", *flags])
    table, errors = capsys.readouterr()
    assert errors.count("ufogen-seed7: not run: --adversary none: must be one of") == 1
    assert stopped.value.code == 1 and errors.endswith("\nablate.py: failed: ufogen-seed7\n")
    assert "| no consistency | 1 |" in table and "| UFOGen | 0 | not run |" in table
    row = json.loads((tmp_path / "no-consistency-seed7.json").read_text())
    assert (row["iterations"], row["num"], row["seed"]) == (4, 10, 7) and row["minutes"] >= 0
    ablate.main(["yoso", "--table", "--out", str(tmp_path)])
    table = capsys.readouterr().out
    assert f"| no consistency | 1 | {row['frechet']:.3g} |" in table and "| UFOGen | 0 | not run |" in table
    run, curves, rows = tmp_path / "no-consistency-seed7", tmp_path / "curves.png", tmp_path / "rows.png"
    plot.main([str(run), str(run), "--keys", "L_D", "L_adv", "--png", str(curves)])
    plot.main([str(tmp_path), "--arms", "no*", "--keys", "frechet", "recall", "--png", str(rows)])
    assert Image.open(curves).size[0] > 1.5 * Image.open(curves).size[1] and min(Image.open(rows).size) > 300
    refused = lambda *flags: fails(monkeypatch, capsys, plot, *flags, "--png", tmp_path / "no.png")
    unknown = refused(run, "--keys", "L_D", "frechet")
    assert f"--keys frechet: no number of {run}; it has iteration, L_D" in unknown
    arms = lambda pattern, *keys: refused(tmp_path, "--arms", pattern, "--keys", *keys)
    assert "--arms none*: " in arms("none*", "frechet", "recall")
    assert "--keys L_adv: no number of" in arms("no*", "frechet", "L_adv")
    assert "--keys method: no number of" in arms("no*", "frechet", "method")
    assert "takes one folder of an ablation, and two --keys" in arms("no*", "frechet")
    (tmp_path / "damaged.json").write_text("{")
    assert "damaged.json: cannot be read" in arms("no*", "frechet", "recall")
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("files, reason", [
    ({}, "not run: .*metrics.jsonl: cannot be read"),
    ({"metrics.jsonl": "{broken}"}, "not run: .*metrics.jsonl: cannot be read"),
    ({"metrics.jsonl": '{"iteration": 4, "images_per_second": 1}'}, "not run: .*config.json: cannot be read"),
    ({"metrics.jsonl": '{"iteration": 4, "images_per_second": 1}', "config.json": "{}"}, "damaged, it lacks"),
    ({"metrics.jsonl": '{"iteration": 4, "images_per_second": 1}', "config.json": '{"batch_size": 1}'},
     "damaged, it lacks 'L_D'"),
    ({"metrics.jsonl": '{"iteration": 4, "images_per_second": 1, "L_D": 1}',
      "config.json": '{"batch_size": 1, "lr": "x"}'}, "config.json: not the configuration")], ids=range(6))
def test_an_arm_whose_run_is_damaged(files, reason, tmp_path, monkeypatch, capsys):
    """It has failed, in one line; as does one that was killed, or whose script said nothing."""
    def run(command, stdout, stderr):
        command[-1].mkdir()
        for name, text in files.items():
            (command[-1] / name).write_text(text)
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", run)
    assert "failed" in ablate.run_row("yoso", "yoso", 0, 4, tmp_path, 10)
    assert re.fullmatch(f"yoso-seed0: .*{reason}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "yoso-seed0.json").exists()


@pytest.mark.parametrize("code, reason", [(-9, "seed0.log: ended by signal 9"), (1, "")])
def test_an_arm_that_says_nothing(code, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code))
    assert reason in ablate.run_row("yoso", "yoso", 0, 4, tmp_path, 10)["failed"]
    assert re.fullmatch(f"yoso-seed0: not run: .*{reason}\n", capsys.readouterr().err)


@pytest.mark.parametrize("flags, message", [
    (["absent"], "absent/metrics.jsonl: cannot be read .No such file"),
    (["empty"], "metrics.jsonl: empty, it names no iteration"), (["empty/metrics.jsonl"], "Not a directory"),
    (["empty", "--png", "absent/x.png"], "--png absent/x.png: cannot be written .No such file"),
    (["empty", "--png", "empty"], "--png empty: cannot be written .it is no file"),
    (["empty", "--png", "x.doc"], "--png x.doc: cannot be written .it must end in .png"),
    (["empty", "--png", ""], "--png '': cannot be written"), (["empty", "--log"], "--log: only with --arms"),
    (["empty", "empty", "--arms", "x", "--keys", "a", "b"], "--arms: takes one folder"),
    (["empty", "--arms", "x", "--keys", "a", "b"], "--arms x: empty has no row"), ([], "give one of: f"),
    (["empty", "--strip", "empty"], "give one of: folders of runs, --centres BEFORE AFTER, --strip RUN"),
    (["--strip", "empty"], "--strip empty: there are no sam"), (["--strip", "absent"], "--strip absent: "),
    (["--centres", "absent", "empty"], "--centres absent: there is no such folder"),
    (["--centres", "a", "b", "--num", "0"], "--num 0: must be at least 1"),
    (["empty", "--num", "5"], "--num: only with --centres"),
    (["--strip", "empty", "--keys", "L_D"], "--keys: only with runs")])
def test_plot_names_what_is_wrong(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    monkeypatch.setattr(sys, "argv", [plot.__file__, *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(plot.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(f"plot.py: .*{message}.*\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("method", ablate.ARMS)
def test_arms_have_names_of_their_own_and_flags_that_exist(method):
    arms = ablate.ARMS[method]
    assert len({ablate.name_of(arm, 0) for arm in arms}) == len(arms)
    for flags, _, _ in arms.values():
        if flags is not None:
            script = SCRIPTS["yoso.py" if method.startswith("yoso") else f"{method}.py"]
            argv = [flag.format(iterations=3, longer=9, out="out", seed=0) for flag in flags]
            config = parse_config(script.Config, script.PRESETS, argv, "", script.preset_of)
            script.check(config)
            assert config.iterations in (1, 3, 9, 100, 200, 400, 800)


def test_network_calls_are_counted(tmp_path, monkeypatch, capsys):
    """Guidance asks twice a step; nothing is trained; a student that is not there is named and left out."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ablate, "train", None)
    monkeypatch.setitem(ablate.CALLS, "gone", (None, None, dict(model="runs/absent/pipeline", steps=1)))
    assert "failed" in ablate.run_row("calls", "gone", 0, 0, tmp_path, 10)
    error = capsys.readouterr().err
    assert "gone-seed0: not run: runs/absent/pipeline: there is no such directory; give " in error
    monkeypatch.setattr(ablate, "evaluate", lambda nfe=None, steps=25, guidance=1.0, **_: (
        dict(steps=nfe) if nfe else dict(steps=steps, guidance=guidance)))
    calls = [ablate.run_row("calls", arm, 0, 0, tmp_path, 10)["calls"] for arm in ablate.CALLS]
    assert calls == [2, 4, 8, 16, 32, 50, 1, 1, 1, 2, 4, 1]


def test_axes_are_in_words(tmp_path, finished):
    """With the better way, which a turned label's arrow shows too; unknown keys stay; both axes are log."""
    rows = [("teacher, 1 step", 2, 0.1), ("teacher, 25 steps", 50, 0.005), ("Star*, 1 call", 1, 0.01)]
    for i, (arm, calls, value) in enumerate(rows):
        row = dict(arm=arm, calls=calls, judge_frechet=value, unknown=1)
        (tmp_path / f"{i}.json").write_text(json.dumps(row))
    axis, = plot.plot_rows(tmp_path, ["teacher, ?*", "Star*, ?*"], ["calls", "judge_frechet"], True).axes
    assert axis.get_xlabel() == "network calls a picture"
    assert axis.get_ylabel() == "FD-heldout (lower is better ←)"
    assert axis.yaxis.label.get_rotation() == 90  # so that ← points down
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    shown = [text.get_text() for text in axis.get_xticklabels()]
    assert {"1", "2", "5", "10", "20", "50"} <= set(shown)
    line, dot = axis.lines
    assert (line.get_label(), line.get_marker(), list(line.get_xdata())) == ("teacher", "None", [2, 50])
    assert (dot.get_label(), dot.get_marker(), list(dot.get_ydata())) == ("Star*", "o", [0.01])
    axis, = plot.plot_rows(tmp_path, ["?*"], ["unknown", "calls"], False).axes
    assert (axis.get_xlabel(), axis.get_xscale(), axis.get_yscale()) == ("unknown", "linear", "linear")
    panels = plot.plot_runs([finished], ["L_D", "grad_G"]).axes
    assert [axis.get_ylabel() for axis in panels] == ["L_D, loss of D (dashed: 2 ln 2)", "grad_G"]
    assert not re.search("judge|probe|distance", " ".join(plot.WORDS.values()))


def test_the_centres_of_two_pipelines(tmp_path, monkeypatch):
    """Each shape a dot where it stands and in its colour, y downwards; the same captions and noises."""
    dataset, asked = Shapes(32), []
    places = [torch.tensor([0.4, 0.6, 0.5, 0.4]), torch.tensor([0.5, 0.5, 0.5, 0.5])]
    drawn = [dataset.attributes(range(4)) | dict(x=x, y=torch.full((4,), 0.6), radius=torch.full((4,), 0.25))
             for x in places]

    def chunks(denoiser, codec, captions, **settings):
        asked.append((captions, settings))
        pictures = dataset.draw(drawn[len(asked) - 1])
        yield pictures[:3], captions[:3]
        yield pictures[3:], captions[3:]

    codec = SimpleNamespace(guided=True, picture_size=32)
    monkeypatch.setattr(plot, "load", lambda path: (None, codec))
    monkeypatch.setattr(plot, "many_step_chunks", chunks)
    figure = plot.plot_centres([tmp_path, tmp_path], 4)
    for axis, x, colours in zip(figure.axes, places, (a["colour"] for a in drawn)):
        dots = axis.collections[0]
        expected = torch.stack([x, torch.full((4,), 0.6)], 1)
        assert np.allclose(dots.get_offsets(), expected, atol=0.01)
        assert np.allclose(dots.get_facecolors()[:, :3], [list(COLOURS.values())[i] for i in colours])
        assert (axis.get_xlim(), axis.get_ylim(), axis.get_aspect()) == ((0, 1), (1, 0), 1)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["before: mean 0.13 from the middle", "after: mean 0.10 from the middle"]
    assert asked[0] == asked[1] and len(asked[0][0]) == 4
    codec.picture_size = 512
    with pytest.raises(UserError, match="--centres .*: it draws no shapes"):
        plot.plot_centres([tmp_path, tmp_path], 4)


def test_a_film_strip(tmp_path, monkeypatch):
    """The first rows of seven of ten grids, unchanged, each beside its iteration."""
    labels, labelled = [], plot.labelled
    monkeypatch.setattr(plot, "labelled", lambda *given: labels.extend(given[3]) or labelled(*given))
    grids = {50 * i: torch.rand(16, 3, 32, 32) * 2 - 1 for i in range(1, 11)}
    for iteration, pictures in grids.items():
        save_grid(pictures, tmp_path / "samples" / f"{iteration:07d}.png")
    save_grid(grids[50], tmp_path / "samples" / "final.png")
    plot.main(["--strip", str(tmp_path), "--png", str(tmp_path / "strip.png")])
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    rows = [50, 100, 150, 200, 250, 350, 500]
    assert labels == [f"iteration {i}" for i in rows] and strip.shape[0] == 7 * 66 + 2
    left = strip.shape[1] - (8 * 66 + 2)
    assert left > 60 and all((strip[i * 66:i * 66 + 66, :left] < 128).any() for i in range(7))
    for i, iteration in enumerate(rows):
        for k, picture in enumerate(to_levels(grids[iteration][:8])):
            cell = strip[2 + 66 * i:66 + 66 * i, left + 2 + 66 * k:left + 66 + 66 * k]
            assert (cell[::2, ::2] == picture.permute(1, 2, 0).numpy()).all()
    (tmp_path / "samples" / "0000050.png").write_text("damaged")
    with pytest.raises(UserError, match="--strip .*: a grid cannot be read .*0000050.png"):
        plot.film_strip(tmp_path)


# benchmark.py

def benchmarked(script, folder, **changes):
    """(config, run, models, batch) of a small cast on the mini models, each of whose passes has run once."""
    preset = "mini-lora" if script is yoso else "shapes"
    changes = dict(preset=preset, batch_size=4, device="cpu") | changes
    config = script.Config(**script.PRESETS[preset] | changes)
    run, models, batch = benchmark.cast_of(script, config, folder)
    for part in benchmark.PARTS[script](config, run, models, *batch).values():
        part()
    return config, run, models, batch


def test_the_benchmarks_command(tmp_path, capsys):
    """A table on stdout, and the report as JSON: the passes, what is left, R1 beside them."""
    path = tmp_path / "report.json"
    benchmark.main(["yoso", *TINY, "--repeats", "1", "--json", str(path)])
    report, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert (report["method"], report["preset"], report["batch_size"]) == ("yoso", "shapes", 8)
    assert report["calls"] == dict(generator=[2, 1], discriminator=[2, 2])
    assert "| generator: calls, those with a backward pass, in forward passes | 2, 1, 4 |" in shown
    assert "G for the target, forward" not in report["share"]  # it is the real side
    assert all(share > 0 and f"| {name} | " in shown for name, share in report["share"].items())
    assert sum(report["share"].values()) + report["overhead"] == pytest.approx(1, abs=1e-3)
    assert report["peak_MB"][benchmark.R1] > report["peak_MB"]["step"] > 0 and "r1_share" in report
    assert set(report["sampling"]) == {benchmark.ONE_STEP}  # its pictures are not decoded


def test_passes_of_the_perceptual_distance_are_counted(tmp_path, monkeypatch):
    """VGG runs once on the fake pictures, with a backward pass, and once on each of the two others."""
    random_vgg(monkeypatch)
    config = tiny_config(tmp_path, rec_distance="lpips", con_distance="lpips", batch_size=4)
    run, models, batch = benchmark.cast_of(yoso, config, tmp_path)
    networks, optimizers = benchmark.networks_of(models), benchmark.optimizers_of(models)
    step = benchmark.step_of(yoso, config, run, models, batch)
    cost = cost_of_step(run, networks, optimizers, step, {0: 1.0})
    assert cost["calls"]["lpips"] == [3, 1] and cost["units"]["lpips"] == 4
    assert cost["parameters"]["lpips"] == 14_714_688


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_benchmark_of_fine_tuning(tmp_path, rank):
    """Every pass runs; G has one for the target, and what is drawn is decoded."""
    config, run, models, batch = benchmarked(yoso, tmp_path, rank=rank)
    parts = benchmark.PARTS[yoso](config, run, models, *batch)
    assert {"VAE encoder", "G for the target, forward", benchmark.DECODED} < set(parts)
    assert set(benchmark.networks_of(models)) == {"generator", "discriminator", "half"}


@pytest.mark.parametrize("stage", ["a", "b"])
def test_benchmark_of_swiftbrush(tmp_path, stage):
    """Every pass runs; a LoRA teacher on a network of its own teaches the same."""
    config, run, models, batch = benchmarked(swiftbrush_v2, tmp_path, stage=stage)
    parts = benchmark.PARTS[swiftbrush_v2](config, run, models, *batch)
    assert ("decoder and CLIP, forward + input backward" in parts) == (stage == "b")
    networks = benchmark.networks_of(models)
    assert networks["teacher"] is networks["lora_teacher"]
    assert (networks["student"] is networks["teacher"]) == (stage == "b")
    gradients = lambda denoiser: [p.grad.clone() for p in denoiser.trainable().values()]
    benchmark.step_of(swiftbrush_v2, config, run, models, batch)()
    shared = gradients(models.student) + gradients(models.lora_teacher)
    _, step = benchmark.variant_of(swiftbrush_v2, config, run, models, batch)
    step()
    assert models.lora_teacher.net is not models.teacher.net
    separate = gradients(models.student) + gradients(models.lora_teacher)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(shared, separate, strict=True))


def test_benchmark_of_diff_instruct(tmp_path):
    """Every pass runs; a plain backward pass gives the same gradient as the leaf, and takes more memory."""
    config, run, models, batch = benchmarked(diff_instruct_star, tmp_path)
    assert len({id(network) for network in benchmark.networks_of(models).values()}) == 3
    make_steps = (benchmark.step_of, lambda *cast: benchmark.variant_of(*cast)[1])
    gradients = []
    for make_step in make_steps:
        make_step(diff_instruct_star, config, run, models, batch)()
        gradients.append([p.grad.clone() for p in models.student.trainable().values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))
    leaf, plain = (benchmark.peak_of_steps(diff_instruct_star, config, tmp_path, m) for m in make_steps)
    assert leaf < plain


@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "9", "--processes", "2"], "--batch-size 9 is not divisible"),
    (["--processes", "1"], "--processes 1: must be"), (["--repeats", "0"], "--repeats 0: must be"),
    (["--processes", "0"], "--processes 0: must be"), (["--repeats", 10**12], "--repeats .*: .* below 2..31"),
    (["--rank", "4"], "--rank 4: needs --model"), (["--lr", "-1"], "--lr -1.0: must be above 0"),
    (["--json", "no/where.json"], "--json no/where.json: cannot be written"),
    (["--json", ""], "--json '': cannot be written"), (["--apart"], "--apart: only with --only-rate"),
    (["--speed", "3"], "unrecognized arguments: --speed 3"), (["--repeats", "x"], "--repeats: invalid int")])
def test_the_benchmark_names_what_is_wrong(flags, message, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", None)
    with pytest.raises(UserError, match=message):
        benchmark.main(["yoso", *map(str, flags)])


def test_the_benchmark_of_another_script():
    with pytest.raises(UserError, match="method: invalid choice: 'evaluate'"):
        benchmark.main(["evaluate"])


def rate_here(folder, apart):
    """Of one of the processes of a group; exchanges are those of torch again when it is measured."""
    exchange = torch.distributed.all_reduce
    assert benchmark.rate_of(yoso, tiny_config(folder), folder, 1, apart) > 0
    assert torch.distributed.all_reduce is exchange


def test_the_rate_of_a_process(tmp_path):
    rate_here(tmp_path, True)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
def test_the_rate_of_two_processes(tmp_path, apart):
    ranks(2, rate_here, tmp_path, apart)


def test_what_fails_in_a_process_is_told(monkeypatch):
    stderr = "W torch.distributed.run\nbenchmark.py: --batch-size 6: must be\nTraceback\n"
    failed = SimpleNamespace(returncode=2, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"a process failed \(benchmark.py: --batch-size 6: must be\)"):
        benchmark.main(["yoso", "--preset", "shapes", "--batch-size", "6", "--processes", "2"])


@pytest.mark.slow
def test_scaling_over_two_processes(tmp_path):
    """Four rates, each of a program of its own."""
    path = tmp_path / "rates.json"
    benchmark.main(["yoso", *TINY, "--processes", "2", "--repeats", "5", "--json", str(path)])
    rates = json.loads(path.read_text())
    assert set(rates) == {"whole", "part", "together", "apart"} and all(rate > 0 for rate in rates.values())
