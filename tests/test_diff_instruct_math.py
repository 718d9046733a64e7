"""Diff-Instruct*'s formulas against closed forms where all data are one-dimensional Gaussians (helpers.py).

There every score is known, and expectations are sums over quadrature nodes.

D1   the tractable loss has the score divergence's gradient, and is 0 itself
D2   the same loss with one wrong detach or sign has another gradient
D3   pseudo-Huber's values
D4   pseudo-Huber's pull is bounded, and comes to rest with a linear reward
D5   D1 is not the gradient of the divergence whose x_t follows the student too
D6   where rewards come to rest
D7   guidance as a reward pulls towards the condition
D8   for KL both choices of guidance are the same
D9   noise predictions in place of scores are the weight sigma_t
D10  who moves whom (test_diff_instruct_step.py)
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import ALPHA, MU, SIGMA, A, B, M, S, quadrature

import diff_instruct_star as di
from common import Denoiser, NoiseSchedule

B_NULL = ALPHA**2 * 4 + SIGMA**2  # the null condition's data are N(0, 4)


def score(mean, variance):
    """The score of x_t where the data are N(mean, variance)."""
    return lambda x: -(x - ALPHA * mean) / (ALPHA**2 * variance + SIGMA**2)


def gradients(loss_of, mu=MU, s=S, nodes=200):
    """d/dmu, d/ds in expectation of loss_of(x_t, f, target), a mean over samples, at f = mu + s z.

    The target is -eps / sigma. As in training, the loss's gradient is taken at a leaf, sample by sample, and
    carried on to the student.
    """
    mu, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mu, s))
    z, eps, weights = quadrature(nodes)
    f = mu + s * z
    leaf = f.detach().requires_grad_()
    gradient, = torch.autograd.grad(loss_of(ALPHA * leaf + SIGMA * eps, leaf, -eps / SIGMA), leaf)
    (f * gradient * weights * len(weights)).sum().backward()
    return mu.grad.item(), s.grad.item()


def divergence(distance="l2", c=1.0, detach=False, mu=MU, s=S, loss=None):
    """The score divergence's loss with both scores analytic and their parameters frozen."""
    loss = loss or di.score_loss
    return lambda x_t, f, target: loss(score(mu, s**2)(x_t), score(M, 1.0)(x_t), target, distance, c, detach)


def test_d1_the_tractable_loss_has_the_divergences_gradient():
    """E d'(y) d_theta s_theta = (2 alpha^2 (mu - m) / AB, 4 alpha^2 s (A - B) / A^2 B); the loss is 0."""
    expected = 2 * ALPHA**2 * (MU - M) / (A * B), 4 * ALPHA**2 * S * (A - B) / (A**2 * B)
    assert expected == pytest.approx((0.568889, 0.948148), abs=1e-6)
    assert gradients(divergence()) == pytest.approx(expected, abs=1e-6)
    z, eps, weights = quadrature(80)
    x = ALPHA * (MU + S * z) + SIGMA * eps
    direct = (2 * (score(MU, S**2)(x) - score(M, 1.0)(x)) * ALPHA / A * weights).sum()
    assert direct.item() == pytest.approx(expected[0], abs=1e-6)
    values = torch.vmap(lambda x, eps: divergence()(x[None], None, -eps[None] / SIGMA))(x, eps)
    assert (values.view(-1) * weights.view(-1)).sum().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("wrong, expected", [
    (lambda u_of, s, q, e: -u_of((s - q).detach()) * (s - e), (0.568889, 0.474074)),
    (lambda u_of, s, q, e: -u_of(s - q) * (s.detach() - e), (0.0, 0.474074)),
    (lambda u_of, s, q, e: u_of(s - q) * (s - e), (-0.568889, -0.948148)),
], ids=["d' detached", "second bracket detached", "sign"])
def test_d2_wrong_stop_gradients_are_caught(wrong, expected):
    """Eq. 3.4 with one mistake has a gradient that D1 tells from the right one."""
    def loss(assistant, reference, target, *distance):
        product = wrong(lambda y: di.distance_gradient(y, *distance), assistant, reference, target)
        return product.flatten(1).sum(1).mean()

    found = gradients(divergence(loss=loss))
    assert found == pytest.approx(expected, abs=1e-4)
    assert found != pytest.approx(gradients(divergence()), abs=1e-2)


@pytest.mark.parametrize("c, detach, expected", [
    (0.5, False, (0.255089, 0.329574)), (1.0, False, (0.193722, 0.276527)),
    (10.0, False, (0.0282381, 0.0468755)),
    (0.5, True, (0.255089, 0.462418)), (1.0, True, (0.193722, 0.329730))])
def test_d3_pseudo_huber(c, detach, expected):
    assert gradients(divergence("huber", c, detach)) == pytest.approx(expected, abs=1e-4)


def test_pseudo_huber_normalises_whole_samples():
    y = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    distance = ((y.square().sum((1, 2, 3)) + 0.7**2).sqrt() - 0.7).sum()
    torch.testing.assert_close(di.distance_gradient(y, "huber", 0.7), torch.autograd.grad(distance, y)[0])
    far = di.distance_gradient(1e3 * y, "huber", 0.7)
    assert far.flatten(1).norm(dim=1).max() <= 1, "bounded for any distance"


def test_d4_a_bounded_pull_and_its_equilibrium_with_a_linear_reward():
    """At s = 1, mu = m + D: alpha^2 D / sqrt(alpha^2 D^2 + c^2); the reward .3 x balances it at .252825."""
    g, c, D = 0.3, 0.5, 0.252825
    huber = lambda D: divergence("huber", c, mu=M + D, s=1.0)
    pull = gradients(huber(D), M + D, 1.0)[0]
    assert pull == pytest.approx(ALPHA**2 * D / (ALPHA**2 * D**2 + c**2)**0.5, abs=1e-6)
    rewarded = lambda x, f, target: huber(D)(x, f, target) + di.reward_loss(g * f, 1.0)
    assert gradients(rewarded, M + D, 1.0)[0] == pytest.approx(0, abs=1e-5)
    assert gradients(huber(1e4), M + 1e4, 1.0)[0] == pytest.approx(ALPHA, abs=1e-4)


def test_d5_it_is_not_the_on_policy_fisher_gradient():
    """(2 alpha^2 (mu - m) / B^2, 2 alpha^2 s (1/B^2 - 1/A^2)): D1 and the gradient of E y(x_t)^2."""
    total = 2 * ALPHA**2 * (MU - M) / B**2, 2 * ALPHA**2 * S * (1 / B**2 - 1 / A**2)
    assert total == pytest.approx((1.024, 1.327407), abs=1e-6)
    rest = gradients(lambda x, f, target: (score(MU, S**2)(x) - score(M, 1.0)(x)).square().mean())
    assert [a + b for a, b in zip(gradients(divergence()), rest)] == pytest.approx(total, abs=1e-6)


def kl(mu, s, reward=lambda f: 0 * f, alpha_rew=1.0):
    """Diff-Instruct's loss (weight 1: noise predictions of minus the scores) with a reward."""
    return lambda x, f, target: (di.kl_loss(x, -score(mu, s**2)(x), -score(M, 1.0)(x))
                                 + di.reward_loss(reward(f), alpha_rew))


def test_d6_where_rewards_come_to_rest():
    """A linear reward moves the mean alone, of KL and L2; a quadratic one under KL the variance too."""
    assert gradients(kl(MU, S)) == pytest.approx((0.512, 0.426667), abs=1e-6)
    g = 0.3
    mu = M + g * B / ALPHA**2
    found = gradients(kl(mu, 1.0, lambda f: g * f), mu, 1.0)
    assert mu == pytest.approx(0.16875) and found == pytest.approx((0, 0), abs=1e-6)
    mu = M + g * B**2 / (2 * ALPHA**2)
    l2 = lambda x, f, target: divergence(mu=mu, s=1.0)(x, f, target) + di.reward_loss(g * f, 1.0)
    assert mu == pytest.approx(-0.065625) and gradients(l2, mu, 1.0) == pytest.approx((0, 0), abs=1e-6)
    variance = (1 / (1 / B + 0.5 / ALPHA**2) - SIGMA**2) / ALPHA**2
    mu = (0.5 * 2 + ALPHA**2 * M / B) / (0.5 + ALPHA**2 / B)
    assert (mu, ALPHA**2 * variance + SIGMA**2) == pytest.approx((0.708772, 0.561404), abs=1e-6)
    found = gradients(kl(mu, variance**0.5, lambda f: -(f - 2).square() / 2, 0.5), mu, variance**0.5)
    assert found == pytest.approx((0, 0), abs=1e-6)


def test_d7_guidance_as_a_reward_pulls_towards_the_condition():
    """With the corrected sign alpha^2 [(mu - m) / B_c - mu / B_0] = .402411; the printed one negates it."""
    found = gradients(lambda x, f, target: di.cfg_loss(x, -score(M, 1.0)(x), -score(0.0, 4.0)(x), 1.0))
    expected = ALPHA**2 * ((MU - M) / B - MU / B_NULL), ALPHA**2 * S * (1 / B - 1 / B_NULL)
    assert expected == pytest.approx((0.402411, 0.631233), abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-6)


def test_d8_for_kl_both_choices_of_guidance_are_the_same():
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    assistant, conditional, null = torch.randn(3, 4, 4, 8, 8, dtype=torch.float64)
    first = di.kl_loss(x, assistant, conditional) + di.cfg_loss(x, conditional, null, 7.5)
    second = di.kl_loss(x, assistant, conditional + 7.5 * (conditional - null))
    first, second = (torch.autograd.grad(loss, x)[0] for loss in (first, second))
    torch.testing.assert_close(first, second, atol=1e-14, rtol=1e-12)


def test_d9_noise_predictions_are_the_weight_sigma():
    """Of noise predictions pseudo-Huber c = .5 gives (.127061, .176587); L2 is sigma^2 times the scores'."""
    def of_noise(distance, c):
        def loss(x, f, target):
            scores = score(MU, S**2)(x), score(M, 1.0)(x), target
            return di.score_loss(*(-SIGMA * v for v in scores), distance, c)
        return loss

    assert gradients(of_noise("huber", 0.5)) == pytest.approx((0.127061, 0.176587), abs=1e-4)
    l2 = [SIGMA**2 * g for g in gradients(divergence())]
    assert gradients(of_noise("l2", 0)) == pytest.approx(l2, abs=1e-6)


@pytest.mark.parametrize("choice, guided", [(2, 2 + 7.5 * (2 - 1)), (1, 2)])
def test_the_guided_reference_and_the_plain_assistant(choice, guided):
    """Choice 2 guides the reference, by s_c + alpha_cfg (s_c - s_null), never the assistant; choice 1 none.

    The two networks differ, so that neither can stand in for the other.
    """
    def denoiser(output_of):
        net = lambda x, timestep, eps: SimpleNamespace(sample=torch.full_like(x, output_of(eps)))
        return Denoiser(net, NoiseSchedule.from_config({}), "epsilon")

    models = SimpleNamespace(reference=denoiser(lambda eps: eps), assistant=denoiser(lambda eps: 10 * eps**2))
    t = torch.tensor([20, 500, 980])
    f = torch.ones(3, 1, 2, 2) / models.reference.schedule.alpha[t].view(-1, 1, 1, 1)  # x_t = 1
    p = SimpleNamespace(t=t, eps=0 * f, cond=dict(eps=2.0), null=dict(eps=1.0))
    config = di.Config(divergence="kl", alpha_cfg=7.5, cfg_choice=choice)
    losses = di.divergence_losses(f, p, config, models)
    assert losses.pop("L_divergence").item() == pytest.approx(4 * (guided - 40.0))
    assert {name: loss.item() for name, loss in losses.items()} == ({"L_cfg": 4 * 7.5} if choice == 1 else {})


def test_the_assistants_loss_is_least_squares():
    """Its best constant is the mean of eps, not the median."""
    eps = torch.tensor([0.0, 0.0, 0.0, 4.0]).view(4, 1, 1, 1)
    losses = [di.assistant_loss(torch.full_like(eps, c), eps).item() for c in (0.0, 1.0, 2.0)]
    assert losses == pytest.approx([4.0, 3.0, 4.0])


@pytest.mark.parametrize("name", ["score", "kl"])
def test_with_exact_scores_the_student_becomes_the_reference(name):
    mu, s = MU, S
    for _ in range(300):
        step = gradients(divergence(mu=mu, s=s) if name == "score" else kl(mu, s), mu, s, nodes=4)
        mu, s = mu - 0.3 * step[0], s - 0.3 * step[1]
    assert (mu, s) == pytest.approx((M, 1.0), abs=1e-3)
