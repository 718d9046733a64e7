"""SwiftBrush v2's formulas against closed forms where all data are one-dimensional Gaussians (helpers.py).

There every score is known, and expectations are sums over quadrature nodes.

S1, S2  the VSD gradient to mu and s is that of sigma^3 / alpha KL(student || teacher)
S3      the surrogate loss has the wanted gradient, to the bit
S4      the LoRA teacher's loss is least at the student's own score
S5      a fresh LoRA teacher is the teacher and gives no gradient (test_swiftbrush_step.py)
S6      guidance of both teachers keeps the teacher's distribution, of the teacher alone sharpens it
S7      the clamped CLIP loss and its weight
S8      the merge of two students, and the one-step student
"""

from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import ALPHA, MU, SIGMA, A, B, M, S, equal, gaussian_denoiser, quadrature

import swiftbrush_v2 as sb
from common import Denoiser, Draws, NoiseSchedule, ddim_sample, one_step


def vsd_gradients(mu, s, eps_teacher, eps_lora_teacher):
    """d/dmu, d/ds of the VSD loss in expectation; the teachers are linear functions of x_t."""
    mu, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mu, s))
    z, eps, weights = quadrature(4)
    f = mu + s * z
    x_t = (ALPHA * f + SIGMA * eps).detach()
    g = sb.vsd_gradient(eps_teacher(x_t), eps_lora_teacher(x_t), SIGMA)
    sb.vsd_loss(f, g * weights * len(weights)).backward()
    return mu.grad.item(), s.grad.item()


def optimal_eps(mean, variance):
    """E[eps | x_t] where the data are N(mean, variance)."""
    return lambda x: SIGMA * (x - ALPHA * mean) / (ALPHA**2 * variance + SIGMA**2)


def test_s1_s2_the_gradient_descends_the_kl():
    """dKL/dmu = alpha^2 (mu - m) / B = .512 and dKL/ds = alpha^2 s (1/B - 1/A) = .426667, times .27."""
    kl = ALPHA**2 * (MU - M) / B, ALPHA**2 * S * (1 / B - 1 / A)
    assert kl == pytest.approx((0.512, 0.426667), abs=1e-6)
    found = vsd_gradients(MU, S, optimal_eps(M, 1.0), optimal_eps(MU, S**2))
    assert found == pytest.approx((0.13824, 0.1152), abs=1e-6)
    assert found == pytest.approx([SIGMA**3 / ALPHA * g for g in kl], abs=1e-9)


def test_s3_the_surrogate_has_the_wanted_gradient_to_the_bit():
    f, g = torch.randn(4, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 8, 8)
    loss = sb.vsd_loss(f, g)
    loss.backward()
    assert torch.equal(f.grad, g / g.numel())
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item())


def test_s4_the_lora_teacher_learns_the_students_score():
    """The loss over eps(x) = k (x - c) is stationary at k = sigma / A, c = alpha mu, and higher elsewhere."""
    z, eps, weights = quadrature(4)
    x_t = ALPHA * (MU + S * z) + SIGMA * eps
    root = (weights * len(weights)).sqrt()
    loss = lambda k, c: sb.lora_teacher_loss(k * (x_t - c) * root, eps * root)
    k, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (SIGMA / A, ALPHA * MU))
    best = loss(k, c)
    best.backward()
    assert abs(k.grad) < 1e-9 and abs(c.grad) < 1e-9
    for dk, dc in ((0.1, 0), (-0.1, 0), (0, 0.2), (0, -0.2)):
        assert loss(k + dk, c + dc) > best


@pytest.mark.parametrize("both, mean, variance", [(True, 1.0, 1.0), (False, 1.902062, 0.097938)])
def test_s6_guidance_on_both_teachers_or_on_one(both, mean, variance):
    """Prompt y = 1 with pictures N(y, 1), no prompt N(0, 2), w = 4.5: the student rests at mean, variance."""
    w, y = 4.5, 1.0
    guided = lambda conditional, null: lambda x: null(x) + w * (conditional(x) - null(x))
    teacher = guided(optimal_eps(y, 1.0), optimal_eps(0.0, 2.0))
    mu, s = (1.0, 1.0) if both else (0.5, 0.8)
    for _ in range(1 if both else 1000):
        student = optimal_eps(mu, s**2)
        # The student's own distribution without a prompt: the same spread of prompts around it.
        lora_teacher = guided(student, optimal_eps(0.0, s**2 + 1.0)) if both else student
        d_mu, d_s = vsd_gradients(mu, s, teacher, lora_teacher)
        if both:
            assert (d_mu, d_s) == pytest.approx((0, 0), abs=1e-9)
        mu, s = mu - 0.8 * d_mu, s - 0.8 * d_s
    assert (mu, s**2) == pytest.approx((mean, variance), abs=1e-4)


def test_the_student_converges_to_the_teacher():
    """With exact scores, gradient descent ends at the teacher's mean and standard deviation."""
    mu, s = MU, S
    for _ in range(100):
        d_mu, d_s = vsd_gradients(mu, s, optimal_eps(M, 1.0), optimal_eps(mu, s**2))
        mu, s = mu - 2 * d_mu, s - 2 * d_s
    assert (mu, s) == pytest.approx((M, 1.0), abs=1e-4)


def test_s7_the_hinge():
    """No gradient from cosines at or above tau, -1 / batch below; the weight falls from its start to 0."""
    cosine = torch.tensor([0.1, 0.34, 0.35, 0.6], requires_grad=True)
    loss = 0.1 * sb.clamped_loss(cosine, 0.35)
    loss.backward()
    assert cosine.grad.tolist() == pytest.approx([-0.025, -0.025, 0, 0])
    assert loss.item() == pytest.approx(0.1 * (0.25 + 0.01) / 4)
    assert [sb.scheduled_weight(0.1, i, 100) for i in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0])
    assert sb.scheduled_weight(0.1, 99, 100, decay=False) == 0.1


def test_s8_merge_and_one_step():
    """lambda 1 and 0 are A and B to the bit, .25 lies between; with the true eps f is the clean picture."""
    a, b = ({"w": torch.randn(5), "v": torch.randn(2, 2)} for _ in range(2))
    assert equal(sb.merge(a, b, 1.0), a) and equal(sb.merge(a, b, 0.0), b)
    torch.testing.assert_close(sb.merge(a, b, 0.25)["w"], 0.25 * a["w"] + 0.75 * b["w"])
    schedule = NoiseSchedule.from_config(tiny.SD_BETAS)
    x0, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)

    def exact(x, timestep):
        assert timestep.tolist() == [999, 999]
        return SimpleNamespace(sample=eps)

    z = schedule.add_noise(x0, eps, torch.tensor([999, 999]))
    f = one_step(Denoiser(exact, schedule, "epsilon"), z, {})
    torch.testing.assert_close(f, x0, atol=1e-4, rtol=1e-4)


def test_the_guidance_scale_of_each_sample():
    """One flag is one number; two are the ends of a uniform distribution, drawn for every sample."""
    draw = Draws(0, 0, 4000, slice(None), "cpu")
    assert sb.guidance_of(sb.Config(guidance=(4.5,)), draw) == 4.5
    w = sb.guidance_of(sb.Config(guidance=(0.5, 4.0)), draw)
    assert w.shape == (4000, 1, 1, 1) and 0.5 <= w.min() < 0.51 and 3.99 < w.max() <= 4.0
    assert w.mean().item() == pytest.approx(2.25, abs=0.05)


def test_slerp():
    """Halfway between orthogonal noises has their length, the ends are exact, parallel ones are linear."""
    a, b = torch.zeros(1, 4), torch.zeros(1, 4)
    a[0, 0], b[0, 1] = 2.0, 2.0
    torch.testing.assert_close(sb.slerp(a, b, 0.5), (a + b) / 2**0.5)
    torch.testing.assert_close(sb.slerp(a, b, 0.0), a)
    torch.testing.assert_close(sb.slerp(a, b, 1.0), b)
    torch.testing.assert_close(sb.slerp(a, 3 * a, 0.5), 2 * a)


def test_conditions_are_interpolated_token_by_token():
    """Every token keeps its own length; a mask covers both prompts; a label is that of the nearer end."""
    a, b = torch.tensor([[[2.0, 0.0], [0.0, 6.0]]]), torch.tensor([[[0.0, 2.0], [6.0, 0.0]]])
    torch.testing.assert_close(sb.slerp_tokens(a, b, 0.5).norm(dim=-1), torch.tensor([[2.0, 6.0]]))
    mask = sb.slerp_tokens(torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]]), 0.9)
    assert mask.tolist() == [[1, 1, 0]]
    labels = torch.tensor([3]), torch.tensor([8])
    assert [sb.slerp_tokens(*labels, u).item() for u in (0.1, 0.9)] == [3, 8]


def test_ddim_inversion_leads_back():
    """Exact eps of data N(0, .25): inversion and DDIM give the data back, more closely with more steps."""
    teacher = gaussian_denoiser(NoiseSchedule.from_config(tiny.SD_BETAS), 0.25)
    data = 0.5 * torch.randn(4, 4, 8, 8)
    noise = [sb.ddim_invert(teacher, data, steps, {}) for steps in (25, 100)]
    errors = [(ddim_sample(teacher, z, steps, {}) - data).abs().mean() for z, steps in zip(noise, (25, 100))]
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.02
    assert noise[1].std().item() == pytest.approx(1, abs=0.05)
