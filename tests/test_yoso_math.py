"""YOSO's losses against closed forms: data N(m, s^2) in one dimension, the linear generator G(x) = m + k (x - alpha m).

Expectations over noise are exact: equal-probability quantiles, or a Gauss-Hermite rule whose weights enter through lambda.
"""

import numpy as np
import pytest
import torch

import yoso
from common import InformativePrior, NoiseSchedule, ddgan_betas

M, S = 0.3, 1.0
LEVELS = (1, 2, 3, 4)
SCHEDULE = NoiseSchedule.from_config(dict(num_train_timesteps=5, trained_betas=ddgan_betas(4)))
ALPHA, SIGMA = SCHEDULE.alpha.double(), SCHEDULE.sigma.double()
SCHEDULE.alpha, SCHEDULE.sigma = ALPHA, SIGMA
VARIANCE = ALPHA**2 * S**2 + SIGMA**2  # of x_t: the A of the formulas
MMSE = ALPHA * S**2 / VARIANCE
PERFECT = S / VARIANCE.sqrt()


def G(x, t, k):
    return M + k * (x - ALPHA[t] * M)


def hermite(n=20):
    """Nodes and weights of N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def pairs():
    """x0 and eps on a product grid, [n^2, 1, 1, 1], and weights that make a batch mean an expectation."""
    nodes, weights = hermite()
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    w = (weights[:, None] * weights[None]).flatten()
    shape = (-1, 1, 1, 1)
    return (M + S * z).reshape(shape), eps.reshape(shape), w * len(w)


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


def consistency_minimiser(t, k_r, shared):
    """The k that the consistency term alone chooses at level t, given k_r at level t-1."""
    x0, eps, w = pairs()
    eps_r = eps
    if not shared:  # an independent eps for x_r: one more dimension of the grid
        nodes, weights = hermite()
        n = len(nodes)
        x0, eps, w = x0.repeat_interleave(n, 0), eps.repeat_interleave(n, 0), w.repeat_interleave(n) * (weights * n).repeat(len(x0))
        eps_r = nodes.repeat(len(x0) // n).view(-1, 1, 1, 1)
    x_t, x_r = SCHEDULE.add_noise(x0, eps, full(t, x0)), SCHEDULE.add_noise(x0, eps_r, full(t - 1, x0))
    zero = torch.zeros(len(x0), dtype=torch.float64)

    def loss(k):
        return yoso.generator_loss(G(x_t, t, k), x0, G(x_r, t - 1, k_r), zero, zero, w)[0]
    return minimiser(loss)


def test_y1_reconstruction_alone_shrinks_the_variance():
    x0, eps, w = pairs()
    zero = torch.zeros(len(x0), dtype=torch.float64)
    variances = []
    for t in LEVELS:
        x_t = SCHEDULE.add_noise(x0, eps, full(t, x0))
        k = minimiser(lambda k: yoso.generator_loss(G(x_t, t, k), x0, x0, zero, w, zero)[0])
        assert k == pytest.approx(MMSE[t].item(), rel=1e-9)
        variances.append(k**2 * VARIANCE[t].item())
    assert variances == pytest.approx([0.52174, 0.078676, 0.0034289, 4.319e-5], rel=1e-4)


def test_y2_adversarial_fixed_point():
    """Against the optimal D, the generator's gradient pushes k towards s / sqrt(A) from both sides, where L_D = 2 ln 2."""
    for t in LEVELS:
        real = quantiles(S)
        for factor, sign in ((0.8, -1), (1.25, 1)):
            k = (factor * PERFECT[t]).requires_grad_()
            fake = G(ALPHA[t] * M + (quantiles(VARIANCE[t].sqrt()) - M), t, k)
            logits = optimal_logits(fake, torch.tensor(S), (k * VARIANCE[t].sqrt()).detach())
            slope, = torch.autograd.grad(yoso.adversarial_loss(logits), k)
            assert slope * sign > 0
        std = PERFECT[t] * VARIANCE[t].sqrt()
        assert std == pytest.approx(S)
        loss = yoso.discriminator_loss(optimal_logits(real, torch.tensor(S), std), optimal_logits(quantiles(std), torch.tensor(S), std))
        assert loss.item() == pytest.approx(2 * np.log(2))


@pytest.mark.parametrize("adversary, expected", [("self", (1.3374, 1.0854, 0.7992, 0.5579)), ("data", (1.3374, 0.9323, 0.3686, 0.0764))])
def test_y3_optimal_discriminator_loss(adversary, expected):
    """With the MMSE generator: the self-cooperative task is harder for D than the data task at every level above 1."""
    for t, value in zip(LEVELS, expected):
        x0, noise = quantiles(S), torch.zeros(1)
        std = {r: (MMSE[r] * VARIANCE[r].sqrt() if r else torch.tensor(S, dtype=torch.float64)) for r in (t - 1, t)}
        real, fake, level = yoso.adversarial_pair(adversary, SCHEDULE, quantiles(std[t]), quantiles(std[t - 1]), x0, None, full(t, x0), noise)
        assert (level == t).all()
        std_real = real.std()
        loss = yoso.discriminator_loss(optimal_logits(real, std_real, std[t]), optimal_logits(fake, std_real, std[t]))
        assert loss.item() == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize("shared, expected", [(True, (0.72232, 0.62582, 0.60994, 0.60912)), (False, (0.72232, 0.14635, 0.0024037, 9.25e-7))])
def test_y4_consistency_needs_shared_noise(shared, expected):
    k = torch.tensor(1.0, dtype=torch.float64)
    for t, value in zip(LEVELS, expected):
        k = consistency_minimiser(t, k, shared)
        # The references for independent noise are given to three digits.
        assert k == pytest.approx(value, rel=2e-5 if shared else 1e-3)


def kl(std_p, std_q):
    return (torch.log(std_q / std_p) + std_p**2 / (2 * std_q**2) - 0.5).item()


def test_y5_ufogen_has_no_signal_at_high_noise():
    """KL between the two sides of the discriminator, for the MMSE generator, in the noisy and in the clean space."""
    x0, eps, w = pairs()
    nodes, weights = hermite()
    n = len(nodes)
    x0, eps, w = x0.repeat_interleave(n, 0), eps.repeat_interleave(n, 0), w.repeat_interleave(n) * (weights * n).repeat(n * n)
    noise = nodes.repeat(n * n).view(-1, 1, 1, 1)

    def std(x):
        x = x.flatten()
        return ((w * x.square()).mean() - (w * x).mean()**2).sqrt()

    noisy, clean = [], []
    for t in LEVELS:
        x_t, x_r = SCHEDULE.add_noise(x0, eps, full(t, x0)), SCHEDULE.add_noise(x0, eps, full(t - 1, x0))
        fake, target = G(x_t, t, MMSE[t]), (G(x_r, t - 1, MMSE[t - 1]) if t > 1 else x0)
        real_n, fake_n, level = yoso.adversarial_pair("ufogen", SCHEDULE, fake, target, x0, x_r, full(t, x0), noise)
        assert (level == t - 1).all()
        noisy.append(kl(std(real_n), std(fake_n)))
        real_c, fake_c, _ = yoso.adversarial_pair("self", SCHEDULE, fake, target, x0, x_r, full(t, x0), noise)
        clean.append(kl(std(real_c), std(fake_c)))
    assert noisy == pytest.approx([0.1330, 0.1352, 0.001713, 2.95e-6], rel=3e-3)
    assert clean == pytest.approx([0.1330, 1.870, 9.41, 37.0], rel=3e-3)


def test_y6_informative_prior_removes_the_mean_error():
    from test_schedule import SD
    schedule = NoiseSchedule.from_config(SD)
    alpha, sigma = schedule.alpha[-1].double(), schedule.sigma[-1].double()
    A = alpha**2 * S**2 + sigma**2
    z = quantiles(1.0) - M
    prior = InformativePrior(torch.tensor(M), torch.tensor(S))
    for k, short in ((alpha * S**2 / A, alpha**2 * S**2 / A), (S / A.sqrt(), alpha * S / A.sqrt())):
        plain = (M + k * (z - alpha * M)).mean()
        assert plain.item() == pytest.approx((M * (1 - short)).item(), abs=1e-9)
        informed = (M + k * (prior.start(schedule, z, torch.flip(z, (0,))) - alpha * M)).mean()
        assert informed.item() == pytest.approx(M, abs=1e-6)
    assert (alpha * S / A.sqrt()).item() == pytest.approx(0.068, abs=5e-4)


def test_y8_stop_gradients():
    """Nothing flows to theta through the real side or the consistency target; all of it through the fake.

    That L_D sends nothing to theta and L_G nothing to phi is tested on the updates themselves, in test_run.py.
    """
    theta = torch.ones(8, 1, 1, 1, requires_grad=True)
    x0, t, w = torch.randn(8, 1, 1, 1), torch.full((8,), 2), torch.ones(8)

    real, _, _ = yoso.adversarial_pair("self", SCHEDULE, x0, theta * x0, x0, x0, t, x0)
    assert not real.requires_grad

    loss, _ = yoso.generator_loss(x0.clone().requires_grad_(), x0, theta * x0, torch.zeros(8), w, w)
    assert torch.autograd.grad(loss, theta, allow_unused=True)[0] is None

    fake = theta * x0
    loss, _ = yoso.generator_loss(fake, x0, x0, fake.flatten(), w, w)
    assert torch.autograd.grad(loss, theta)[0].abs().sum() > 0


def test_weights_on_the_ddgan_schedule():
    t = torch.tensor(LEVELS)
    torch.testing.assert_close(yoso.reconstruction_weight(SCHEDULE.snr(t)).float(), torch.tensor([1.0909, 0.085394, 0.0034407, 4.319e-5]), rtol=2e-4, atol=0)
    weights = yoso.consistency_weight(SCHEDULE.snr(t), SCHEDULE.snr(t - 1))
    torch.testing.assert_close(weights.float(), torch.tensor([1.0909, 0.092647, 0.0035851, 4.374e-5]), rtol=2e-4, atol=0)


def test_generator_loss_is_the_weighted_sum():
    fake, x0, target = torch.randn(3, 4, 2, 2, 2)
    logits, a, b = torch.randn(4), torch.rand(4), torch.rand(4)
    loss, parts = yoso.generator_loss(fake, x0, target, logits, a, b)
    rec = sum(a[i] * ((fake[i] - x0[i])**2).mean() for i in range(4)) / 4
    con = sum(b[i] * ((fake[i] - target[i])**2).mean() for i in range(4)) / 4
    adv = sum(torch.log1p(torch.exp(-logits[i])) for i in range(4)) / 4
    torch.testing.assert_close(loss, rec + con + adv)
    torch.testing.assert_close(torch.stack([parts["L_rec"], parts["L_con"], parts["L_adv"]]), torch.stack([rec, con, adv]))


def test_discriminator_loss_averages_after_softplus():
    """Logits +-3 cost 1.549 a side; softplus of their mean would cost 0.693."""
    logits = torch.tensor([3.0, -3.0])
    assert yoso.discriminator_loss(logits, logits).item() == pytest.approx(2 * 1.5486, abs=1e-3)


def test_r1_of_a_linear_discriminator():
    w = torch.randn(3, 4, 4)
    real = torch.randn(5, 3, 4, 4, requires_grad=True)
    assert yoso.r1_penalty((real * w).sum((1, 2, 3)), real).item() == pytest.approx(w.square().sum().item(), rel=1e-5)
