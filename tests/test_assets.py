"""The mini models that the repository carries, and the tool that makes them."""

import json
import math
from functools import partial

import evaluate
import pretrain
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from helpers import CAPTIONS, ROOT
from PIL import Image
from transformers import CLIPModel

from common import Draws, UserError, ddim_sample, draw_samples, load
from plumbing.data import to_floats
from plumbing.files import check_folder
from plumbing.grids import to_levels
from plumbing.shapes import Shapes

TEACHER_GUIDANCE = 2.0  # its best, see docs/mini-sd.md
ASSETS = ROOT / "assets"
MODELS = ("mini-sd", "mini-clip", "mini-judge", "mini-pickscore", "mini-taesd")


def test_they_fit_into_12_megabytes_of_half_precision():
    assert all((ASSETS / name).is_dir() for name in MODELS)
    files = [f for name in MODELS for f in (ASSETS / name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12 * 2**20
    assert not [f for f in files if f.suffix not in (".json", ".safetensors", ".txt")]


def test_diffusers_alone_gives_the_same_picture():
    """DiffusionPipeline on assets/mini-sd against our sampler, from the same noise."""
    pipe = DiffusionPipeline.from_pretrained(ASSETS / "mini-sd")
    pipe.set_progress_bar_config(disable=True)
    denoiser, codec = load(ASSETS / "mini-sd")
    x_T, prompts = torch.randn(2, *codec.shape), CAPTIONS[:2]
    theirs = pipe(prompts, latents=x_T, num_inference_steps=10, guidance_scale=2.0, output_type="pt").images
    ours = codec.decode(ddim_sample(denoiser, x_T, 10, codec.cond(prompts), codec.null(2), 2.0))
    assert ((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 1e-3


def test_the_teacher_draws_what_the_caption_says():
    """60 captions; 1,000 are measured in docs/mini-sd.md."""
    wanted = Shapes(32, 5).attributes(range(60))
    captions, teacher, right = Shapes(32).captions(wanted), load(ASSETS / "mini-sd"), {}
    for steps in (25, 1):
        chunks = evaluate.many_step_chunks(*teacher, captions, steps, TEACHER_GUIDANCE, 0)
        right[steps] = evaluate.shapes_report(torch.cat([images for images, _ in chunks]), wanted)["right"]
    assert right[25] > 0.9 and right[1] < 0.5 * right[25]


def test_the_student_draws_it_in_one_call():
    """60 captions; 1,000 were measured once. Its files are whole, and half of float32."""
    check_folder(ASSETS / "mini-student")
    wanted = Shapes(32, 5).attributes(range(60))
    student, codec = load(ASSETS / "mini-student")
    pictures = draw_samples(student, codec, Shapes(32).captions(wanted), 0)
    assert evaluate.shapes_report(to_levels(pictures), wanted)["right"] > 0.9
    pipe = DiffusionPipeline.from_pretrained(ASSETS / "mini-student")  # as its card says
    pipe.set_progress_bar_config(disable=True)
    assert pipe(CAPTIONS[0], num_inference_steps=1, guidance_scale=1).images[0].size == (32, 32)
    files = [file for file in (ASSETS / "mini-student").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8 * 2**20


def test_mini_clip_and_mini_pickscore():
    tokenizer = pretrain.build_tokenizer()
    clip, judge, pickscore = (CLIPModel.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
                              for name in ("mini-clip", "mini-judge", "mini-pickscore"))
    assert all(min(pretrain.measure_clip(model, tokenizer, 500).values()) > 0.97 for model in (clip, judge))
    assert not torch.equal(clip.visual_projection.weight, judge.visual_projection.weight)
    assert min(pretrain.measure_pickscore(pickscore, tokenizer, 500).values()) > 0.93


def test_the_cheap_decoder_agrees_with_the_autoencoder():
    _, codec = load(ASSETS / "mini-sd")
    tiny = AutoencoderTiny.from_pretrained(ASSETS / "mini-taesd")
    shapes = Shapes(32, 5)
    attributes = shapes.attributes(range(50))
    x0 = codec.encode(to_floats(shapes.draw(attributes)))
    for pictures in (codec.decode(x0), tiny.decode(x0).sample.detach()):
        found = evaluate.read_shapes(evaluate.to_uint8(pictures))
        for name in ("colour", "background", "shape", "scale"):
            assert (found[name] == attributes[name]).float().mean() >= 0.96, name


def test_the_tokenizer_knows_the_words():
    """One token a word, and any other text falls back to bytes."""
    tokenizer = pretrain.build_tokenizer()
    ids = tokenizer("a large red circle on white").input_ids
    assert len(ids) == 8 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("Zebra on gray").input_ids, skip_special_tokens=True) == "zebra on gray"


def test_preference_pairs_follow_the_stated_taste():
    shapes, n = Shapes(32, 3), 200
    better, worse, prompts = pretrain.better_first(shapes, 0, Draws(0, 0, n, slice(None), "cpu"), "cpu")
    read = [evaluate.read_shapes(evaluate.to_uint8(x)) for x in (better, worse)]
    assert prompts == shapes.captions(shapes.attributes(range(n)))
    shown = [[a == b for a, b in zip(shapes.captions(r), prompts)] for r in read]
    distance = [pretrain.distance_from_middle(r) for r in read]
    assert 0.7 < sum(shown[1]) / n < 0.85, "in a quarter of the pairs the worse one shows something else"
    for high, low, d_high, d_low in zip(*shown, *distance):
        assert high and (not low or d_high <= d_low + 0.01)


def test_contrastive_loss_leaves_twins_out():
    """Equal captions are no negatives of one another; logits of +-20 that are right give a loss of 0."""
    captions = ["a", "b", "a", "c"]
    same = torch.tensor([[x == y for x in captions] for y in captions])
    assert pretrain.contrastive_loss(torch.where(same, 20.0, -20.0), captions) < 1e-6
    blind = pretrain.contrastive_loss(torch.zeros(4, 4), ["a", "b", "c", "d"])
    assert blind.item() == pytest.approx(math.log(4))


def test_pretrain_command(tmp_path, monkeypatch):
    """A few steps give ordinary directories that load; again, nothing is trained a second time."""
    for measure in ("measure_clip", "measure_pickscore"):
        monkeypatch.setattr(pretrain, measure, partial(getattr(pretrain, measure), num=20))
    arguments = ["--scale", "0.0005", "--out", f"{tmp_path}/out", "--runs", f"{tmp_path}/runs"]
    arguments += ["--device", "cpu"]
    pretrain.main(arguments)
    denoiser, codec = load(str(tmp_path / "out" / "mini-sd"))
    assert codec.vae.config.scaling_factor != 0.18215
    before = {k: v.clone() for k, v in denoiser.net.state_dict().items()}
    logs = {p: p.read_text() for p in (tmp_path / "runs").rglob("metrics.jsonl")}
    assert len(logs) == 6
    pretrain.main(arguments)
    assert logs == {p: p.read_text() for p in logs}
    after = load(str(tmp_path / "out" / "mini-sd"))[0].net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_pixel_space_teacher(tmp_path):
    """Class-conditional, from a folder by class, read back by load()."""
    shapes = Shapes(16, 0)
    for i, image in enumerate(shapes.draw(shapes.attributes(range(12)))):
        folder = tmp_path / "data" / ("even", "odd")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    folders = ["--dataset", f"{tmp_path}/data", "--out", f"{tmp_path}/teacher", "--runs", f"{tmp_path}/runs"]
    sizes = ["--iterations", "2", "--batch-size", "4", "--image-size", "16", "--channels", "16", "32"]
    pretrain.main([*folders, *sizes, "--device", "cpu"])
    denoiser, codec = load(str(tmp_path / "teacher"))
    assert codec.classes == ["even", "odd"] and codec.shape == (3, 16, 16)
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([100, 200])
    output = denoiser.predict(x_t, t, "epsilon", codec.cond(["a photo of a even", "odd"]), codec.null(2), 2.0)
    assert output.shape == x_t.shape and output.isfinite().all()
    with pytest.raises(UserError, match="has no classes"):
        pretrain.main(["--dataset", f"{tmp_path}/data/odd", "--out", f"{tmp_path}/no"])


def test_evaluate_a_pipeline(tmp_path, capsys):
    """A pipeline against the shapes, with scores and features of CLIPModels; the pictures are kept."""
    kept = tmp_path / "kept"
    measures = [f"{flag}={ASSETS}/mini-{name}" for flag, name in (
        ("--features", "clip"), ("--clip", "clip"), ("--reward", "pickscore"), ("--judge", "judge"))]
    evaluate.main(["--model", f"{ASSETS}/mini-sd", "--num", "12", "--steps", "2", "--guidance", "2",
                   *measures, "--save", str(kept), "--device", "cpu"])
    report = json.loads(capsys.readouterr().out)
    assert {"frechet", "kid", "precision", "recall", "clip_score", "reward_score", "judge_score",
            "judge_frechet", "right", "colour_right", "prompts", "reference"} <= report.keys()
    rows = [json.loads(line) for line in (kept / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["text"].startswith("a ") for row in rows)
    assert all(Image.open(kept / row["file_name"]).size == (32, 32) for row in rows)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle on white\n")
    report = evaluate.evaluate(model=ASSETS / "mini-sd", prompts=prompts, num=5, steps=1, device="cpu")
    assert report["prompts"] == str(prompts) and "right" not in report
    with pytest.raises(UserError, match="exists already"):
        evaluate.evaluate(model=ASSETS / "mini-sd", num=5, steps=1, save=kept, device="cpu")
