"""The measures against closed forms, and the tools' commands."""

import importlib
import json
import re
from types import SimpleNamespace

import ablate
import benchmark
import evaluate
import numpy as np
import pretrain
import pytest
import tiny
import torch
import torch_fidelity
from PIL import Image
from test_run import config, finished  # noqa: F401

import common
import diff_instruct_star
import plumbing.cli
import plumbing.data
import swiftbrush_v2
import yoso
from plumbing.shapes import Shapes


def drawings(n, seed=0):
    dataset = Shapes(16, seed)
    return dataset.draw(dataset.attributes(range(n)))


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
    assert evaluate.distances(gaussian(0, a), gaussian(m, b))["frechet"] == pytest.approx(expected, rel=0.01)


@pytest.fixture(scope="module")
def embed():
    return evaluate.load_features("random-conv")


def test_distances_tell_good_from_bad(embed):
    """Two halves of the shapes are near 0, inverted shapes far away; noise costs precision, one picture repeated recall.

    The last is the orientation that released versions of torch-fidelity have swapped.
    """
    real, good = drawings(600, seed=1), drawings(600, seed=2)
    noisy = (good.float() + 60 * torch.randn(600, 3, 16, 16)).clamp(0, 255).to(torch.uint8)
    collapsed = real[:1].repeat(600, 1, 1, 1) + torch.randint(0, 2, (600, 3, 16, 16), dtype=torch.uint8) * (real[:1] < 255)
    same, inverted, noisy, collapsed = (evaluate.distances(embed(x), embed(real)) for x in (good, 255 - good, noisy, collapsed))
    assert same["frechet"] * 4 < min(noisy["frechet"], inverted["frechet"])
    assert abs(same["kid"]) < 0.001 and inverted["kid"] > 0.01
    assert same["precision"] > 0.9 and same["recall"] > 0.9
    assert noisy["precision"] < 0.4 and noisy["recall"] > 0.9
    assert collapsed["precision"] > 0.9 and collapsed["recall"] < 0.1


def test_evaluate_command(finished, tmp_path, capsys):
    evaluate.main(["--run", str(finished), "--num", "50", "--nfe", "2", "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["num"] == 50 and report["features"] == "random-conv" and report["torch_fidelity"] == torch_fidelity.__version__
    assert {"frechet", "precision", "recall", "clean", "modes"} <= report.keys()


def test_evaluate_two_folders(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(drawings(40, seed)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    report = evaluate.evaluate(images=tmp_path / "a", dataset=str(tmp_path / "b"), num=100, size=16)
    assert report["num"] == report["reference_num"] == 40
    embed = evaluate.load_features("random-conv")
    direct = evaluate.distances(embed(drawings(40, 1)), embed(drawings(40, 2)))
    assert report["frechet"] == pytest.approx(direct["frechet"], rel=1e-6)


def test_another_palette_is_read_as_what_it_shows():
    """Rolled drawings are the same drawings in the next colours, and all right by their own attributes."""
    plain, rolled = plumbing.data.load_dataset("shapes", 32), plumbing.data.load_dataset("shapes-rolled", 32)
    attributes = plain.attributes(range(100))
    assert rolled.captions(attributes) == plain.captions(attributes) and not torch.equal(rolled.draw(attributes), plain.draw(attributes))
    assert torch.equal(rolled.draw(attributes), plain.draw(rolled.shown(attributes)))
    read = evaluate.shapes_report(rolled.draw(attributes), rolled.shown(attributes))
    assert read["right"] == 1 and evaluate.shapes_report(rolled.draw(attributes), attributes)["right"] == 0


def test_the_backgrounds_colour_error():
    dataset = Shapes(32)
    attributes = dataset.attributes(range(60))
    pictures = dataset.draw(attributes)
    assert evaluate.shapes_report(pictures, attributes)["background_error"] < 0.003
    assert evaluate.shapes_report((pictures.float() * 0.9).byte(), attributes)["background_error"] == pytest.approx(
        0.1 * torch.tensor([1.0, 0.5, 0.0])[attributes["background"]].mean().item(), abs=0.005)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_denoiser_has_no_loss(prediction_type):
    schedule = common.NoiseSchedule.from_config(tiny.scheduler().config).zero_terminal_snr()
    x0 = torch.randn(16, 4, 8, 8)

    def perfect(x_t, t):
        return SimpleNamespace(sample=schedule.convert(x0, x_t, t, "sample", prediction_type))

    draw = common.Draws(0, 0, 16, slice(None), "cpu")
    assert pretrain.denoising_loss(perfect, schedule, x0, {}, draw, prediction_type) < 1e-6
    assert pretrain.denoising_loss(lambda x_t, t: SimpleNamespace(sample=0 * x_t), schedule, x0, {}, draw, prediction_type) > 0.5


def test_a_base_is_trained_on(tmp_path):
    """Another palette and PixArt's schedule: the UNet moves, nothing else does."""
    tiny.sd().save_pretrained(tmp_path / "sd")
    pretrain.main(["--base", str(tmp_path / "sd"), "--dataset", "shapes-rolled", "--schedule", "pixart", "--iterations", "2", "--device", "cpu",
                   "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")])
    (before, codec), (after, other) = common.load(tmp_path / "sd"), common.load(tmp_path / "out")
    assert after.schedule.alpha[-1].item() == pytest.approx(0.00635282, rel=1e-4)
    assert any(not torch.equal(v, before.net.state_dict()[k]) for k, v in after.net.state_dict().items())
    assert all(torch.equal(v, codec.vae.state_dict()[k]) for k, v in other.vae.state_dict().items())
    with pytest.raises(common.UserError, match="--schedule cosine"):
        pretrain.main(["--base", str(tmp_path / "sd"), "--schedule", "cosine", "--out", str(tmp_path / "no")])
    for argv in (["--base", str(tmp_path / "sd")], ["--base", str(tmp_path / "sd"), "--out", str(tmp_path / "sd")], ["--dataset", str(tmp_path)]):
        with pytest.raises(common.UserError, match="--out .*replaced as a whole"):
            pretrain.main(argv)
    with pytest.raises(common.UserError, match="--schedule: only with --base"):
        pretrain.main(["--schedule", "pixart", "--out", str(tmp_path / "no")])


def test_ablation_rows_are_kept_and_failures_named(tmp_path, monkeypatch):
    rows = [dict(arm="yoso", seed=s, num=10, flags=["--iterations", "10", "--seed", str(s)], **{k: s for k in ablate.COLUMNS["yoso"]})
            for s in (0, 1)]
    for row in rows:
        (tmp_path / f"yoso-seed{row['seed']}.json").write_text(json.dumps(row))
    assert [ablate.run_row("yoso", "yoso", s, 10, tmp_path, 10) for s in (0, 1)] == rows, "an existing row is not run again"
    with pytest.raises(common.UserError, match="choose another --out"):
        ablate.run_row("yoso", "yoso", 0, 20, tmp_path, 10)
    table = ablate.table("yoso", rows)
    assert "| yoso | 2 | 0.5 ± 0.71 |" in table and "| UFOGen | 0 | not run |" in table
    monkeypatch.setitem(ablate.YOSO, "yoso", ["--distance", "l3"])
    failed = ablate.run_row("yoso", "yoso", 7, 10, tmp_path, 10)
    assert "--distance l3: unknown" in failed["failed"] and not (tmp_path / "yoso-seed7.json").exists()


@pytest.mark.parametrize("method", ablate.ARMS)
def test_arms_have_names_of_their_own_and_flags_that_exist(method):
    arms = ablate.ARMS[method]
    assert len({ablate.name_of(arm, 0) for arm in arms}) == len(arms)
    script = importlib.import_module("yoso" if method.startswith("yoso") else method)
    kind, presets = (yoso.FineTune, yoso.FINE_TUNE_PRESETS) if method.startswith("yoso_") else (script.Config, script.PRESETS)
    for arm in arms.values():
        arguments = [a.format(iterations=3, longer=9, out="out", seed=0) for a in (arm if method == "yoso" else arm[0]) or ()]
        assert plumbing.cli.parse_config(kind, presets, arguments, "").iterations in (1, 3, 9, 100, 200, 400, 800, kind.iterations) or not arguments


def test_benchmark_accounts_for_the_step(tmp_path):
    parts, networks, run = benchmark.yoso_parts(config(tmp_path, r1=0.1), tmp_path / "run")
    times = benchmark.time_parts(parts, 1, run.device)
    assert {"step", "step with R1"} < times.keys() and all(t > 0 for t in times.values())
    assert set(networks) == {"generator", "discriminator"}


def test_scaling_names_what_is_wrong():
    with pytest.raises(common.UserError, match="--batch-size 9 is not divisible"):
        benchmark.main(["yoso", "--preset", "shapes", "--batch-size", "9", "--processes", "2"])


def test_scaling_over_two_processes(tmp_path):
    """Four rates; what fails in a process is told."""
    with pytest.raises(common.UserError, match="--processes 2: a process failed .*a multiple of 4"):
        benchmark.main(["yoso", "--preset", "shapes", "--batch-size", "6", "--processes", "2"])
    benchmark.main(["yoso", "--preset", "shapes", "--batch-size", "8", "--channels", "8", "16", "--channels-d", "8", "16", "--processes", "2",
                    "--repeats", "5", "--json", str(tmp_path / "rates.json")])
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert set(rates) == {"whole", "part", "together", "apart"} and all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("stage", ["a", "b"])
def test_benchmark_of_swiftbrush(tmp_path, stage):
    """Every part runs; a separate LoRA teacher is a network of its own, and costs the memory of one."""
    config = swiftbrush_v2.Config(**swiftbrush_v2.PRESETS["shapes"] | dict(stage=stage, batch_size=2, device="cpu"))
    parts, networks, run = benchmark.swiftbrush_parts(config, tmp_path / "run")
    times = benchmark.time_parts(parts, 1, run.device)
    assert all(t > 0 for t in times.values()) and ("decoder and CLIP, forward + input backward" in times) == (stage == "b")
    assert networks["teacher"] is networks["lora_teacher"] and (networks["student"] is networks["teacher"]) == (stage == "b")
    separate = benchmark.swiftbrush_parts(config, tmp_path / "separate", True)[1]
    assert separate["teacher"] is not separate["lora_teacher"]


def test_benchmark_of_diff_instruct(tmp_path):
    """Every part runs; one plain backward pass holds the graphs of divergence and reward together, the leaf trick does not."""
    config = diff_instruct_star.Config(**diff_instruct_star.PRESETS["shapes"] | dict(batch_size=8, device="cpu"))
    parts, networks, run = benchmark.diff_instruct_parts(config, tmp_path / "run")
    assert all(t > 0 for t in benchmark.time_parts(parts, 1, run.device).values())
    assert len({id(network) for network in networks.values()}) == 3
    leaf, plain = (benchmark.peak_of_steps(benchmark.diff_instruct_parts, config, tmp_path / str(p), p) for p in (False, True))
    assert leaf < plain


def test_every_command_of_the_readme_has_existing_flags():
    """Flags in the README's commands exist in the script that the command names."""
    root = common.Path(__file__).parent.parent
    readme = (root / "README.md").read_text()
    sources = {str(path.relative_to(root)): path.read_text() for path in (*root.glob("*.py"), *(root / "tools").glob("*.py"))}
    commands = re.findall(r"(?:python|torchrun[^\n]*?) ((?:tools/)?\w+\.py)([^\n#]*)", readme)
    assert len(commands) >= 8
    for script, rest in commands:
        for name in set(re.findall(r"--([a-z0-9-]+)", rest)) - {"help"}:
            text = sources[script] + (sources["yoso.py"] + sources["swiftbrush_v2.py"] if script == "tools/benchmark.py" else "")
            assert f'"--{name}"' in text or f"\n    {name.replace('-', '_')}: " in text, (script, name)
