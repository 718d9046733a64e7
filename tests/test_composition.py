"""Divide-and-Bind: its losses in closed form, the recorded maps, the optimised noise, and the reader."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
import try_supplements

import swiftbrush_v2
from common import Denoiser, NoiseSchedule, UserError, chunks_of, draw_samples, load, one_step
from plumbing.data import to_floats
from plumbing.shapes import BACKGROUNDS, SHAPES, TwoShapes
from supplements import composition

PROMPT = "a red circle and a blue square on white"


@pytest.fixture(scope="module")
def student():
    """A tiny random student and its codec."""
    torch.manual_seed(0)
    pipe = tiny.sd("v_prediction")
    return Denoiser(pipe.unet.requires_grad_(False), NoiseSchedule.from_config(pipe.scheduler.config),
                    "v_prediction")


@pytest.fixture(scope="module")
def mini():
    """The one-step student of assets/ and its codec."""
    return load("assets/mini-student")


# Losses

def test_total_variation():
    """Flat: 0. A peak of height h inside n x n: two steps of h across and two down. A slope is its step."""
    assert composition.total_variation(torch.full((3, 5, 5), 0.7)).eq(0).all()
    peak = torch.zeros(6, 6)
    peak[2, 3] = 0.5
    assert composition.total_variation(peak).item() == pytest.approx(4 * 0.5 / (6 * 5))
    down = torch.arange(6.0)[:, None].expand(6, 6)
    assert composition.total_variation(torch.stack([down, 3 * down.T])).tolist() == [1, 3]


def test_attendance_is_the_least_attended_objects():
    images = torch.zeros(4, 6, 6)
    images[1, 2, 2], images[3, 2, 2] = 1.0, 0.5
    assert composition.attendance_loss(images, [1, 3]).item() == pytest.approx(-4 * 0.5 / 30)
    assert composition.attendance_loss(images, [1, 2, 3]) == 0
    assert composition.attendance_loss(images, [1]).item() == pytest.approx(-4 / 30)


def test_jensen_shannon():
    """0 for equals, ln 2 for the disjoint, and the definition by KL divergences between."""
    p, q = (torch.softmax(torch.randn(3, 16), -1) for _ in range(2))
    assert composition.jensen_shannon(p, p).abs().max() < 1e-6
    one, other = torch.eye(4)[:2]
    assert composition.jensen_shannon(one, other).item() == pytest.approx(math.log(2))
    m = (p + q) / 2
    by_definition = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    torch.testing.assert_close(composition.jensen_shannon(p, q), by_definition)


def test_binding_is_the_mean_over_the_pairs():
    """A peak of height h among n places: p = e^h / (e^h + n - 1) on it, q = 1 / (e^h + n - 1) elsewhere."""
    images, h = torch.zeros(4, 4, 4), 0.4
    images[0, 1, 1] = images[1, 1, 1] = images[2, 0, 0] = images[3, 3, 3] = h
    q = 1 / (math.exp(h) + 15)
    p, m = math.exp(h) * q, (math.exp(h) + 1) * q / 2
    apart = p * math.log(p / m) + q * math.log(q / m)  # at either peak, for the two divergences to the mean
    assert composition.binding_loss(images, [1], [0]).abs() < 1e-6
    loss = composition.binding_loss(images.double(), [3], [2])
    assert loss.item() == pytest.approx(apart, rel=1e-6)
    assert composition.binding_loss(images.double(), [1, 3], [0, 2]).item() == pytest.approx(apart / 2)
    assert composition.binding_loss(images.double(), [1, 3], [None, 2]).item() == pytest.approx(apart)
    assert composition.binding_loss(images, [1], [None]) == 0


def test_smoothed_maps():
    """Words compete for a place, the first and last token do not; a lone place spreads as the kernel says."""
    maps = torch.zeros(1, 16, 5)
    maps[0, :, 0] = maps[0, :, 4] = 1.0  # however strong
    maps[0, 5, 2] = 0.02
    images = composition.smoothed_maps(maps)
    assert images.shape == (1, 5, 4, 4)
    torch.testing.assert_close(images.sum(1), torch.ones(1, 4, 4))
    assert images[0, [0, 4]].eq(0).all()
    assert images[0, 2, 3, 3].item() == pytest.approx(1 / 3)
    edge = math.exp(-2)  # of a Gaussian with sigma 1/2 at distance 1
    height = math.exp(2) / (math.exp(2) + 2) - 1 / 3  # 100 x 0.02 in the softmax
    for place, share in (((1, 1), 1), ((1, 2), edge), ((2, 2), edge**2)):
        risen = images[0, 2][place].item() - 1 / 3
        assert risen == pytest.approx(height * share / (1 + 2 * edge)**2, rel=1e-4)


# Attention maps

def test_recorded_maps_are_those_of_the_call(student):
    """Outputs do not change to the bit; the maps are softmax(q k / sqrt d), averaged over the heads."""
    z, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    cond, net = dict(encoder_hidden_states=text), student.net
    layer = net.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    seen, before = [], {name: m.processor for name, m in net.named_modules() if hasattr(m, "processor")}
    hook = layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True)
    plain = one_step(student, z, cond)
    hook.remove()
    with composition.recorded_maps(net) as maps:
        assert torch.equal(one_step(student, z, cond), plain)
    q = layer.to_q(seen[0]).unflatten(-1, (layer.heads, -1))
    k = layer.to_k(text).unflatten(-1, (layer.heads, -1))
    expected = torch.softmax(torch.einsum("bphd,bthd->bhpt", q, k) / q.shape[-1]**0.5, -1).mean(1)
    torch.testing.assert_close(maps[0], expected)
    assert {tuple(m.shape[::2]) for m in maps} == {(2, 16)} and len(maps) == 4
    assert before == {name: m.processor for name, m in net.named_modules() if hasattr(m, "processor")}


def test_processors_are_restored_after_an_error(student):
    before = dict(student.net.attn_processors)
    with pytest.raises(ZeroDivisionError), composition.recorded_maps(student.net):
        assert student.net.attn_processors != before
        raise ZeroDivisionError
    assert all(student.net.attn_processors[name] is processor for name, processor in before.items())


def test_the_layers_nearest_to_16_places_a_side_are_averaged():
    one, other = torch.rand(2, 64, 5), torch.rand(2, 64, 5)
    assert torch.equal(composition.mean_map([torch.rand(2, 16, 5), one, other]), (one + other) / 2)
    of_sd = [torch.rand(1, side**2, 3) for side in (64, 32, 16, 8)]
    assert torch.equal(composition.mean_map(of_sd), of_sd[2])


# Sampling

@pytest.mark.parametrize("prompt, words, objects, attributes", [
    (PROMPT, ["circle", "square"], [3, 9], [2, 8]), (PROMPT, SHAPES, [3, 9], [2, 8]),
    ("a circle and a blue square", ["circle", "square"], [2, 8], [None, 7]),
    ("square", ["square"], [1], [None]), ("Red CIRCLE", ["Circle"], [2], [1]),
    ("a red frog", ["frog"], [6], [2])])  # a word of several tokens counts by its last
def test_tokens(prompt, words, objects, attributes, mini):
    tokenizer = mini[1].pipe.tokenizer
    assert composition.tokens_of(tokenizer, prompt, words) == (objects, attributes)
    names = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    for word, token in zip([w for w in prompt.lower().split() if w in map(str.lower, words)], objects):
        assert word.endswith(names[token].removesuffix("</w>"))


@pytest.mark.parametrize("prompt", ["a red triangle", "a small red " * 6 + "circle"])
def test_an_object_that_is_not_read_is_named(prompt, mini):
    with pytest.raises(UserError, match="--compose circle: .*no such word"):
        composition.tokens_of(mini[1].pipe.tokenizer, prompt, ["circle"])


def loss_of(student, z, cond, tokens):
    """L_attend + L_bind of the first sample."""
    with composition.recorded_maps(student.net) as maps:
        one_step(student, z, cond)
    image = composition.smoothed_maps(composition.mean_map(maps))[0]
    return composition.attendance_loss(image, tokens[0][0]) + composition.binding_loss(image, *tokens[0])


def test_an_update_is_gradient_descent_on_both_losses():
    """One update is scale times the gradient, which numbers confirm; many lower the loss."""
    student, codec = load("assets/mini-student")
    (y, z), = chunks_of([PROMPT], codec, 0)
    cond, tokens = {name: value.double() for name, value in codec.cond(y).items()}, [([3, 9], [2, 8])]
    student.net.double()
    z = z.double()
    update = (z - composition.optimised_noise(student, z, cond, tokens, 1, 20.0)) / 20
    direction, step = update / update.norm(), 1e-5
    rise = [loss_of(student, z + sign * step * direction, cond, tokens).item() for sign in (1, -1)]
    assert (rise[0] - rise[1]) / (2 * step) == pytest.approx(update.norm().item(), rel=1e-5)
    twice = composition.optimised_noise(student, z, cond, tokens, 2, 20.0)
    again = composition.optimised_noise(student, z - 20 * update, cond, tokens, 1, 20.0)
    torch.testing.assert_close(twice, again)
    after = composition.optimised_noise(student, z, cond, tokens, 5, 2.0)
    assert loss_of(student, after, cond, tokens) < loss_of(student, z, cond, tokens)
    assert not after.requires_grad and all(p.grad is None for p in student.net.parameters())


def test_a_sample_does_not_depend_on_its_batch(mini):
    student, codec = mini
    prompts = [PROMPT, "a circle and a green triangle on black"]
    together = composition.draw_composed(student, codec, prompts, 0, SHAPES, 2, 20.0)
    (y, z), = chunks_of(prompts, codec, 0)
    tokens = [composition.tokens_of(codec.pipe.tokenizer, y[1], SHAPES)]
    alone = composition.optimised_noise(student, z[1:], codec.cond(y[1:]), tokens, 2, 20.0)
    picture = codec.decode(one_step(student, alone, codec.cond(y[1:]))).clamp(-1, 1)
    torch.testing.assert_close(together[1:], picture, atol=2e-3, rtol=0)
    unchanged = composition.draw_composed(student, codec, prompts, 0, SHAPES, 0, 20.0)
    torch.testing.assert_close(unchanged, draw_samples(student, codec, prompts, 0))


def test_the_command(tmp_path, monkeypatch, mini):
    """--compose reaches draw_composed with its flags, and what it draws is written."""
    asked = []

    def drawn(student, codec, *more):
        asked.append(more)
        return torch.zeros(2, 3, 32, 32)

    monkeypatch.setattr(swiftbrush_v2, "draw_composed", drawn)
    flags = ["sample", "--run", "assets/mini-student", "--prompts", PROMPT, "--num", "2", "--seed", "3",
             "--device", "cpu", "--compose", "circle", "square", "--grid", f"{tmp_path}/grid.png"]
    swiftbrush_v2.main(flags)
    swiftbrush_v2.main([*flags, "--compose-steps", "4", "--compose-scale", "0.5"])
    first = [PROMPT] * 2, 3, ["circle", "square"]
    assert asked == [(*first, 5, 200.0), (*first, 4, 0.5)] and (tmp_path / "grid.png").exists()
    for more in (["--slerp", "noise"], ["--size", "64", "64"], ["--negative", "red"]):
        with pytest.raises(UserError, match="--compose: works alone; leave out"):
            swiftbrush_v2.main([*flags, *more])
    for name in ("--compose-steps", "--compose-scale"):
        with pytest.raises(UserError, match=f"{name} -1.*: must be at least 0"):
            swiftbrush_v2.main([*flags, name, "-1"])


def test_other_networks_are_refused(tmp_path):
    tiny.pixel(tmp_path / "pixel")
    with pytest.raises(UserError, match="--compose: not for a DDPMPipeline; give a Stable Diffusion"):
        composition.draw_composed(*load(tmp_path / "pixel"), ["cat"], 0, ["cat"], 1, 20.0)


# The reader

def test_the_reader_of_two_shapes():
    """Every real drawing is right; with colours or kinds exchanged, or another kind asked, none is."""
    dataset = TwoShapes(32, seed=5)
    a = dataset.attributes(range(1000))
    pictures = dataset.draw(a)
    assert try_supplements.both_shapes(pictures, a).all()
    third = 3 - a["shape"].sum(1, keepdim=True).expand(-1, 2)
    for wrong in (dict(colour=a["colour"].flip(1)), dict(shape=a["shape"].flip(1)), dict(shape=third)):
        assert not try_supplements.both_shapes(pictures, a | wrong).any()
    one = dataset.draw(a | dict(colour=a["colour"][:, :1].expand(-1, 2)))
    assert not try_supplements.both_shapes(one, a)[:, 1].any(), "the second in the first's colour"
    noisy = (pictures + 20 * torch.randn(pictures.shape)).clamp(0, 255).byte()
    assert try_supplements.both_shapes(noisy, a).all(1).float().mean() > 0.9
    for factor in (0.5, 1.7):  # the second shape in the middle, over the first
        sized = dict(radius=a["radius"] * factor, x=torch.full((1000, 2), 0.5), y=torch.full((1000, 2), 0.5))
        assert not try_supplements.both_shapes(dataset.draw(a | sized), a)[:, 1].any()
    behind = torch.tensor(list(BACKGROUNDS.values()))[a["background"]][:, :, None, None] * 255
    torn = torch.where(torch.rand(1000, 1, 32, 32) < 0.5, pictures, behind.byte())
    assert not try_supplements.both_shapes(torn, a).any()
    blank = torch.full((1000, 3, 32, 32), 255, dtype=torch.uint8)
    assert not try_supplements.both_shapes(blank, a).any()


def test_a_picture_is_right_with_both_shapes(mini, monkeypatch):
    """And half right with one, whatever the rows are."""
    dataset = TwoShapes(32, try_supplements.PROMPT_SEED)
    a = dataset.attributes(range(40))
    half = dataset.draw(a | dict(shape=torch.stack([a["shape"][:, 0], 3 - a["shape"].sum(1)], 1)))
    rows = {name: to_floats(pictures) for name, pictures in (("right", dataset.draw(a)), ("half", half))}
    monkeypatch.setattr(try_supplements, "drawn_composed", lambda *args: rows)
    assert try_supplements.shares_of_composition(*mini, 40, 0) == dict(right=[1, 1], half=[0, 0.5])


def test_the_measurement(capsys, monkeypatch, mini, tmp_path):
    """Rows in order; the last has noise that is as far from the first's as ten updates', and elsewhere."""
    seen = []
    monkeypatch.setattr(try_supplements, "one_step", lambda *args: seen.append(args[1]) or one_step(*args))
    rows = try_supplements.drawn_composed(*mini, [PROMPT] * 2, 5)
    assert list(rows) == ["0 updates", "5 updates", "10 updates", "30 updates", "10, at random"]
    none, _, ten, _, elsewhere = seen
    torch.testing.assert_close((elsewhere - none).flatten(1).norm(dim=1), (ten - none).flatten(1).norm(dim=1))
    assert F.cosine_similarity((elsewhere - none).flatten(), (ten - none).flatten(), dim=0).abs() < 0.5
    torch.testing.assert_close(rows["0 updates"], draw_samples(*mini, [PROMPT] * 2, 5))
    try_supplements.main(["composition", "--num", "2", "--seeds", "4", "--grid", f"{tmp_path}/grid.png",
                          "--student", "assets/mini-student"])
    table = capsys.readouterr().out.splitlines()
    assert table[:2] == ["| composition | both shapes | a shape |", "|---|---|---|"] and len(table) == 7
    assert (tmp_path / "grid.png").exists()
