"""Pictures as files: grids with labels, single pictures with captions, and the cards beside pipelines."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, fails, metrics, tiny_config
from huggingface_hub import ModelCard
from PIL import Image

import diff_instruct_star as di
import plumbing.run
import swiftbrush_v2 as sb
import yoso
from common import UserError, load
from plumbing.data import Folder
from plumbing.grids import save_grid, save_pictures, to_levels
from plumbing.run import tracker
from plumbing.shapes import Shapes
from plumbing.students import model_card


def test_a_grid_with_labels_is_the_grid_in_a_margin(tmp_path):
    """The pictures stand where they stood, moved by the margin, and each label beside its row or column."""
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    save_grid(images, tmp_path / "plain.png", 3)
    save_grid(images, tmp_path / "labelled.png", 3, rows=["teacher, 25 steps", "ours"],
              captions=["a large red circle on white", "b", "c"])
    plain, labelled = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "labelled"))
    top, left = (a - b for a, b in zip(labelled.shape[:2], plain.shape[:2]))
    assert left > 50 and top > 20 and (labelled[top:, left:] == plain).all()
    ink = labelled.min(2) < 128
    rows = [ink[top + i * 66:top + (i + 1) * 66, :left].any() for i in range(2)]
    columns = [ink[:top, left + i * 66:left + (i + 1) * 66].sum() for i in range(3)]
    assert all(rows) and all(columns) and columns[0] > 5 * columns[1] and not ink[:top, :left].any()
    assert (plain[2:66, 2:66] == to_levels(images[:1])[0].permute(1, 2, 0).numpy()).all()


def test_single_pictures_come_back_with_their_captions(tmp_path):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    save_pictures(tmp_path / "saved", images[:2], ["a", "b ü"])
    save_pictures(tmp_path / "saved", images[2:], ["c"], 2)
    folder = Folder(str(tmp_path / "saved"), 16)
    assert [folder[i]["caption"] for i in range(3)] == ["a", "b ü", "c"]
    assert all(torch.equal(folder[i]["image"], images[i]) for i in range(3))


def test_sample_saves_single_pictures(tmp_path, monkeypatch, capsys):
    """Those of the grid; never into a folder that is there."""
    yoso.main([*TINY, "--iterations", "1", "--out", str(tmp_path / "run")])
    command = ["sample", "--run", str(tmp_path / "run"), "--num", "3", "--grid", str(tmp_path / "grid.png"),
               "--save", str(tmp_path / "single"), "--device", "cpu"]
    yoso.main(command)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    for i in range(3):
        picture = np.asarray(Image.open(tmp_path / "single" / f"{i:06d}.png")).repeat(4, 0).repeat(4, 1)
        assert (picture == grid[2:66, 2 + 66 * i:66 + 66 * i]).all()
    assert "exists already; choose a new folder" in fails(monkeypatch, capsys, yoso, *command)


def test_a_card_stands_beside_every_pipeline(tmp_path):
    yoso.main([*TINY, "--iterations", "1", "--out", str(tmp_path / "run")])
    text = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: diffusers\n") and text.count("---\n") == 2
    assert "YOSO" in text and "Trained from scratch" in text and "--channels 8 16" in text
    assert str(tmp_path) not in text, "no names of places on this machine"
    assert "license" not in text and "PROMPT" not in text
    config = sb.Config(model="stabilityai/stable-diffusion-2-1-base", rank=3, prompts="/home/me/prompts.txt")
    codec = load("assets/mini-sd")[1]
    card = model_card("SwiftBrush v2", config, codec, prior=True)
    assert "base_model: stabilityai/stable-diffusion-2-1-base\n" in card and "/home/me" not in card
    assert "--rank 3" in card and "informative_prior.safetensors" in card and "guidance_scale=1" in card
    local = model_card("SwiftBrush v2", replace(config, model="assets/mini-sd"), codec)
    assert "base_model" not in local and "Trained from mini-sd" in local


def test_a_card_names_all_that_weights_and_data_came_from(tmp_path):
    """Each once, of directories the name alone; on the hub those that are there are the base models."""
    codec, sd15 = load("assets/mini-sd")[1], "stable-diffusion-v1-5/stable-diffusion-v1-5"
    (run := tmp_path / "flywheel").mkdir()
    (tmp_path / "turbo" / "pipeline").mkdir(parents=True)
    generated = dict(generator=str(tmp_path / "turbo" / "pipeline"), generator_lora=str(run))
    tuned = yoso.Config(model="a/pixart", lora=sd15, discriminator=sd15, **generated)
    student = "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin"
    distilled = di.Config(model="a/sdxl", student=student, lora="/gone/home/me/style", prompts="/home/me/x")
    both = "licences all hold for these weights"
    for config, text, bases in (
            (tuned, f"Trained from a/pixart, {sd15}, turbo, flywheel, whose {both}.", ["a/pixart", sd15]),
            (distilled, f"Trained from a/sdxl, {student}, style, whose {both}.", ["a/sdxl", "tianweiy/DMD2"]),
            (di.Config(model="a/sdxl", student="a/sdxl"), "from a/sdxl, whose licence also holds", "a/sdxl"),
            (di.Config(model="assets/mini-sd", student="assets/mini-student"), "mini-student, whose", None)):
        card = ModelCard(model_card("A method", config, codec))
        assert text in card.text and card.data.base_model == bases and card.data.license == "other"
        assert card.data.license_name.startswith("those" if "all" in card.text else "that-")
        assert "/me" not in card.content and str(tmp_path) not in card.content


def test_the_code_of_a_card_runs(tmp_path):
    """As it stands, with the folder's name filled in; there is none where no pipeline fits."""
    for name, more in (("plain", []), ("latent", ["--latent-z", "8"])):
        yoso.main([*TINY, "--iterations", "1", "--out", str(tmp_path / name), *more])
    plain, latent = (tmp_path / name / "pipeline" / "README.md" for name in ("plain", "latent"))
    assert "```" not in latent.read_text() and "yoso.py sample" in latent.read_text()
    code, images = plain.read_text().split("```")[1].removeprefix("python\n"), {}
    exec(code.replace("FOLDER_OR_ID", repr(str(plain.parent))), images)
    assert len(images["images"]) == 1


def test_the_log_goes_to_tensorboard_too(tmp_path):
    """The keys and values of metrics.jsonl."""
    yoso.train(tiny_config(tmp_path, track="tensorboard", iterations=4))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    rows = metrics(tmp_path)
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"iteration"}
    for key in ("L_D", "grad_G"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in found] == [row["iteration"] for row in rows]
        assert [value for _, value in found] == pytest.approx([row[key] for row in rows])


def test_a_missing_tracker_is_named(tmp_path, monkeypatch):
    """Before anything is trained."""
    monkeypatch.setitem(plumbing.run.sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tracker("tensorboard", tmp_path, 0)
    assert tracker("", tmp_path, 0) is None


def test_a_student_is_sampled_without_its_run(tmp_path):
    """As --run stands the pipeline's own folder; its prompts are the shapes' captions."""
    command = ["sample", "--run", "assets/mini-sd", "--num", "3", "--device", "cpu"]
    sb.main([*command, "--grid", str(tmp_path / "all.png"), "--save", str(tmp_path / "all")])
    lines = (tmp_path / "all" / "metadata.jsonl").read_text().splitlines()
    captions = {json.loads(line)["text"] for line in lines}
    assert len(captions) == 3 and captions <= set(Shapes.all_captions())
    sb.main([*command, "--grid", str(tmp_path / "one.png"), "--prompts", "a small blue square on gray"])
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "all.png").read_bytes()
    with pytest.raises(UserError, match="no finished student a in it"):
        sb.main([*command, "--which", "a"])
