"""YOSO's mathematics: closed forms, weights, losses, networks.

The closed forms have data N(m, s^2) in one dimension and a generator G(x_t) = m + k (x_t - alpha_t m).
A = alpha_t^2 s^2 + sigma_t^2 is the variance of x_t.

  Y1  reconstruction alone: k = alpha_t s^2 / A, the mean of the posterior, whose variance shrinks with t
  Y2  adversarial loss alone: k = s / sqrt(A), the data's own variance, where L_D = 2 ln 2
  Y3  the best L_D against Y1's generator: the self-cooperative task is harder than the data's above level 1
  Y4  consistency alone: with one eps for both levels k stays near Y1's at level 1, with two it shrinks to 0
  Y5  UFOGen's two sides at t - 1: their divergence vanishes with t, where that of the clean sides grows
  Y6  the informative prior: without it the one-step mean at SD's last timestep is short by 6.8 % (Y2's k)
  Y7  the adaptation: targets give back x0 exactly; with the printed one noise stays in x0 (6.8 % for SD)
  Y8  stop-gradients: nothing reaches theta through x0 or target (of whole updates: test_yoso_step.py)

Expectations are exact: over equally probable quantiles, or by a Gauss-Hermite rule, whose weights enter
through lambda.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import LCMScheduler
from helpers import PIXART, SD, tiny_config

import yoso
from common import Denoiser, Draws, InformativePrior, NoiseSchedule, squared_distance

M, S = 0.3, 1.0
LEVELS = (1, 2, 3, 4)
SCHEDULE = NoiseSchedule.from_config(yoso.scratch_scheduler(4).config)
ALPHA, SIGMA = SCHEDULE.alpha.double(), SCHEDULE.sigma.double()
SCHEDULE.alpha, SCHEDULE.sigma = ALPHA, SIGMA
A = ALPHA**2 * S**2 + SIGMA**2
MMSE = ALPHA * S**2 / A
PERFECT = S / A.sqrt()


def G(x, t, k):
    return M + k * (x - ALPHA[t] * M)


def grid(normals, n=20):
    """That many standard normals on a product grid, [n^normals, 1, 1, 1] each, and weights of mean 1.

    A batch mean with these weights is an expectation.
    """
    nodes, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(n))
    values = torch.meshgrid(*[nodes] * normals, indexing="ij")
    w = torch.ones(())
    for factor in torch.meshgrid(*[n * weights / weights.sum()] * normals, indexing="ij"):
        w = w * factor
    return *(v.reshape(-1, 1, 1, 1) for v in values), w.flatten()


def quantiles(std, n=200_001):
    """N(M, std^2) as n equally probable points."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return M + std * torch.special.ndtri(p)


def optimal_logits(x, std_real, std_fake):
    """D* = log p_real - log p_fake of two Gaussians around M."""
    z = (x - M).square()
    return z / (2 * std_fake**2) - z / (2 * std_real**2) + torch.log(std_fake / std_real)


def full(t, like):
    return torch.full((len(like),), t)


def minimiser(loss):
    """Where a quadratic in k is smallest, from its slope at 0 and 1."""
    slopes = []
    for value in (0.0, 1.0):
        k = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        slopes.append(torch.autograd.grad(loss(k), k)[0].item())
    return -slopes[0] / (slopes[1] - slopes[0])


# Closed forms

def test_y1_reconstruction_alone_shrinks_the_variance():
    z, eps, w = grid(2)
    x0, zero = M + S * z, torch.zeros(len(z), dtype=torch.float64)
    variances = []
    for t in LEVELS:
        x_t = SCHEDULE.add_noise(x0, eps, full(t, x0))
        loss = lambda k: yoso.generator_loss(zero, squared_distance(G(x_t, t, k), x0), zero, w, zero)[0]  # noqa: B023
        k = minimiser(loss)
        assert k == pytest.approx(MMSE[t].item(), rel=1e-9)
        variances.append(k**2 * A[t].item())
    assert variances == pytest.approx([0.52174, 0.078676, 0.0034289, 4.319e-5], rel=1e-4)


def test_y2_adversarial_fixed_point():
    """Against the best D the generator's gradient pushes k to s / sqrt(A) from both sides."""
    for t in LEVELS:
        for factor, sign in ((0.8, -1), (1.25, 1)):
            k = (factor * PERFECT[t]).requires_grad_()
            fake = G(ALPHA[t] * M + (quantiles(A[t].sqrt()) - M), t, k)
            logits = optimal_logits(fake, torch.tensor(S), (k * A[t].sqrt()).detach())
            slope, = torch.autograd.grad(yoso.adversarial_loss(logits), k)
            assert slope * sign > 0
        std = PERFECT[t] * A[t].sqrt()
        assert std == pytest.approx(S)
        real, fake = (optimal_logits(quantiles(v), torch.tensor(S), std) for v in (S, std))
        assert yoso.discriminator_loss(real, fake).item() == pytest.approx(2 * np.log(2))


@pytest.mark.parametrize("adversary, expected", [
    ("self", (1.3374, 1.0854, 0.7992, 0.5579)), ("data", (1.3374, 0.9323, 0.3686, 0.0764))])
def test_y3_optimal_discriminator_loss(adversary, expected):
    """With Y1's generator: the self-cooperative task is harder for D than the data's above level 1."""
    std = [torch.tensor(S, dtype=torch.float64), *(MMSE[t] * A[t].sqrt() for t in LEVELS)]
    for t, value in zip(LEVELS, expected):
        x0, fake = quantiles(S), quantiles(std[t])
        p = SimpleNamespace(x0=x0, real=quantiles(std[t - 1]), t=full(t, x0))
        real, fake, level = yoso.adversarial_pair(adversary, SCHEDULE, p, fake)
        assert torch.equal(level, p.t)
        logits = (optimal_logits(x, real.std(), std[t]) for x in (real, fake))
        assert yoso.discriminator_loss(*logits).item() == pytest.approx(value, abs=2e-4)


def consistency_minimiser(t, k_r, shared):
    """The k that the consistency term alone chooses at level t, given k_r at level t - 1."""
    z, eps, *other, w = grid(2 if shared else 3)
    x0, zero = M + S * z, torch.zeros(len(z), dtype=torch.float64)
    x_t = SCHEDULE.add_noise(x0, eps, full(t, x0))
    target = G(SCHEDULE.add_noise(x0, other[0] if other else eps, full(t - 1, x0)), t - 1, k_r)

    def loss(k):
        return yoso.generator_loss(zero, zero, squared_distance(G(x_t, t, k), target), zero, w)[0]
    return minimiser(loss)


@pytest.mark.parametrize("shared, expected", [
    (True, (0.72232, 0.62582, 0.60994, 0.60912)), (False, (0.72232, 0.14635, 0.0024037, 9.25e-7))])
def test_y4_consistency_needs_shared_noise(shared, expected):
    k = torch.tensor(1.0, dtype=torch.float64)
    for t, value in zip(LEVELS, expected):
        k = consistency_minimiser(t, k, shared)
        # The references for two eps are given to three digits.
        assert k == pytest.approx(value, rel=2e-5 if shared else 1e-3)


def kl(std_p, std_q):
    return (torch.log(std_q / std_p) + std_p**2 / (2 * std_q**2) - 0.5).item()


def test_y5_ufogen_has_no_signal_at_high_noise():
    """KL between the two sides of D, for Y1's generator, in UFOGen's noisy space and in the clean one."""
    z, eps, noise, w = grid(3)
    x0 = M + S * z

    def std(x):
        x = x.flatten()
        return ((w * x.square()).mean() - (w * x).mean()**2).sqrt()

    noisy, clean = [], []
    for t in LEVELS:
        x_t, x_r = (SCHEDULE.add_noise(x0, eps, full(level, x0)) for level in (t, t - 1))
        fake, real = G(x_t, t, MMSE[t]), G(x_r, t - 1, MMSE[t - 1]) if t > 1 else x0
        p = SimpleNamespace(x0=x0, real=real, eps=eps, noise=noise, t=full(t, x0), t_real=full(t - 1, x0))
        real_n, fake_n, level = yoso.adversarial_pair("ufogen", SCHEDULE, p, fake)
        assert torch.equal(level, p.t_real)
        noisy.append(kl(std(real_n), std(fake_n)))
        real_c, fake_c, _ = yoso.adversarial_pair("self", SCHEDULE, p, fake)
        clean.append(kl(std(real_c), std(fake_c)))
    assert noisy == pytest.approx([0.1330, 0.1352, 0.001713, 2.95e-6], rel=3e-3)
    assert clean == pytest.approx([0.1330, 1.870, 9.41, 37.0], rel=3e-3)


def test_y6_informative_prior_removes_the_mean_error():
    schedule = NoiseSchedule.from_config(SD)
    alpha, sigma = schedule.alpha[-1].double(), schedule.sigma[-1].double()
    variance = alpha**2 * S**2 + sigma**2
    z = quantiles(1.0) - M
    prior = InformativePrior(torch.tensor(M), torch.tensor(S))
    for k in (alpha * S**2 / variance, S / variance.sqrt()):  # those of Y1 and Y2
        plain = (M + k * (z - alpha * M)).mean()
        assert plain.item() == pytest.approx((M * (1 - alpha * k)).item(), abs=1e-9)
        informed = (M + k * (prior.start(schedule, z, torch.flip(z, (0,))) - alpha * M)).mean()
        assert informed.item() == pytest.approx(M, abs=1e-6)
    assert (alpha * S / variance.sqrt()).item() == pytest.approx(0.068, abs=5e-4)


@pytest.mark.parametrize("config, leak", [(PIXART, 0.0064), (SD, 0.068)], ids=["pixart", "sd"])
def test_y7_adaptation_targets(config, leak):
    """An exact teacher's target is the true v of either schedule; stage II's as printed leaves noise."""
    schedule, t = NoiseSchedule.from_config(config), torch.arange(1000)
    rescaled = schedule.zero_terminal_snr()
    x0, eps = torch.randn(1000, 4, 2, 2), torch.randn(1000, 4, 2, 2)
    for student in (schedule, rescaled):
        target = yoso.adaptation_target(eps, x0, student, t)
        x_t = student.add_noise(x0, eps, t)
        found = student.convert(target, x_t, t, "v_prediction", "sample")
        torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)
    printed = yoso.adaptation_target(eps, x0, schedule, t)
    wrong = rescaled.convert(printed, rescaled.add_noise(x0, eps, t), t, "v_prediction", "sample")
    of_x0 = rescaled.alpha**2 + schedule.sigma * rescaled.sigma
    of_eps = rescaled.sigma * (rescaled.alpha - schedule.alpha)
    expected = of_x0.view(-1, 1, 1, 1) * x0 + of_eps.view(-1, 1, 1, 1) * eps
    torch.testing.assert_close(wrong, expected, atol=1e-5, rtol=0)
    assert of_eps.abs().max().item() == pytest.approx(leak, rel=0.02)
    assert yoso.adaptation_loss(x0, eps).item() == pytest.approx((x0 - eps).square().mean().item())


@pytest.mark.parametrize("names", [("l2", "l2"), ("cubes", "cubes"), ("l2", "cubes")])
def test_y8_stop_gradients(names):
    """Features of x0 and target have no graph, those of fake are computed once, and all gradient is theirs.

    train_step makes x0 and target themselves without one: test_yoso_step.py.
    """
    computed, theta = [], torch.ones((), requires_grad=True)
    cubes = lambda x, cond: computed.append(x) or cond * x**3
    distances = dict(l2=(lambda x, cond: x, squared_distance), cubes=(cubes, squared_distance))
    config = SimpleNamespace(rec_distance=names[0], con_distance=names[1], lambda_con=1.0)
    x0, target, fake = torch.randn(3, 8, 1, 1, 1)
    fake.requires_grad_()
    p = SimpleNamespace(cond_d=2.0, x0=x0 if names[0] == "l2" else theta * x0,
                        target=target if names[1] == "l2" else theta * target)
    closed = dict(l2=lambda a, b: (a - b)**2, cubes=lambda a, b: 4 * (a**3 - b**3)**2)
    expected = [closed[name](fake, x).flatten() for name, x in zip(names, (x0, target))]
    found = yoso.distances_of(fake, p, config, distances)
    for d, reference in zip(found, expected):
        torch.testing.assert_close(d, reference)
    gradients = torch.autograd.grad(sum(found).sum(), (fake, theta), allow_unused=True)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(sum(expected).sum(), fake)[0])
    assert gradients[1] is None
    assert len(computed) == names.count("cubes") + ("cubes" in names)
    without = yoso.distances_of(fake, p, SimpleNamespace(**vars(config) | dict(lambda_con=0)), distances)
    assert without[1] is None and torch.equal(without[0], found[0])


# Levels and weights

def test_ddgan_levels():
    expected = torch.tensor([1, 0.722319, 0.280492, 0.0585566, 0.00657195])
    torch.testing.assert_close(SCHEDULE.alpha.float(), expected, atol=1e-6, rtol=1e-5)
    assert SCHEDULE.sigma[0] < 1e-3


@pytest.mark.parametrize("levels", [4, 3])
def test_exported_scheduler_visits_our_levels(levels):
    scheduler = LCMScheduler.from_config(yoso.scratch_scheduler(levels).config)
    for nfe in range(1, levels + 1):
        scheduler.set_timesteps(nfe)
        assert scheduler.timesteps.tolist() == yoso.sampling_levels(levels, nfe)
        assert yoso.sampling_levels(levels, nfe)[0] == levels


def test_a_level_without_noise_is_the_data():
    """predict_x0 at level 0 returns x0 itself, whatever the network says there; above, the network's x0."""
    net = lambda x, timestep, offset: SimpleNamespace(sample=torch.full_like(x, torch.nan) + offset)
    p = SimpleNamespace(x0=torch.randn(4, 3, 2, 2), eps=torch.randn(4, 3, 2, 2), cond=dict(offset=0.0))
    level = torch.tensor([0, 1, 0, 4])
    for kind in ("sample", "epsilon", "v_prediction"):
        x0 = yoso.predict_x0(Denoiser(net, SCHEDULE, kind), p, level)
        assert torch.equal(x0[level == 0], p.x0[level == 0]) and x0[level > 0].isnan().all()
    seen = []
    net = lambda x, timestep, offset: seen.append((x, timestep)) or SimpleNamespace(sample=2 * x + offset)
    p.cond = dict(offset=7.0)
    x0 = yoso.predict_x0(Denoiser(net, SCHEDULE, "sample"), p, level)
    x_t = SCHEDULE.add_noise(p.x0, p.eps, level)
    torch.testing.assert_close(x0[level > 0], (2 * x_t + 7)[level > 0].float())
    assert torch.equal(seen[0][0], x_t) and torch.equal(seen[0][1], level)


@pytest.mark.parametrize("vae", [None, "a VAE"])
def test_pictures_are_clamped_before_they_are_noised_again(vae):
    """Latents have no such limit."""
    schedule, given = NoiseSchedule.from_config(yoso.scratch_scheduler(4).config), []

    def net(x_t, timestep):
        given.append(x_t)
        return SimpleNamespace(sample=5 * x_t.sign())

    codec = SimpleNamespace(shape=(3, 4, 4), picture_size=4, device="cpu", vae=vae, cond=lambda y: {},
                            decode=lambda x0: x0)
    pictures, = yoso.draw_pictures(yoso.Sampler(Denoiser(net, schedule, "sample"), codec), ["a", "b"], 2, 7)
    draw = Draws(7, 0, 2, slice(None), "cpu")
    x_T, _, noise = (draw.randn(3, 4, 4) for _ in range(3))
    x0 = x_T.sign() if vae is None else 5 * x_T.sign()
    torch.testing.assert_close(given[0], x_T)
    torch.testing.assert_close(given[1], schedule.add_noise(x0, noise, torch.tensor([2, 2])))
    assert torch.equal(pictures, given[1].sign())


def test_weights_on_the_ddgan_schedule():
    t = torch.tensor(LEVELS)
    expected = torch.tensor([1.0909, 0.085394, 0.0034407, 4.319e-5])
    weights = yoso.reconstruction_weight(SCHEDULE.snr(t))
    torch.testing.assert_close(weights.float(), expected, rtol=2e-4, atol=0)
    weights = yoso.consistency_weight(SCHEDULE.snr(t), SCHEDULE.snr(t - 1))
    expected = torch.tensor([1.0909, 0.092647, 0.0035851, 4.374e-5])
    torch.testing.assert_close(weights.float(), expected, rtol=2e-4, atol=0)


def test_weights_on_the_schedule_of_sd():
    """With m = 25 the script's weight passes 5 for t <= 606, SNR(t) for t <= 146; both end at 0 with it."""
    schedule, t = NoiseSchedule.from_config(SD), torch.arange(1000)
    snr, snr_con = schedule.snr(t), schedule.snr((t - 25).clamp(min=0))
    weight = yoso.sqrt_consistency_weight(snr, snr_con)
    assert (weight >= 5).nonzero().max() == 606 and (snr > 5).nonzero().max() == 146
    ratio = schedule.sigma / schedule.alpha
    torch.testing.assert_close(weight[700], 1 / (ratio[700] - ratio[675]))
    zero = schedule.zero_terminal_snr()
    for function in (yoso.sqrt_consistency_weight, yoso.consistency_weight):
        assert function(zero.snr(t), zero.snr((t - 25).clamp(min=0)))[999] < 1e-6
        assert function(snr, snr_con)[1:].isfinite().all()


@pytest.mark.parametrize("con_weight, power", [("sqrt", 0.5), ("snr", 1.0)])
def test_weights_are_limited_and_then_scaled(con_weight, power):
    """0.5 min(SNR(t), 5) and 2 min(w(t), 5), on both sides of the limits; the limit may be infinite."""
    schedule, t = NoiseSchedule.from_config(SD), torch.tensor([3, 30, 300, 900])
    snr, snr_con = schedule.snr(t).double(), schedule.snr((t - 25).clamp(min=0)).double()
    for limit in (5.0, torch.inf):
        config = SimpleNamespace(con_weight=con_weight, lambda_rec=0.5, lambda_con=2.0, weight_limit=limit)
        rec, con = yoso.weights_of(config, schedule, t, (t - 25).clamp(min=0))
        torch.testing.assert_close(rec.double(), 0.5 * snr.clamp(max=limit), rtol=1e-5, atol=0)
        expected = 2 * (1 / (snr**-power - snr_con**-power)).clamp(max=limit)
        torch.testing.assert_close(con.double(), expected, rtol=1e-3, atol=0)


# Losses

def test_generator_loss_is_the_weighted_sum():
    logits, d_rec, d_con, a, b = torch.randn(4), *torch.rand(4, 4)
    loss, parts = yoso.generator_loss(logits, d_rec, d_con, a, b)
    rec, con = (a * d_rec).sum() / 4, (b * d_con).sum() / 4
    adv = sum(torch.log1p(torch.exp(-logit)) for logit in logits) / 4
    torch.testing.assert_close(loss, rec + con + adv)
    assert list(parts) == ["L_rec", "L_con", "L_adv"]
    torch.testing.assert_close(torch.stack(list(parts.values())), torch.stack([rec, con, adv]))
    alone, parts = yoso.generator_loss(logits, d_rec, None, a, b)
    assert parts["L_con"] == 0
    torch.testing.assert_close(alone, rec + adv)


def test_discriminator_loss_averages_after_softplus():
    """Logits +-3 cost 1.549 a side; softplus of their mean would cost 0.693."""
    logits = torch.tensor([3.0, -3.0])
    assert yoso.discriminator_loss(logits, logits).item() == pytest.approx(2 * 1.5486, abs=1e-3)


def test_discriminator_loss_rewards_the_right_side():
    good, bad = torch.tensor([2.0]), torch.tensor([-2.0])
    assert yoso.discriminator_loss(good, bad).item() == pytest.approx(2 * np.log1p(np.exp(-2)))
    assert yoso.discriminator_loss(bad, good).item() == pytest.approx(2 * np.log1p(np.exp(2)))


def test_r1_of_a_linear_discriminator():
    w = torch.randn(3, 4, 4)
    real = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = yoso.r1_penalty((real * w).sum((1, 2, 3)), real)
    assert penalty.item() == pytest.approx(w.square().sum().item(), rel=1e-5)


def test_equation_7_on_linear_weights_is_exact():
    base, high, tuned = (
        dict(w=torch.randn(3, 3, dtype=torch.float64), size=torch.randn(n), **more)
        for n, more in ((4, {}), (8, dict(resolution=torch.ones(2))), (4, {})))
    merged = yoso.add_differences(base, high, tuned, 0.5, 2.0)
    expected = base["w"] + 0.5 * (high["w"] - base["w"]) + 2 * (tuned["w"] - base["w"])
    torch.testing.assert_close(merged["w"], expected, atol=1e-15, rtol=0)
    assert torch.equal(merged["size"], high["size"])
    assert torch.equal(merged["resolution"], high["resolution"])
    assert torch.equal(yoso.add_differences(base, high, base, 1.0, 1.0)["w"], high["w"])


# Networks

def test_cifar10_preset_has_the_papers_size():
    config = yoso.Config(**yoso.PRESETS["cifar10"])
    with torch.device("meta"):
        networks = yoso.scratch_generator(config), yoso.Discriminator(config)
    sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    assert sizes == pytest.approx([48.4, 12.7], rel=0.03)


def test_the_latent_z_changes_the_picture_whatever_its_length(tmp_path):
    """Its direction does; the mapping network scales it to unit RMS."""
    generator = yoso.scratch_generator(tiny_config(tmp_path, latent_z=8)).eval()
    x, t, z = torch.randn(2, 3, 16, 16), torch.tensor([4, 4]), torch.randn(2, 8)
    picture = generator(x, t, class_labels=z).sample
    assert picture.shape == x.shape and not torch.allclose(picture, generator(x, t, class_labels=-z).sample)
    torch.testing.assert_close(generator(x, t, class_labels=3 * z).sample, picture, atol=1e-5, rtol=0)


def discriminator_of(name, folder):
    """(discriminator, x [4, ...], t, cond) of a run from scratch or of a fine-tune."""
    t = torch.tensor([0, 2, 3, 4])
    if name == "scratch":
        return yoso.Discriminator(tiny_config(folder)), torch.randn(4, 3, 16, 16), t, {}
    text = dict(encoder_hidden_states=torch.randn(4, 5, 32))
    return yoso.LatentDiscriminator(tiny.unet(), 8), torch.randn(4, 4, 8, 8), 200 * t, text


@pytest.mark.parametrize("name", ["scratch", "latent"])
def test_the_discriminator_starts_undecided_and_reads_everything(name, tmp_path):
    """Picture, level, caption, and where in the picture something is."""
    discriminator, x, t, cond = discriminator_of(name, tmp_path)
    logits = discriminator(x, t, cond)
    assert torch.equal(logits, torch.zeros(4))
    assert yoso.discriminator_loss(logits, logits).item() == pytest.approx(2 * np.log(2), rel=1e-5)
    torch.nn.init.normal_(discriminator.end.weight)
    logits = discriminator(x, t, cond)
    changed = [(-x, t, cond), (x.flip(3), t, cond), (x, t.flip(0), cond)]
    changed += [(x, t, {key: 0 * value for key, value in cond.items()})] * bool(cond)
    for inputs in changed:
        assert (discriminator(*inputs) - logits).abs().max() > 1e-4


def test_the_latent_discriminator_knows_the_place_of_a_feature():
    """Its pooling would otherwise not depend on the order of the places."""
    discriminator, x, t, cond = discriminator_of("latent", None)
    torch.nn.init.normal_(discriminator.end.weight)
    h = discriminator.features(x, t, cond)
    discriminator.features.forward = lambda *inputs: h
    logits = discriminator(x, t, cond)
    discriminator.features.forward = lambda *inputs: h.flip(3)
    assert (discriminator(x, t, cond) - logits).abs().max() > 1e-4


def test_pictures_of_a_group_are_seen_together(tmp_path):
    """Four equal pictures get other logits than the same ones among different pictures; groups stay apart."""
    discriminator = yoso.Discriminator(tiny_config(tmp_path))
    torch.nn.init.normal_(discriminator.end.weight)
    x, t = torch.randn(8, 3, 16, 16), torch.full((8,), 3)
    logits = discriminator(x, t)
    torch.testing.assert_close(discriminator(x[4:], t[4:]), logits[4:])
    equal = discriminator(torch.cat([x[:1]] * 4), t[:4])
    assert equal.std() < 1e-5 and (equal[0] - logits[0]).abs() > 1e-4
