"""Noise schedules against diffusers' own, conversions, guidance, informative prior, EMA."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler

from common import EMA, Denoiser, InformativePrior, NoiseSchedule, ddgan_betas

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
PIXART = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
TYPES = ("sample", "epsilon", "v_prediction")


@pytest.mark.parametrize("config", [SD, PIXART, SD | dict(rescale_betas_zero_snr=True), PIXART | dict(rescale_betas_zero_snr=True)])
def test_schedule_equals_diffusers(config):
    ours, theirs = NoiseSchedule.from_config(config), DDIMScheduler.from_config(config)
    x0, eps, t = torch.randn(1000, 3, 2, 2), torch.randn(1000, 3, 2, 2), torch.arange(1000)
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.alpha**2 + ours.sigma**2, torch.ones(1000), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config, alpha_T, snr_T", [(SD, 0.0682649, 0.00468192), (PIXART, 0.00635282, 4.036e-5)])
def test_terminal_values(config, alpha_T, snr_T):
    schedule = NoiseSchedule.from_config(config)
    assert schedule.alpha[-1].item() == pytest.approx(alpha_T, rel=1e-4)
    assert schedule.snr(torch.tensor([999])).item() == pytest.approx(snr_T, rel=1e-3)


@pytest.mark.parametrize("config", [SD, PIXART])
def test_zero_terminal_snr_equals_diffusers(config):
    ours = NoiseSchedule.from_config(config).zero_terminal_snr()
    theirs = DDPMScheduler.from_config(config | dict(rescale_betas_zero_snr=True)).alphas_cumprod
    torch.testing.assert_close(ours.alpha, theirs.sqrt(), atol=1e-6, rtol=0)
    assert ours.alpha[-1] == 0 and ours.sigma[-1] == 1
    assert (ours.alpha <= NoiseSchedule.from_config(config).alpha + 1e-7).all()


def test_ddgan_levels():
    schedule = NoiseSchedule.from_config(dict(num_train_timesteps=5, trained_betas=ddgan_betas(4)))
    expected = torch.tensor([1, 0.722319, 0.280492, 0.0585566, 0.00657195])
    torch.testing.assert_close(schedule.alpha, expected, atol=1e-6, rtol=1e-5)
    assert schedule.sigma[0] < 1e-3


@pytest.mark.parametrize("config", [SD, PIXART])
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_conversions_round_trip_at_every_timestep(config, source, target):
    """There and back in float32; the error may grow by the conditioning sigma/alpha or alpha/sigma, and no more."""
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


def test_score_is_the_gradient_of_the_log_density():
    """Data N(0.3, 1): the exact eps-prediction is (x_t - alpha m) sigma, the score -(x_t - alpha m)."""
    schedule, t = NoiseSchedule.from_config(SD), torch.tensor([10, 500, 999])
    x_t = torch.randn(3, 1, 4, 4, requires_grad=True)
    centred = x_t - schedule.alpha[t].view(-1, 1, 1, 1) * 0.3
    score, = torch.autograd.grad(-centred.square().sum() / 2, x_t)
    eps = centred * schedule.sigma[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(schedule.convert(eps, x_t, t, "epsilon", "score"), score)


def test_unknown_prediction_type():
    schedule = NoiseSchedule.from_config(SD)
    with pytest.raises(ValueError, match="flow"):
        schedule.convert(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([0]), "flow", "sample")


class Recorder(torch.nn.Module):
    """A network that predicts condition * x_t, in twice the channels, and counts its calls."""

    calls = 0

    def forward(self, x, timestep, scale):
        self.calls += 1
        return type("Output", (), dict(sample=torch.cat([scale * x, x], 1)))


def test_denoiser_guidance_and_learned_sigma():
    network, schedule = Recorder(), NoiseSchedule.from_config(SD)
    denoiser, x_t, t = Denoiser(network, schedule, "epsilon"), torch.randn(2, 4, 3, 3), torch.tensor([5, 900])
    guided = denoiser.predict(x_t, t, "epsilon", dict(scale=3.0), dict(scale=1.0), guidance_scale=4.5)
    torch.testing.assert_close(guided, (1 + 4.5 * 2) * x_t)
    assert network.calls == 2
    plain = denoiser.predict(x_t, t, "sample", dict(scale=3.0), dict(scale=1.0))
    assert network.calls == 3, "guidance_scale 1 must not call the network for the null condition"
    torch.testing.assert_close(plain, schedule.convert(3 * x_t, x_t, t, "epsilon", "sample"))


def test_informative_prior_has_the_moments_of_x_T():
    schedule = NoiseSchedule.from_config(SD)
    x0 = 2 + torch.randn(4000, 2, 1, 1) * torch.tensor([0.5, 3.0]).view(1, 2, 1, 1)
    prior = InformativePrior.of(x0)
    torch.testing.assert_close(prior.std.flatten(), torch.tensor([0.5, 3.0]), rtol=0.05, atol=0)
    x_T = prior.start(schedule, torch.randn(200_000, 2, 1, 1), torch.randn(200_000, 2, 1, 1))
    torch.testing.assert_close(x_T.mean((0, 2, 3)), schedule.alpha[-1] * prior.mean.flatten(), atol=0.01, rtol=0)
    variance = schedule.alpha[-1]**2 * prior.std.flatten()**2 + schedule.sigma[-1]**2
    torch.testing.assert_close(x_T.var((0, 2, 3)), variance, rtol=0.01, atol=0)


def test_ema_is_the_geometric_average():
    module = torch.nn.Linear(1, 1, bias=False)
    module.bias = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    values = [1.0, 2.0, -3.0]
    module.weight.data.fill_(values[0])
    ema = EMA(module.named_parameters(), 0.9)
    for value in values[1:]:
        module.weight.data.fill_(value)
        ema.update()
    expected = 0.81 * 1 + 0.09 * 2 + 0.1 * -3
    assert list(ema.average) == ["weight"], "frozen parameters are not copied"
    assert ema.average["weight"].item() == pytest.approx(expected)
    with ema.applied():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == -3


@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_exported_scheduler_visits_our_levels(nfe):
    import yoso
    config = yoso.Config()
    scheduler = LCMScheduler(**yoso.scheduler_config(config))
    scheduler.set_timesteps(nfe)
    assert scheduler.timesteps.tolist() == yoso.sampling_levels(config.levels, nfe)
