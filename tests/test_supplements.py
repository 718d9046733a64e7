"""The supplements: closed forms, the networks as they were afterwards, the flags of `sample`."""

import pytest
import tiny
import torch
import torch.nn.functional as F
import try_supplements
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from helpers import CAPTIONS, ROOT
from ladder import SD15
from PIL import Image

import swiftbrush_v2 as sb
from common import UserError, chunk_for, draw_samples, load, one_step
from plumbing.shapes import Shapes
from supplements.negative import steered, steered_attention
from supplements.sizes import redilated, redilated_conv, redilated_layers, resized


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """kind -> (student, codec) of a tiny pipeline."""
    found = {}
    for kind in ("sd", "sdxl", "pixart"):
        path = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        getattr(tiny, kind)().save_pretrained(path)
        found[kind] = load(path)
    return found


def one_call(student, codec, captions=CAPTIONS[:2]):
    """One-step pictures in x0's space, from the same noise every time."""
    z = torch.randn(len(captions), *codec.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return one_step(student, z, codec.cond(captions))


# Sizes

def kernel(side=3):
    return torch.randn(5, 3, side, side), torch.randn(5)


def test_twice_the_size_is_dilation_two():
    """On a picture whose pixels stand between zeros it gives the small picture's result at every second
    pixel.
    """
    x, (weight, bias) = torch.randn(2, 3, 6, 8), kernel()
    spread = torch.zeros(2, 3, 12, 16)
    spread[:, :, ::2, ::2] = x
    found = redilated_conv(spread, weight, bias, 2)
    torch.testing.assert_close(found[:, :, ::2, ::2], F.conv2d(x, weight, bias, padding=1))
    assert torch.equal(found, F.conv2d(spread, weight, bias, padding=2, dilation=2))
    assert torch.equal(redilated_conv(x, weight, bias, 1), F.conv2d(x, weight, bias, padding=1))


@pytest.mark.parametrize("side", [1, 3, 5])
def test_a_broken_ratio_by_hand(side):
    """1.25 is dilation 2 on a picture 2 / 1.25 = 1.6 times as large, whatever the kernel's size."""
    x, (weight, bias) = torch.randn(2, 3, 20, 10), kernel(side)
    large = F.conv2d(F.interpolate(x, (32, 16), mode="bilinear"), weight, bias, padding=side - 1, dilation=2)
    by_hand = F.interpolate(large, (20, 10), mode="bilinear")
    assert torch.equal(redilated_conv(x, weight, bias, 1.25), by_hand)


@pytest.mark.parametrize("ratio", [1, 1.25, 1.5, 2, 2.5])
def test_taps_are_ratio_pixels_apart(ratio):
    """The difference of the outer taps on a slope of 1 a pixel is twice their distance, also a broken one."""
    ramp = torch.arange(60.0)  # 60, so that all the enlarged sizes are whole
    difference = torch.tensor([-1.0, 0, 1]).view(1, 1, 1, 3) * torch.tensor([0.0, 1, 0]).view(1, 1, 3, 1)
    for x, weight in ((ramp.expand(1, 1, 60, 60), difference), (ramp.view(60, 1).expand(1, 1, 60, 60),
                                                               difference.transpose(2, 3))):
        found = redilated_conv(x, weight, None, ratio)
        assert found.shape == x.shape
        inside = found[0, 0, 6:-6, 6:-6]
        torch.testing.assert_close(inside, torch.full_like(inside, 2 * ratio), rtol=1e-4, atol=1e-4)


def test_the_published_layers():
    """Those of ScaleCrafter's sd1.5_1024x1024.txt, on SD 1.5's blocks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    names = {module: name for name, module in unet.named_modules()}
    resnets = [*(f"down_blocks.3.resnets.{i}" for i in (0, 1)), *(f"mid_block.resnets.{i}" for i in (0, 1)),
               *(f"up_blocks.0.resnets.{i}" for i in (0, 1, 2))]
    published = [f"{resnet}.conv{i}" for resnet in resnets for i in (1, 2)]
    published += ["up_blocks.0.upsamplers.0.conv"]
    assert [names[layer] for layer in redilated_layers(unet)] == published


def test_a_network_is_redilated_and_restored(loaded):
    """At twice the size with the taps moved it differs from the plain call; afterwards it is as it was."""
    student, codec = loaded["sd"]
    before = one_call(student, codec)
    with pytest.raises(KeyboardInterrupt), redilated(student.net, 2):
        changed = one_call(student, codec)
        raise KeyboardInterrupt
    assert not torch.equal(changed, before) and torch.equal(one_call(student, codec), before)
    assert not any("forward" in vars(module) for module in student.net.modules())
    with redilated(student.net, 1):
        assert torch.equal(one_call(student, codec), before)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_pictures_of_another_size(loaded, kind):
    """Smaller ones take the network as it is; wide ones the root of the areas' ratio in both directions."""
    student, codec = loaded[kind]
    shape, trained, ratios = codec.shape, codec.picture_size, {}
    assert trained == 32
    for size in ((32, 64), (64, 64), (16, 32)):
        with resized(student, codec, size):
            layer = next(redilated_layers(student.net))
            ratios[size] = layer.forward.keywords["ratio"]
            assert draw_samples(student, codec, CAPTIONS[:2], 0).shape == (2, 3, *size)
            assert chunk_for(codec) == (64 if 64 in size else 256)
        assert (codec.shape, codec.picture_size) == (shape, trained)
    assert ratios == {(32, 64): 2**0.5, (64, 64): 2, (16, 32): 1}
    with resized(student, codec, None):
        assert codec.shape == shape and "forward" not in vars(next(redilated_layers(student.net)))


def test_sdxl_is_told_the_size(loaded):
    """Height, then width, as diffusers tells it."""
    student, codec = loaded["sdxl"]
    width = codec.pipe.text_encoder_2.config.projection_dim
    for size in ((32, 64), None):
        told = codec.pipe._get_add_time_ids(size or (32, 32), (0, 0), size or (32, 32), torch.float32, width)
        with resized(student, codec, size):
            time_ids = codec.cond(CAPTIONS[:2])["added_cond_kwargs"]["time_ids"]
        assert torch.equal(time_ids, told.expand(2, -1))


def test_single_shapes_are_counted_and_read():
    """Drawings are one clean shape in any size and beside an empty half; two drawings, or none, are not."""
    shapes = Shapes(32)
    drawn = shapes.attributes(range(8))
    pictures, large, captions = shapes.draw(drawn), Shapes(64).draw(drawn), shapes.captions(drawn)
    empty = pictures[:, :, :1, :1].expand_as(pictures)
    wide = torch.cat([pictures, empty], 3)
    count = try_supplements.shares_of_single
    assert count(pictures, captions) == count(large, captions) == count(wide, captions) == [1, 1, 1]
    assert count(empty, captions) == count(torch.cat([pictures] * 2, 3), captions) == [0, 0, 0]
    assert count(wide.repeat_interleave(2, 3), captions) == [1, 0, 0]
    for name, other in (("colour", 1), ("background", 1), ("shape", 1)):
        wrong = shapes.draw(drawn | {name: (drawn[name] + other) % 3})
        assert count(wrong, captions) == [1, 1, 0]
    assert count(torch.cat([pictures[:2], wrong[2:4], empty[4:]]), captions) == [0.5, 0.5, 0.25]


def test_the_table_of_a_supplement(tmp_path, monkeypatch, capsys):
    """Markdown, with the spread of the other tables (n - 1), and none of a single seed."""
    shares = lambda student, codec, num, seed: {"a row": [(0.5, 0.7, 0.9)[seed], 1.0]}
    drawn = []
    monkeypatch.setitem(try_supplements.WHAT, "sizes", (shares, lambda *a: drawn.append(a), ["one", "two"]))
    flags = ["sizes", "--grid", str(tmp_path / "grid.png"), "--seeds"]
    try_supplements.main([*flags, "0", "1", "2"])
    assert capsys.readouterr().out == ("| sizes | one | two |\n|---|---|---|\n"
                                       "| a row | 70.0 ± 20.0 | 100.0 ± 0.0 |\n")
    try_supplements.main([*flags, "1"])
    assert "| a row | 70.0 | 100.0 |\n" in capsys.readouterr().out and len(drawn) == 2


# Negative prompts

def test_steered_attention_is_two_attentions_by_hand():
    """Z+ - alpha Z- before the output projection; exactly diffusers' own with alpha 0, linear in alpha."""
    attn = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4).eval()
    x, text, negative = torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.randn(1, 4, 6)

    def by_hand(text):
        q, k, v = attn.to_q(x), attn.to_k(text), attn.to_v(text)
        z = [(q[..., h] @ k[..., h].mT / 4**0.5).softmax(-1) @ v[..., h] for h in (slice(0, 4), slice(4, 8))]
        return torch.cat(z, -1)

    steer = lambda alpha, mask=None: steered_attention(attn, x, text, mask, negative, alpha)
    z = by_hand(text) - 0.3 * by_hand(negative.expand(3, -1, -1))
    torch.testing.assert_close(steer(0.3), F.linear(z, attn.to_out[0].weight, attn.to_out[0].bias))
    torch.testing.assert_close(steer(0.3) - steer(0), 0.5 * (steer(0.6) - steer(0)))
    assert torch.equal(steer(0), attn(x, encoder_hidden_states=text))
    mask = torch.zeros(3, 1, 7)
    mask[..., 5:] = -10_000.0
    torch.testing.assert_close(steer(0, mask), attn(x, encoder_hidden_states=text[:, :5]))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_a_student_is_steered_and_restored(loaded, kind):
    """With alpha 0 nothing changes, to the bit; another negative prompt gives another picture."""
    student, codec = loaded[kind]
    before = one_call(student, codec)
    processors = [m.processor for m in student.net.modules() if isinstance(m, Attention)]
    with steered(student, codec, "red", 0), steered(student, codec, "", 1):
        assert torch.equal(one_call(student, codec), before)
    with pytest.raises(KeyboardInterrupt), steered(student, codec, "red", 0.5):
        changed = one_call(student, codec)
        layers = [m for m in student.net.modules() if isinstance(m, Attention) and m.is_cross_attention]
        assert layers
        raise KeyboardInterrupt
    with steered(student, codec, "a blue square", 0.5):
        assert not torch.equal(one_call(student, codec), changed)
    assert not torch.equal(changed, before) and torch.equal(one_call(student, codec), before)
    after = [m.processor for m in student.net.modules() if isinstance(m, Attention)]
    assert all(a is b for a, b in zip(processors, after))


def test_pixarts_negative_is_projected_and_unpadded(loaded):
    student, codec = loaded["pixart"]
    cond = codec.cond(["red"])
    tokens = int(cond["encoder_attention_mask"].sum())
    with steered(student, codec, "red", 1), torch.no_grad():
        negative = student.net.transformer_blocks[0].attn2.processor.keywords["negative"]
        text = student.net.caption_projection(cond["encoder_hidden_states"][:, :tokens])
    assert tokens < cond["encoder_attention_mask"].shape[1]
    torch.testing.assert_close(negative, text)


# The command

def sample(tmp_path, *more):
    """The grid that `sample` of the shipped student draws."""
    grid = tmp_path / "grid.png"
    run = ROOT / "assets/mini-student"
    sb.main(["sample", "--run", str(run), "--num", "2", "--device", "cpu", "--grid", str(grid), *more])
    return Image.open(grid).copy()


def test_sample_with_supplements(tmp_path):
    """Another size; another picture with a negative prompt, the same one with the scale 0; strips too."""
    plain = sample(tmp_path)
    assert sample(tmp_path, "--size", "64", "96").size == (2 + 2 * 98, 2 + 66)
    assert sample(tmp_path, "--size", "64", "64", "--slerp", "noise").size == (2 + 2 * 66, 2 + 66)
    same = sample(tmp_path, "--negative", "red", "--negative-scale", "0")
    assert same.tobytes() == plain.tobytes() != sample(tmp_path, "--negative", "red").tobytes()


@pytest.mark.parametrize("more, message", [
    (["--size", "60", "64"], "--size 60 64: must be two multiples of 8; the model's own is 32 32"),
    (["--size", "0", "64"], "--size 0 64: must be two multiples of 8"),
    (["--size", "64"], "--size: expected 2"),
    (["--size", "64", "8000000000000000000"], "--size 8000000000000000000: must be at most 16384"),
    (["--negative", "a \udcff"], r"--negative 'a \\udcff': "),
    (["--negative", "red", "--negative-scale", "-1"], "--negative-scale -1.0: must be at least 0")])
def test_wrong_flags_of_supplements(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        sample(tmp_path, *more)


def test_models_that_cannot(loaded, tmp_path):
    """A transformer has no convolutions to re-dilate, a pixel-space model takes no text."""
    tiny.pixel(tmp_path)
    with pytest.raises(UserError, match="--size: PixArtAlphaPipeline has no conv"), resized(
            *loaded["pixart"], (64, 64)):
        pass
    with pytest.raises(UserError, match="--negative: the model takes no text"), steered(
            *load(tmp_path), "red", 1):
        pass
