"""The mathematics of common.py: noise schedules, conversions, guidance, one-step pictures, random draws, the
informative prior, averages, distances, conditions.
"""

import math
import weakref
from contextlib import nullcontext

import lpips
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import EMAModel
from helpers import PIXART, SD, equal, random_vgg

import common
from common import EMA, Denoiser, Draws, InformativePrior, NoiseSchedule
from plumbing.checkpoint import flat_state

TYPES = ("sample", "epsilon", "v_prediction")


# Noise schedule

@pytest.mark.parametrize("more", [{}, dict(rescale_betas_zero_snr=True)], ids=["plain", "zero SNR"])
@pytest.mark.parametrize("config", [SD, PIXART], ids=["sd", "pixart"])
def test_schedule_equals_diffusers(config, more):
    ours, theirs = NoiseSchedule.from_config(config | more), DDIMScheduler.from_config(config | more)
    x0, eps, t = torch.randn(1000, 3, 2, 2), torch.randn(1000, 3, 2, 2), torch.arange(1000)
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.alpha**2 + ours.sigma**2, torch.ones(1000), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config, alpha_T, snr_T", [
    (SD, 0.0682649, 0.00468192), (PIXART, 0.00635282, 4.036e-5)], ids=["sd", "pixart"])
def test_terminal_values(config, alpha_T, snr_T):
    schedule = NoiseSchedule.from_config(config)
    assert schedule.alpha[-1].item() == pytest.approx(alpha_T, rel=1e-4)
    assert schedule.snr(torch.tensor([999])).item() == pytest.approx(snr_T, rel=1e-3)


@pytest.mark.parametrize("config", [SD, PIXART], ids=["sd", "pixart"])
def test_zero_terminal_snr_equals_diffusers(config):
    ours = NoiseSchedule.from_config(config).zero_terminal_snr()
    theirs = DDPMScheduler.from_config(config | dict(rescale_betas_zero_snr=True)).alphas_cumprod
    torch.testing.assert_close(ours.alpha, theirs.sqrt(), atol=1e-6, rtol=0)
    assert ours.alpha[-1] == 0 and ours.sigma[-1] == 1
    assert (ours.alpha <= NoiseSchedule.from_config(config).alpha + 1e-7).all()


def test_ratio_of_signal_to_noise_at_the_ends():
    """Infinite without noise, 0 without signal."""
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5, 0.0]))
    assert schedule.snr(torch.arange(3)).tolist() == [math.inf, pytest.approx(1.0), 0.0]


def test_a_schedule_up_to_a_timestep():
    schedule = NoiseSchedule.from_config(SD)
    short = schedule.up_to(499)
    assert len(short) == 500 and len(schedule) == 1000
    torch.testing.assert_close(short.alpha, schedule.alpha[:500], atol=1e-7, rtol=0)
    torch.testing.assert_close(short.sigma, schedule.sigma[:500], atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [SD, PIXART], ids=["sd", "pixart"])
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_conversions_round_trip_at_every_timestep(config, source, target):
    """There and back in float32; the error may grow by sigma / alpha or alpha / sigma, and no more."""
    schedule, t = NoiseSchedule.from_config(config), torch.arange(1000)
    x0, eps = torch.randn(1000, 4, 2, 2), torch.randn(1000, 4, 2, 2)
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = schedule.alpha.view(-1, 1, 1, 1), schedule.sigma.view(-1, 1, 1, 1)
    truth = dict(sample=x0, epsilon=eps, v_prediction=alpha * eps - sigma * x0)
    condition = torch.maximum(sigma / alpha, alpha / sigma).clamp(min=1)
    there = schedule.convert(truth[source], x_t, t, source, target)
    assert ((there - truth[target]).abs() / condition).max() < 2e-6
    back = schedule.convert(there, x_t, t, target, source)
    assert ((back - truth[source]).abs() / condition).max() < 2e-6


@pytest.mark.parametrize("types", [("flow", "sample"), ("sample", "flow")])
def test_unknown_prediction_type(types):
    schedule, zero = NoiseSchedule.from_config(SD), torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="unknown prediction type flow"):
        schedule.convert(zero, zero, torch.tensor([0]), *types)


# Denoiser

class Recorder(torch.nn.Module):
    """A network that predicts scale * x_t, in twice the channels, and notes its timesteps."""

    def __init__(self):
        super().__init__()
        self.timesteps = []

    def forward(self, x, timestep, scale):
        self.timesteps.append(timestep)
        return type("Output", (), dict(sample=torch.cat([scale * x, x], 1)))


def test_denoiser_guidance_and_learned_sigma():
    network, schedule = Recorder(), NoiseSchedule.from_config(SD)
    denoiser, x_t, t = Denoiser(network, schedule, "epsilon"), torch.randn(2, 4, 3, 3), torch.tensor([5, 900])
    guided = denoiser.predict(x_t, t, "epsilon", dict(scale=3.0), dict(scale=1.0), guidance_scale=4.5)
    torch.testing.assert_close(guided, (1 + 4.5 * 2) * x_t)
    assert len(network.timesteps) == 2
    plain = denoiser.predict(x_t, t, "sample", dict(scale=3.0), dict(scale=1.0))
    assert len(network.timesteps) == 3, "guidance_scale 1 must not call the network for the null condition"
    torch.testing.assert_close(plain, schedule.convert(3 * x_t, x_t, t, "epsilon", "sample"))
    scales = torch.tensor([1.0, 2.0]).view(-1, 1, 1, 1)
    guided = denoiser.predict(x_t, t, "epsilon", dict(scale=3.0), dict(scale=1.0), scales)
    torch.testing.assert_close(guided, (1 + scales * 2) * x_t)


def test_one_step_starts_at_the_schedules_last_timestep():
    z = torch.randn(2, 4, 3, 3)
    for schedule in (NoiseSchedule.from_config(SD), NoiseSchedule.from_config(SD).up_to(499)):
        network, last = Recorder(), len(schedule) - 1
        x0 = common.one_step(Denoiser(network, schedule, "v_prediction"), z, dict(scale=2.0))
        assert network.timesteps[0].tolist() == [last, last]
        expected = schedule.alpha[last] * z - schedule.sigma[last] * 2 * z
        torch.testing.assert_close(x0, expected, atol=1e-6, rtol=1e-6)
        sampled = common.ddim_sample(Denoiser(network, schedule, "v_prediction"), z, 1, dict(scale=2.0))
        assert torch.equal(sampled, x0)


def test_a_frozen_network_passes_gradients_on():
    """Nothing for its parameters, all for its input; afterwards, even after an error, it is as before."""
    network, x = torch.nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    network.bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), common.frozen(network):
        network(x).sum().backward()
        raise ZeroDivisionError
    torch.testing.assert_close(x.grad, network.weight.sum(0).expand(2, 3))
    assert network.weight.grad is None
    assert network.weight.requires_grad and not network.bias.requires_grad


# Random draws

def test_draws_depend_on_seed_and_iteration_alone():
    """Each rank's rows are those of the whole batch; another iteration or seed draws other numbers."""
    def numbers(seed, iteration, rows):
        draw = Draws(seed, iteration, 8, rows, "cpu")
        return draw.randn(2), draw.randint(1, 1000), draw.rand()

    whole = numbers(3, 5, slice(None))
    for i in range(2):
        rows = slice(4 * i, 4 * i + 4)
        assert all(torch.equal(part, value[rows]) for part, value in zip(numbers(3, 5, rows), whole))
    for other in (numbers(3, 6, slice(None)), numbers(4, 5, slice(None))):
        assert all(not torch.equal(a, b) for a, b in zip(other, whole))


def test_informative_prior_has_the_moments_of_x_T():
    schedule = NoiseSchedule.from_config(SD)
    x0 = 2 + torch.randn(4000, 2, 1, 1) * torch.tensor([0.5, 3.0]).view(1, 2, 1, 1)
    prior = InformativePrior.of(x0)
    torch.testing.assert_close(prior.std.flatten(), torch.tensor([0.5, 3.0]), rtol=0.05, atol=0)
    x_T = prior.start(schedule, torch.randn(200_000, 2, 1, 1), torch.randn(200_000, 2, 1, 1))
    mean = schedule.alpha[-1] * prior.mean.flatten()
    torch.testing.assert_close(x_T.mean((0, 2, 3)), mean, atol=0.01, rtol=0)
    variance = schedule.alpha[-1]**2 * prior.std.flatten()**2 + schedule.sigma[-1]**2
    torch.testing.assert_close(x_T.var((0, 2, 3)), variance, rtol=0.01, atol=0)


def test_the_prior_of_data_with_places():
    """The mean has every place of its own, the deviation around it one value a channel."""
    x0 = torch.randn(50, 3, 2, 4)
    prior = InformativePrior.of(x0)
    torch.testing.assert_close(prior.mean, x0.mean(0))
    expected = [x0[:, c].var(0, correction=0).mean().sqrt().item() for c in range(3)]
    assert prior.std.shape == (3, 1, 1) and prior.std.flatten().tolist() == pytest.approx(expected)


# Learning rates

def test_rates_rise_linearly_to_what_they_are():
    """For lr_warmup iterations, also where an optimiser's state comes from another iteration."""
    assert [common.warmup_share(i, 4) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert common.warmup_share(0, 0) == common.warmup_share(0, 1) == 1.0
    one, two = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr) for lr in (0.4, 3.0))
    common.set_rates(0.5, one, two)
    one.load_state_dict(one.state_dict())
    common.set_rates(0.25, one)
    assert [o.param_groups[0]["lr"] for o in (one, two)] == [0.1, 1.5]


# EMA

def test_ema_is_the_geometric_average():
    module = torch.nn.Linear(1, 1, bias=False)
    module.bias = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    values = [1.0, 2.0, -3.0]
    module.weight.data.fill_(values[0])
    ema = EMA(module.named_parameters(), 0.9)
    for n, value in enumerate(values[1:]):
        module.weight.data.fill_(value)
        ema.update(n)
    expected = 0.81 * 1 + 0.09 * 2 + 0.1 * -3
    assert list(ema.average) == ["weight"], "frozen parameters are not copied"
    assert ema.average["weight"].item() == pytest.approx(expected)
    with ema.applied():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == -3


def test_the_ramped_average_is_that_of_diffusers():
    """Update for update, on both sides of the ramp's end, here at n = 80; and none of the start is left."""
    module = torch.nn.Linear(3, 2)
    ours, theirs = EMA(module.named_parameters(), 0.9, ramp=True), EMAModel(module.parameters(), 0.9)
    decays = []
    for n in range(100):
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p))
        ours.update(n)
        theirs.step(module.parameters())
        decays.append(theirs.cur_decay_value)
        assert ours.decay_of(n) == decays[-1]
        if n == 0:
            assert equal(ours.average, dict(module.named_parameters()))
        for average, expected in zip(ours.average.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(average, expected, atol=1e-6, rtol=1e-6)
    assert decays[79] < decays[80] == decays[-1] == 0.9


def test_weights_and_averages_change_places_one_by_one(monkeypatch):
    """At most one tensor is copied at a time, none stays; also an error gives back both to the bit."""
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    ema = EMA(module.named_parameters(), 0.9)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
        module[0].bias.copy_(torch.tensor([-0.0, 1e-45, torch.inf, torch.nan]))
    bits = lambda tensors: {name: t.detach().clone().view(torch.int32) for name, t in tensors.items()}
    weights, averages = bits(dict(module.named_parameters())), bits(ema.average)
    clone, copies, most = torch.Tensor.clone, [], []

    def noted(tensor):
        copy = clone(tensor)
        copies.append(weakref.ref(copy))
        most.append(sum(alive() is not None for alive in copies))
        return copy

    for error in (None, KeyError):
        with monkeypatch.context() as patched, pytest.raises(error) if error else nullcontext():
            patched.setattr(torch.Tensor, "clone", noted)
            with ema.applied():
                patched.undo()
                assert len(most) == 6 and max(most) == 1 and not any(alive() is not None for alive in copies)
                assert equal(bits(dict(module.named_parameters())), averages)
                if error:
                    raise error
        assert equal(bits(dict(module.named_parameters())), weights) and equal(bits(ema.average), averages)
        copies.clear(), most.clear()


@pytest.mark.parametrize("use", [lambda ema: ema.update(0), lambda ema: flat_state(dict(ema=ema)),
                                 lambda ema: ema.load_state_dict({}), lambda ema: ema.applied().__enter__()],
                         ids=["update", "save", "load", "applied"])
def test_averages_in_place_of_the_weights_are_not_asked_for(use):
    """What stands in their own place are the weights, and the EMA gives no wrong answer."""
    module = torch.nn.Linear(2, 2)
    ema = EMA(module.named_parameters(), 0.9)
    with ema.applied(), pytest.raises((AttributeError, TypeError), match="NoneType"):
        use(ema)
    assert list(ema.state_dict()) == ["weight", "bias"]


def test_an_average_that_finds_no_memory_changes_nothing(monkeypatch):
    """In the middle of the exchange."""
    module = torch.nn.Linear(2, 2)
    ema = EMA(module.named_parameters(), 0.9)
    with torch.no_grad():
        module.weight.fill_(3)
    states = [{name: t.clone() for name, t in s.items()} for s in (module.state_dict(), ema.state_dict())]
    clone = torch.Tensor.clone
    scarce = lambda tensor: pytest.fail("no memory") if tensor is module.bias else clone(tensor)
    with monkeypatch.context() as patched, pytest.raises(pytest.fail.Exception):
        patched.setattr(torch.Tensor, "clone", scarce)
        with ema.applied():
            pass
    assert equal([module.state_dict(), ema.state_dict()], states)


# Distances

@pytest.fixture(scope="module")
def lpips_pair():
    """LPIPS itself and load_distance's two halves of it, of the same random weights."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patched:
        random_vgg(patched)
        return lpips.LPIPS(net="vgg", verbose=False), *common.load_distance("lpips", "cpu")


def test_squared_distance_is_a_mean_of_each_pair():
    a, b = torch.randn(2, 3, 2, 4, 5)
    for features, distance in ((lambda x: x, common.squared_distance), common.load_distance("l2", "cpu")):
        expected = [((x - y)**2).sum() / 40 for x, y in zip(a, b)]
        torch.testing.assert_close(distance(features(a), features(b)), torch.stack(expected))


def test_the_halves_of_lpips_are_its_own_forward(lpips_pair):
    """Of small pictures the enlarged ones are compared, of large ones they themselves."""
    theirs, features, distance = lpips_pair
    small, large = torch.rand(2, 1, 3, 32, 32) * 2 - 1, torch.rand(2, 2, 3, 16, 256) * 2 - 1
    enlarged = F.interpolate(small.flatten(0, 1), size=224, mode="bilinear").unflatten(0, (2, 1))
    for (a, b), pair in ((small, enlarged), (large, large)):
        with torch.no_grad():
            expected, found = theirs(*pair).flatten(), distance(features(a), features(b))
        assert found.shape == (len(a),) and (expected > 1e-3).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_lpips_has_a_gradient_and_vanishes_for_equal_pictures(lpips_pair):
    theirs, features, distance = lpips_pair
    a, b = torch.rand(1, 3, 16, 256).requires_grad_(), torch.rand(1, 3, 16, 256)
    of_a = features(a)
    with torch.no_grad():
        of_b = features(b)
    assert distance(of_a, of_a).item() == 0 and distance(of_a, of_b).item() > 1e-3
    gradient, = torch.autograd.grad(distance(of_a, of_b).sum(), a)
    expected, = torch.autograd.grad(theirs(a, b).sum(), a)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())


# Conditions

def test_conditions_are_mapped_and_cut_place_by_place():
    a = dict(text=torch.randn(4, 3), added=dict(size=torch.arange(4), none=None))
    b = dict(text=torch.randn(4, 3), added=dict(size=torch.arange(4, 8), none=None))
    mapped = common.map_cond(lambda x, y: torch.cat([x, y]), a, b)
    assert torch.equal(mapped["text"], torch.cat([a["text"], b["text"]])) and mapped["added"]["none"] is None
    assert mapped["added"]["size"].tolist() == list(range(8))
    part = common.part_of(a, slice(1, 3))
    assert torch.equal(part["text"], a["text"][1:3])
    assert part["added"]["size"].tolist() == [1, 2] and part["added"]["none"] is None
    assert common.part_of(["x", "y", "z"], slice(1, 3)) == ["y", "z"]
    assert common.part_of(7.5, slice(1, 3)) == 7.5 and common.part_of(None, slice(1, 3)) is None


def test_a_prompt_names_the_longest_class():
    classes = ["cat", "dog", "hot dog"]
    assert common.class_labels(["a Hot Dog on white", "a dog", "the cat"], classes).tolist() == [2, 1, 0]
    with pytest.raises(common.UserError, match="names no class"):
        common.class_labels(["catalogue"], classes)
