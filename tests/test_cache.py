"""Latents and conditions that are computed once."""

import json

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import common
import plumbing.cache
import plumbing.data
import plumbing.shapes
import yoso

PROMPTS = ["a red circle", "a blue square on white", "", "a circle", "a red circle", "a square"]


def tree(cond):
    return {key: value.shape for key, value in plumbing.cache.flat_cond(cond).items()}, set(cond)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart])
def test_conditions_come_from_the_cache(make, tmp_path, monkeypatch):
    """The same to float16, in any order, the empty one too, without a text encoder."""
    monkeypatch.setattr(plumbing.cache, "CACHED", 2)
    make().save_pretrained(tmp_path / "model")
    _, codec = common.load(tmp_path / "model")
    asked = PROMPTS[::-1]
    before, null = codec.cond(asked), codec.null(3)
    plumbing.cache.cache_conditions(codec, PROMPTS, tmp_path / "cache", dict(model="m"))
    with monkeypatch.context() as patch:
        patch.setattr(type(codec.pipe), "encode_prompt", None)
        after = codec.cond(asked), codec.null(3)
    for computed, cached in zip((before, null), after):
        assert tree(computed) == tree(cached)
        for key, value in plumbing.cache.flat_cond(computed).items():
            torch.testing.assert_close(plumbing.cache.flat_cond(cached)[key], value.float(), atol=1e-3, rtol=1e-3)
    assert len(list((tmp_path / "cache").glob("conditions-*.safetensors"))) == 3, "five different prompts, two a file"
    with pytest.raises(common.UserError, match="made with other flags"):
        plumbing.cache.cache_conditions(common.load(tmp_path / "model")[1], PROMPTS[1:3], tmp_path / "cache", dict(model="m"))


@pytest.fixture
def pictures(tmp_path):
    shapes = plumbing.shapes.Shapes(16)
    (tmp_path / "pictures").mkdir()
    for i, sample in enumerate(shapes.__getitems__(range(7))):
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(sample["caption"])
    (tmp_path / "pictures" / "3.png").write_bytes(b"not a picture")
    return tmp_path / "pictures"


def test_latents_come_from_the_cache(pictures, tmp_path, monkeypatch, capsys):
    """The VAE's means to float16 with their captions; a second start encodes nothing; an unreadable picture is named."""
    monkeypatch.setattr(plumbing.cache, "CACHED", 3)
    tiny.sd().save_pretrained(tmp_path / "model")
    _, codec = common.load(tmp_path / "model")
    dataset = plumbing.data.load_dataset(str(pictures), codec.picture_size)
    latents = plumbing.cache.cache_latents(codec, dataset, tmp_path / "cache", {})
    assert "3.png" in capsys.readouterr().err and len(latents) == 7
    for i in range(7):
        x0 = codec.encode(plumbing.data.to_floats(dataset[i]["image"][None]))[0]
        torch.testing.assert_close(latents[i]["image"], x0.detach(), atol=1e-3, rtol=1e-3)
        assert latents[i]["caption"] == dataset[i]["caption"]
        assert codec.encode(latents[i]["image"][None]) is not None and torch.equal(codec.encode(x0[None]), x0[None])
    monkeypatch.setattr(codec, "encode", None)
    assert torch.equal(plumbing.cache.cache_latents(codec, dataset, tmp_path / "cache", {})[6]["image"], latents[6]["image"])
    with pytest.raises(common.UserError, match="made with other flags"):
        plumbing.cache.cache_latents(codec, dataset, tmp_path / "cache", dict(model="another"))
    (pictures / "5.txt").write_text("another caption")
    with pytest.raises(common.UserError, match="state of the files"):
        plumbing.cache.cache_latents(codec, plumbing.data.load_dataset(str(pictures), 16), tmp_path / "cache", {})
    endless = plumbing.data.load_dataset("shapes", 16)
    assert plumbing.cache.cache_latents(codec, endless, tmp_path / "none", {}) is endless


def test_a_fine_tune_on_the_cache(pictures, tmp_path, monkeypatch):
    """The same losses to float16 as without it, and a complete pipeline."""
    tiny.sd().save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--dataset", str(pictures), "--preset", "shapes", "--batch-size", "4", "--iterations", "2",
            "--log-every", "1", "--prior-num", "4", "--device", "cpu", "--out"]
    logs = []
    for name, more in (("plain", []), ("cached", ["--cache-latents"])):
        yoso.main([*argv, str(tmp_path / name), *more])
        logs.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    for plain, cached in zip(*logs):
        assert all(cached[key] == pytest.approx(plain[key], rel=2e-2, abs=2e-3) for key in ("L_D", "L_rec", "L_con", "L_adv"))
    states = [StableDiffusionPipeline.from_pretrained(tmp_path / name / "pipeline").text_encoder.state_dict() for name in ("plain", "cached")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
