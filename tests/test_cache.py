"""Latents and conditions that are computed once."""

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from helpers import metrics
from PIL import Image

import plumbing.cache
import yoso
from common import UserError, load
from plumbing.cache import cache_conditions, cache_latents, flat_cond
from plumbing.data import load_dataset, to_floats
from plumbing.shapes import Shapes

PROMPTS = ["a red circle", "a blue square on white", "", "a circle", "a red circle", "a square"]


def structure(cond):
    """The shapes of a condition's tensors, and its keys, of which one may hold None."""
    return {key: value.shape for key, value in flat_cond(cond).items()}, set(cond)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart])
def test_conditions_come_from_the_cache(make, tmp_path, monkeypatch):
    """The same to float16, in any order, the empty one too, without a text encoder."""
    monkeypatch.setattr(plumbing.cache, "CACHED", 2)
    make().save_pretrained(tmp_path / "model")
    _, codec = load(tmp_path / "model")
    asked = PROMPTS[::-1]
    before = codec.cond(asked), codec.null(3)
    cache_conditions(codec, PROMPTS, tmp_path / "cache", dict(model="m"))
    with monkeypatch.context() as patch:
        patch.setattr(type(codec.pipe), "encode_prompt", None)
        after = codec.cond(asked), codec.null(3)
    for computed, cached in zip(before, after):
        assert structure(computed) == structure(cached)
        for key, value in flat_cond(computed).items():
            found = flat_cond(cached)[key]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, value.float(), atol=1e-3, rtol=1e-3)
    files = list((tmp_path / "cache").glob("conditions-*.safetensors"))
    assert len(files) == 3, "five different prompts, two a file"
    codec.cache = None
    with pytest.raises(UserError, match="made with other flags"):
        cache_conditions(codec, PROMPTS[1:3], tmp_path / "cache", dict(model="m"))


@pytest.fixture
def pictures(tmp_path):
    """A folder of seven captioned pictures, of which one cannot be read."""
    (folder := tmp_path / "pictures").mkdir()
    for i, sample in enumerate(Shapes(16).__getitems__(range(7))):
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(sample["caption"])
    (folder / "3.png").write_bytes(b"not a picture")
    return folder


def test_latents_come_from_the_cache(pictures, tmp_path, monkeypatch, capsys):
    """The VAE's means to float16 with their captions; a second start encodes nothing; bad files are named."""
    monkeypatch.setattr(plumbing.cache, "CACHED", 3)
    tiny.sd().save_pretrained(tmp_path / "model")
    _, codec = load(tmp_path / "model")
    dataset = load_dataset(str(pictures), codec.picture_size)
    latents = cache_latents(codec, dataset, tmp_path / "cache", {})
    assert "3.png" in capsys.readouterr().err and len(latents) == 7
    for i in range(7):
        x0 = codec.encode(to_floats(dataset[i]["image"][None]))[0].detach()
        cached = latents[i]["image"]
        torch.testing.assert_close(cached, x0, atol=1e-3, rtol=1e-3)
        assert latents[i]["caption"] == dataset[i]["caption"]
        assert torch.equal(codec.encode(cached[None])[0], cached), "a latent is not encoded again"
    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode", None)
        again = cache_latents(codec, dataset, tmp_path / "cache", {})
        assert torch.equal(again[6]["image"], latents[6]["image"])
    with pytest.raises(UserError, match="made with other flags"):
        cache_latents(codec, dataset, tmp_path / "cache", dict(model="another"))
    (pictures / "5.txt").write_text("another caption")
    with pytest.raises(UserError, match="state of the files"):
        cache_latents(codec, load_dataset(str(pictures), 16), tmp_path / "cache", {})
    endless = load_dataset("shapes", 16)
    assert cache_latents(codec, endless, tmp_path / "none", {}) is endless
    assert not (tmp_path / "none").exists()


def test_a_fine_tune_on_the_cache(pictures, tmp_path):
    """The same losses to float16 as without it, and a complete pipeline."""
    tiny.sd().save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--dataset", str(pictures), "--preset", "mini", "--device",
            "cpu", "--batch-size", "4", "--iterations", "2", "--log-every", "1", "--prior-num", "4", "--out"]
    encoders = []
    for name, more in (("plain", []), ("cached", ["--cache-latents"])):
        yoso.main([*argv, str(tmp_path / name), *more])
        exported = StableDiffusionPipeline.from_pretrained(tmp_path / name / "pipeline")
        encoders.append(exported.text_encoder.state_dict())
    plain, cached = metrics(tmp_path / "plain"), metrics(tmp_path / "cached")
    assert len(plain) == len(cached) == 2
    for a, b in zip(plain, cached):
        for key in ("L_D", "L_rec", "L_con", "L_adv"):
            assert b[key] == pytest.approx(a[key], rel=2e-2, abs=2e-3)
    assert encoders[0].keys() == encoders[1].keys()
    assert all(torch.equal(value, encoders[1][key]) for key, value in encoders[0].items())
