"""Diff-Instruct*: closed forms D1-D10 of its losses on one-dimensional Gaussians, and the real command on tiny pipelines."""

import dataclasses
import inspect
import json
import subprocess
import sys
import types

import pytest
import tiny
import torch
from conftest import ROOT
from diffusers import AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file, save_file
from test_run import equal
from test_swiftbrush import ALPHA, MU, SIGMA, A, B, M, S, quadrature

import common
import diff_instruct_star as di
import plumbing.checkpoint
import plumbing.cli
import plumbing.run
from common import Denoiser, UserError, add_lora, load, one_step
from plumbing.students import dense_copy

B_NULL = ALPHA**2 * 4 + SIGMA**2  # the null condition's data are N(0, 4)


def score(mean, variance):
    """The score of x_t where the data are N(mean, variance)."""
    return lambda x: -(x - ALPHA * mean) / (ALPHA**2 * variance + SIGMA**2)


def gradients(loss_of, mu=MU, s=S):
    """d/dmu, d/ds in expectation of loss_of(x_t, f, target), a mean over samples, at f = mu + s z; the target is -eps / sigma.

    As in training, the loss's gradient is taken at a leaf, sample by sample, and carried on to the student.
    """
    mu, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mu, s))
    z, eps, weights = quadrature(200)
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
    """(2 alpha^2 (mu - m) / AB, 4 alpha^2 s (A - B) / A^2 B), which is E d'(y) d_theta s_theta; the loss itself is 0."""
    expected = 2 * ALPHA**2 * (MU - M) / (A * B), 4 * ALPHA**2 * S * (A - B) / (A**2 * B)
    assert expected == pytest.approx((0.568889, 0.948148), abs=1e-6)
    assert gradients(divergence()) == pytest.approx(expected, abs=1e-6)
    z, eps, weights = quadrature()
    x = ALPHA * (MU + S * z) + SIGMA * eps
    direct = (2 * (score(MU, S**2)(x) - score(M, 1.0)(x)) * ALPHA / A * weights).sum()
    assert direct.item() == pytest.approx(expected[0], abs=1e-6)
    values = torch.vmap(lambda x, eps: divergence()(x[None], None, -eps[None] / SIGMA))(x, eps)
    assert (values.view(-1) * weights.view(-1)).sum().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("wrong, expected", [
    (("distance_gradient(assistant - reference,", "distance_gradient((assistant - reference).detach(),"), (0.568889, 0.474074)),
    (("(u * (assistant - target))", "(u * (assistant.detach() - target))"), (0.0, 0.474074)),
    (("-(u *", "(u *"), (-0.568889, -0.948148))], ids=["d' detached", "second bracket detached", "sign"])
def test_d2_wrong_stop_gradients_are_caught(wrong, expected):
    """A copy of the loss with one wrong detach or sign has the gradient that it must not have."""
    source = inspect.getsource(di.score_loss)
    assert source.count(wrong[0]) == 1
    broken = dict(vars(di))
    exec(source.replace(*wrong), broken)
    found = gradients(divergence(loss=broken["score_loss"]))
    assert found == pytest.approx(expected, abs=1e-4) and found != pytest.approx(gradients(divergence()), abs=1e-2)


@pytest.mark.parametrize("c, detach, expected", [
    (0.5, False, (0.255089, 0.329574)), (1.0, False, (0.193722, 0.276527)), (10.0, False, (0.0282381, 0.0468755)),
    (0.5, True, (0.255089, 0.462418)), (1.0, True, (0.193722, 0.329730))])
def test_d3_pseudo_huber(c, detach, expected):
    assert gradients(divergence("huber", c, detach)) == pytest.approx(expected, abs=1e-4)


def test_pseudo_huber_normalises_whole_samples():
    y = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    distance = ((y.square().sum((1, 2, 3)) + 0.7**2).sqrt() - 0.7).sum()
    torch.testing.assert_close(di.distance_gradient(y, "huber", 0.7), torch.autograd.grad(distance, y)[0])
    assert di.distance_gradient(1e3 * y, "huber", 0.7).flatten(1).norm(dim=1).max() <= 1, "bounded for any distance"


def test_d4_a_bounded_pull_and_its_equilibrium_with_a_linear_reward():
    """At s = 1, mu = m + D: alpha^2 D / sqrt(alpha^2 D^2 + c^2); reward .3 x balances it at D = .252825."""
    g, c, D = 0.3, 0.5, 0.252825
    pull = gradients(divergence("huber", c, mu=M + D, s=1.0), M + D, 1.0)[0]
    assert pull == pytest.approx(ALPHA**2 * D / (ALPHA**2 * D**2 + c**2)**0.5, abs=1e-6)
    with_reward = gradients(lambda x, f, target: divergence("huber", c, mu=M + D, s=1.0)(x, f, target) + di.reward_loss(g * f, 1.0),
                            M + D, 1.0)
    assert with_reward[0] == pytest.approx(0, abs=1e-5)
    assert gradients(divergence("huber", c, mu=M + 1e4, s=1.0), M + 1e4, 1.0)[0] == pytest.approx(ALPHA, abs=1e-4)


def test_d5_it_is_not_the_on_policy_fisher_gradient():
    """(2 alpha^2 (mu - m) / B^2, 2 alpha^2 s (1/B^2 - 1/A^2)) = D1 + the gradient of E y(x_t)^2 with both scores frozen."""
    total = 2 * ALPHA**2 * (MU - M) / B**2, 2 * ALPHA**2 * S * (1 / B**2 - 1 / A**2)
    assert total == pytest.approx((1.024, 1.327407), abs=1e-6)
    rest = gradients(lambda x, f, target: (score(MU, S**2)(x) - score(M, 1.0)(x)).square().mean())
    assert [a + b for a, b in zip(gradients(divergence()), rest)] == pytest.approx(total, abs=1e-6)


def kl(mu, s, reward=lambda f: 0 * f, alpha_rew=1.0):
    """Diff-Instruct's loss (weight 1: noise predictions of minus the scores) with a reward."""
    return lambda x, f, target: di.kl_loss(x, -score(mu, s**2)(x), -score(M, 1.0)(x)) + di.reward_loss(reward(f), alpha_rew)


def test_d6_where_rewards_come_to_rest():
    """KL and L2 with a linear reward move the mean alone; a quadratic reward under KL shrinks the variance too."""
    assert gradients(kl(MU, S)) == pytest.approx((0.512, 0.426667), abs=1e-6)
    g = 0.3
    mu = M + g * B / ALPHA**2
    assert mu == pytest.approx(0.16875) and gradients(kl(mu, 1.0, lambda f: g * f), mu, 1.0) == pytest.approx((0, 0), abs=1e-6)
    mu = M + g * B**2 / (2 * ALPHA**2)
    found = gradients(lambda x, f, target: divergence(mu=mu, s=1.0)(x, f, target) + di.reward_loss(g * f, 1.0), mu, 1.0)
    assert mu == pytest.approx(-0.065625) and found == pytest.approx((0, 0), abs=1e-6)
    variance = (1 / (1 / B + 0.5 / ALPHA**2) - SIGMA**2) / ALPHA**2
    mu = (0.5 * 2 + ALPHA**2 * M / B) / (0.5 + ALPHA**2 / B)
    assert (mu, ALPHA**2 * variance + SIGMA**2) == pytest.approx((0.708772, 0.561404), abs=1e-6)
    found = gradients(kl(mu, variance**0.5, lambda f: -(f - 2).square() / 2, 0.5), mu, variance**0.5)
    assert found == pytest.approx((0, 0), abs=1e-6)


def test_d7_guidance_as_a_reward_pulls_towards_the_condition():
    """Choice 1 with the corrected sign: alpha^2 [(mu - m) / B_c - mu / B_0] = .402411; the printed sign gives its negative."""
    found = gradients(lambda x, f, target: di.cfg_loss(x, -score(M, 1.0)(x), -score(0.0, 4.0)(x), 1.0))
    expected = ALPHA**2 * ((MU - M) / B - MU / B_NULL), ALPHA**2 * S * (1 / B - 1 / B_NULL)
    assert expected == pytest.approx((0.402411, 0.631233), abs=1e-6) and found == pytest.approx(expected, abs=1e-6)


def test_d8_for_kl_both_choices_of_guidance_are_the_same():
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    assistant, conditional, null = torch.randn(3, 4, 4, 8, 8, dtype=torch.float64)
    first = di.kl_loss(x, assistant, conditional) + di.cfg_loss(x, conditional, null, 7.5)
    second = di.kl_loss(x, assistant, conditional + 7.5 * (conditional - null))
    torch.testing.assert_close(torch.autograd.grad(first, x)[0], torch.autograd.grad(second, x)[0], atol=1e-14, rtol=1e-12)


def test_d9_noise_predictions_are_the_weight_sigma():
    """The same loss of noise predictions: pseudo-Huber c = .5 gives (.127061, .176587); L2 is sigma^2 times the scores'."""
    def of_noise(distance, c):
        return lambda x, f, target: di.score_loss(*(-SIGMA * v for v in (score(MU, S**2)(x), score(M, 1.0)(x), target)), distance, c)
    assert gradients(of_noise("huber", 0.5)) == pytest.approx((0.127061, 0.176587), abs=1e-4)
    assert gradients(of_noise("l2", 0)) == pytest.approx([SIGMA**2 * g for g in gradients(divergence())], abs=1e-6)


def test_the_guided_reference_and_the_plain_assistant():
    """Choice 2: the reference is s_c + alpha_cfg (s_c - s_null), the assistant s_c alone; choice 1 leaves the reference unguided."""
    net = lambda x, timestep, eps: types.SimpleNamespace(sample=torch.full_like(x, eps))
    schedule = common.NoiseSchedule.from_config({})
    reference, assistant = (Denoiser(net, schedule, "epsilon") for _ in range(2))
    x_t, t = torch.ones(3, 1, 2, 2), torch.tensor([20, 500, 980])
    for choice, guided in ((2, 2 + 7.5 * (2 - 1)), (1, 2)):
        config = di.Config(divergence="kl", alpha_cfg=7.5, cfg_choice=choice)
        losses = di.divergence_losses(x_t, t, torch.zeros_like(x_t), dict(eps=2.0), dict(eps=1.0), config, reference, assistant)
        assert losses["L_divergence"].item() == pytest.approx(4 * (guided - 2.0))
        assert losses.get("L_cfg", torch.tensor(0.0)).item() == pytest.approx(4 * 7.5 if choice == 1 else 0)


def test_the_assistants_loss_is_least_squares():
    """Its best constant is the mean of eps, not the median."""
    eps = torch.tensor([0.0, 0.0, 0.0, 4.0]).view(4, 1, 1, 1)
    losses = [di.assistant_loss(torch.full_like(eps, c), eps).item() for c in (0.0, 1.0, 2.0)]
    assert losses == pytest.approx([4.0, 3.0, 4.0])


@pytest.mark.parametrize("name", ["score", "kl"])
def test_with_exact_scores_the_student_becomes_the_reference(name):
    mu, s = MU, S
    for _ in range(300):
        step = gradients(divergence(mu=mu, s=s) if name == "score" else kl(mu, s), mu, s)
        mu, s = mu - 0.3 * step[0], s - 0.3 * step[1]
    assert (mu, s) == pytest.approx((M, 1.0), abs=1e-3)


# The command

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny SD pipeline, two CLIPModels and an AutoencoderTiny."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny.sd().save_pretrained(root / "sd")
    for name in ("clip", "judge"):
        clip, processor = tiny.clip()
        clip.save_pretrained(root / name), processor.save_pretrained(root / name)
    tiny.vae(tiny=True).save_pretrained(root / "tae")
    return root


def flags(models, out, *more):
    return ["--preset", "shapes", "--model", models / "sd", "--reward", models / "clip", "--probe", models / "judge", "--decoder", models / "tae",
            "--out", out, "--iterations", 2, "--warmup", 1, "--assistant-warmup", 1, "--convert-iterations", 2, "--batch-size", 4, "--rank", 4,
            "--alpha", 8, "--device", "cpu", "--log-every", 1, "--save-every", 2, "--sample-every", 4, *more]


def run(arguments):
    di.main([str(a) for a in arguments])


def weights(folder):
    return load(folder)[0].net.state_dict()


def state(out):
    return plumbing.checkpoint.read_checkpoint(out / "checkpoint")["state"]


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "all"
    with pytest.MonkeyPatch.context() as patched:
        seen = []
        patched.setattr(di, "load_teacher", lambda model, dataset, device: seen.append(load(model, device)) or seen[0])
        run(flags(models, out))
    assert equal(seen[0][0].net.state_dict(), weights(models / "sd")), "the reference is as it was"
    return out


def test_the_run(models, finished, capsys):
    """Conversion, warm-ups, reward: what is logged when, and the export in diffusers alone."""
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert ["L_divergence" in row for row in rows] == [False, True, True, True]
    assert ["grad_reward" in row for row in rows] == [False, False, True, True]
    assert all("reward" in row and "probe" in row for row in rows[1:]) and all("L_assistant" in row for row in rows)
    start, student = weights(finished / "start" / "pipeline"), weights(finished / "pipeline")
    assert any(not torch.equal(start[k], v) for k, v in student.items())
    pipe = DiffusionPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    denoiser, codec = load(finished / "pipeline")
    z, y = torch.randn(2, *codec.shape), ["a large red circle on white", "a small blue square on black"]
    theirs = pipe(y, latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(one_step(denoiser, z, codec.cond(y)), theirs, atol=1e-4, rtol=1e-4)
    assert (finished / "comparison.png").exists() and (finished / "samples" / "0000004.png").exists()


def build(models, *more, seed=1):
    """What one update needs, with an assistant that is not the reference: a dict of student_step's arguments, and of the networks."""
    config = plumbing.cli.parse_config(di.Config, di.PRESETS, [str(f) for f in flags(models, "unused", "--prediction", "epsilon", *more)], "")
    reference, codec = load(models / "sd")
    torch.manual_seed(seed)
    net = dense_copy(reference.net, reference.net.state_dict(), "cpu").requires_grad_(True)
    student = Denoiser(net, reference.schedule, "epsilon")
    if config.assistant == "full":
        copy = dense_copy(reference.net, reference.net.state_dict(), "cpu").requires_grad_(True)
        assistant, psi = Denoiser(copy, reference.schedule, "epsilon"), common.Weights(copy.named_parameters())
    else:
        assistant = Denoiser(reference.net, reference.schedule, "epsilon", "assistant")
        psi = add_lora(reference.net, "assistant", 4, 8)
    with torch.no_grad():
        for p in psi.values():
            p.add_(0.05 * torch.randn_like(p))
    if config.gradient_checkpointing:
        for network in {net, reference.net, assistant.net}:
            common.enable_checkpointing(network)
    y, none = ["a red circle", "a blue square", "a", "on white"], torch.optim.SGD([torch.zeros(1)], 1.0)
    scorers = {name: common.load_scorer(getattr(config, name)) for name in ("reward", "probe")}
    theta, cond = common.Weights(net.named_parameters()), codec.cond(y)
    step = dict(iteration=0, prompts=y, cond=cond, null=codec.null(4), run=plumbing.run.Run(config), config=config, shape=codec.shape, student=student,
                reference=reference, assistant=assistant, rewards_of=di.make_rewards(codec.decode, scorers), alpha_rew=config.alpha_rew,
                parameters=theta, frozen=psi.values(), optimizer=none)
    return step, dict(theta=theta, psi=psi, reference=reference, student=student, assistant=assistant, codec=codec, cond=cond, none=none)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("divergence", ["score", "kl"])
def test_d10_who_moves_whom(models, kind, divergence):
    """The student's step gives gradients to the student alone, the assistant's to the assistant alone, the reference gets none."""
    step, nets = build(models, "--assistant", kind, "--divergence", divergence)
    di.student_step(**step)
    assert all(p.grad is not None for p in nets["theta"].values()) and all(p.grad is None for p in nets["psi"].values())
    assert all(p.requires_grad for p in nets["psi"].values())
    for p in nets["theta"].values():
        p.grad = None
    di.assistant_step(0, 0, nets["cond"], step["run"], step["config"], step["shape"], nets["student"], nets["assistant"], nets["psi"],
                      nets["none"])
    assert all(p.grad is not None for p in nets["psi"].values()) and all(p.grad is None for p in nets["theta"].values())
    assert all(p.grad is None for name, p in nets["reference"].net.named_parameters() if name not in nets["psi"] or kind == "full")


def plain_step(step):
    """student_step's gradient without the leaf: one loss, one backward pass."""
    config, draw = step["config"], step["run"].draws((step["config"].assistant_steps + 1) * step["iteration"])
    z, t, eps = draw.randn(*step["shape"]), draw.randint(config.t_min, config.t_max + 1), draw.randn(*step["shape"])
    for p in step["frozen"]:
        p.requires_grad_(False)
    f = one_step(step["student"], z, step["cond"])
    x_t = step["reference"].schedule.add_noise(f, eps, t)
    losses = di.divergence_losses(x_t, t, eps, step["cond"], step["null"], config, step["reference"], step["assistant"])
    reward = di.reward_loss(step["rewards_of"](f, step["prompts"])["reward"], config.alpha_rew)
    (sum(losses.values()) + reward).backward()


def peak_of_saved_tensors(function):
    """The most bytes that autograd held for backward passes at one time."""
    held, peak = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal held, peak
            self.tensor, self.size = tensor, tensor.nbytes
            held += self.size
            peak = max(peak, held)

        def __del__(self):
            nonlocal held
            held -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        function()
    return peak


@pytest.mark.parametrize("more", [[], ["--divergence", "kl"], ["--cfg-choice", 1], ["--distance", "l2", "--assistant", "lora"]],
                         ids=["score", "kl", "choice 1", "l2, lora"])
def test_the_leaf_trick_changes_memory_and_nothing_else(models, more):
    more = [*more, "--clip-norm", 1e9]
    (first, nets), (second, plain) = build(models, *more), build(models, *more)
    peaks = peak_of_saved_tensors(lambda: di.student_step(**first)), peak_of_saved_tensors(lambda: plain_step(second))
    found, expected = (torch.cat([p.grad.flatten() for p in n["theta"].values()]) for n in (nets, plain))
    assert (found - expected).norm() < 1e-6 * expected.norm() and expected.norm() > 0
    assert peaks[0] < peaks[1], peaks


@pytest.mark.parametrize("more", [["--micro-batch", 2], ["--gradient-checkpointing"], ["--gradient-checkpointing", "--assistant", "lora"]],
                         ids=["micro-batches", "checkpointing", "checkpointing, lora"])
def test_memory_flags_change_nothing(models, more):
    gradients = []
    for flags_of in (more, [m for m in more if m in ("--assistant", "lora")]):
        step, nets = build(models, *flags_of)
        di.student_step(**step)
        di.assistant_step(0, 0, nets["cond"], step["run"], step["config"], step["shape"], nets["student"], nets["assistant"], nets["psi"],
                          nets["none"])
        gradients.append([p.grad for p in (*nets["theta"].values(), *nets["psi"].values())])
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_each_network_is_called_as_often_as_needed(models, monkeypatch):
    """Score, choice 2: one pass of student and assistant, two of the reference; every one with the gradient to its input."""
    step, nets = build(models)
    calls = {name: 0 for name in ("student", "assistant", "reference")}
    for name in calls:
        nets[name].net.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    di.student_step(**step)
    assert calls == dict(student=1, assistant=1, reference=2)


def test_two_processes_equal_one(models, tmp_path):
    run(flags(models, tmp_path / "one"))
    command = ["--standalone", "--nproc-per-node", "2", ROOT / "diff_instruct_star.py", *flags(models, tmp_path / "two")]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two, start = state(tmp_path / "one"), state(tmp_path / "two"), weights(tmp_path / "one" / "start" / "pipeline")
    for part, origin in (("student", start), ("assistant", weights(models / "sd"))):
        apart, moved = (torch.cat([(one[part][k] - other[k]).flatten() for k in origin]).norm() for other in (two[part], origin))
        # Not 0: Adam's first steps are as large for a weight whose gradient is rounding as for any other.
        assert apart < 0.02 * moved, (part, apart, moved)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_stopping_and_resuming_is_exact(models, finished, tmp_path, monkeypatch, at):
    """Stopped in the assistant's warm-up, before the reward, or with it: the same command ends with the same weights."""
    finish = plumbing.run.Run.finish_iteration

    def stop(self, iteration, losses):
        if self.out.name == "out" and iteration + 1 == at:
            self.signal = 15
        return finish(self, iteration, losses)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(plumbing.run.Run, "finish_iteration", stop)
        run(flags(models, tmp_path / "out"))
    run(flags(models, tmp_path / "out"))
    assert equal(state(tmp_path / "out"), state(finished))
    assert equal(load_file(tmp_path / "out" / "before.safetensors"), load_file(finished / "before.safetensors"))


@pytest.mark.parametrize("kind, divergence", [("full", "score"), ("lora", "kl")])
def test_sdxl_from_a_file_of_weights_at_its_own_timestep(models, tmp_path, kind, divergence):
    """DMD2's way: a bare file of weights, conditioned at 399, bf16; the export starts there in diffusers too."""
    tiny.sdxl().save_pretrained(tmp_path / "pipe")
    start = {k: v + 0.01 * torch.randn_like(v) for k, v in weights(tmp_path / "pipe").items()}
    torch.save(start, tmp_path / "student.bin")
    save_file({k: v.contiguous() for k, v in start.items()}, tmp_path / "student.safetensors")
    file = tmp_path / ("student.bin" if kind == "full" else "student.safetensors")
    run([*flags(models, tmp_path / "out"), "--model", tmp_path / "pipe", "--student", file, "--student-timestep", 399, "--precision", "bf16",
         "--prediction", "epsilon", "--assistant", kind, "--divergence", divergence, "--iterations", 3, "--decoder", "", "--lr", 1e-3, "--ema", 0])
    student, codec = load(tmp_path / "out" / "pipeline")
    assert len(student.schedule) == 400 and any(not torch.equal(start[k], v) for k, v in student.net.state_dict().items())
    z, y = torch.randn(2, *codec.shape), ["a large red circle on white", "a small blue square on black"]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    size = codec.picture_size
    theirs = pipe(y, latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="latent", height=size, width=size).images
    torch.testing.assert_close(one_step(student, z, codec.cond(y)), theirs, atol=1e-3, rtol=1e-3)
    full = load(tmp_path / "pipe")[0].schedule
    expected = (z - full.sigma[399] * student.net(z, torch.tensor([399, 399]), **codec.cond(y)).sample) / full.alpha[399]
    torch.testing.assert_close(one_step(student, z, codec.cond(y)), expected, atol=1e-4, rtol=1e-4)


def test_other_backbones_and_pixel_space(models, tmp_path):
    tiny.pixart().save_pretrained(tmp_path / "pixart")
    tiny.pixel(tmp_path / "plain", classes=None)
    tiny.pixel(tmp_path / "classes")
    run([*flags(models, tmp_path / "a"), "--model", tmp_path / "pixart", "--decoder", "", "--prediction", "epsilon", "--assistant", "lora"])
    run([*flags(models, tmp_path / "b"), "--model", tmp_path / "plain", "--preset", "cifar10", "--reward", "", "--probe", ""])
    run([*flags(models, tmp_path / "c"), "--model", tmp_path / "classes", "--decoder", "", "--cfg-choice", 1, "--divergence", "kl"])
    assert load(tmp_path / "c" / "pipeline")[1].classes == ["cat", "dog"]
    assert "reward" not in json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[-1])


def test_where_the_student_starts(models, finished, tmp_path, monkeypatch, capsys):
    """SwiftBrush's run if it is there, without warm-up; a run that is continued keeps the start that it had."""
    monkeypatch.chdir(tmp_path)
    config = di.Config(preset="shapes", warmup=7, assistant_warmup=2, iterations=5, out="out")
    assert (di.resolve_start(config).student, di.resolve_start(config).iterations) == ("", 14)
    (tmp_path / di.SWIFTBRUSH).mkdir(parents=True)
    found = di.resolve_start(config)
    assert (found.student, found.warmup, found.iterations) == (di.SWIFTBRUSH, 0, 7)
    assert di.resolve_start(dataclasses.replace(config, model="other")).student == ""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(dict(student="")))
    assert di.resolve_start(config).student == "" and di.resolve_start(config).warmup == 7
    run([*flags(models, tmp_path / "run"), "--student", finished / "pipeline"])
    assert f"starts from {finished / 'pipeline'}\n" in capsys.readouterr().out


def test_every_logged_key_is_explained_in_the_readme(models, finished, tmp_path):
    run(flags(models, tmp_path, "--cfg-choice", 1))
    keys = {key for out in (finished, tmp_path) for log in out.rglob("metrics.jsonl") for row in log.read_text().splitlines() for key in json.loads(row)}
    assert {"L_divergence", "L_cfg", "L_assistant", "grad_divergence", "grad_reward", "reward", "probe"} <= keys
    readme = (ROOT / "README.md").read_text()
    assert [key for key in keys if f"| `{key}` |" not in readme] == []


def test_sample_command(finished, tmp_path, capsys):
    run(["sample", "--run", finished, "--device", "cpu", "--grid", tmp_path / "grid.png", "--num", 3, "--prompts", "a large red circle on white"])
    assert (tmp_path / "grid.png").exists() and "grid.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="no finished student"):
        run(["sample", "--run", tmp_path])


@pytest.mark.parametrize("arguments, preset", [
    ([], "shapes"), (["--model", "stabilityai/stable-diffusion-xl-base-1.0"], "sdxl"), (["--dataset", "cifar10"], "cifar10")])
def test_a_real_model_does_not_get_the_mini_models_rates(arguments, preset):
    assert plumbing.cli.parse_config(di.Config, di.PRESETS, arguments, "", di.preset_of).preset == preset


def test_wrong_input(models, tmp_path):
    tiny.pixel(tmp_path / "plain", classes=None)
    clip, processor = tiny.clip()
    clip.save_pretrained(tmp_path / "bad"), processor.save_pretrained(tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | dict(projection_dim=20)))
    save_file(dict(a=torch.zeros(1)), tmp_path / "other.safetensors")
    (tmp_path / "broken.bin").write_bytes(b"no weights")
    clip.save_pretrained(tmp_path / "headless"), processor.save_pretrained(tmp_path / "headless")
    weights = load_file(tmp_path / "headless" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "projection.weight" not in k}, tmp_path / "headless" / "model.safetensors", dict(format="pt"))
    tiny.pixel(tmp_path / "without_null")
    (tmp_path / "without_null" / "classes.json").write_text(json.dumps(["cat", "dog", "bird"]))
    AutoencoderTiny(latent_channels=16, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "wide")
    for more, message in ((["--reward", tmp_path / "bad"], "cannot be loaded as a CLIPModel"), (["--alpha-rew", -1], "--alpha-rew -1"),
                          (["--model", tmp_path / "plain"], "no empty condition to guide by"), (["--student-timestep", 1000], "ends at 999"),
                          (["--reward", ""], "needs a --reward"), (["--divergence", "js"], "--divergence js: unknown"),
                          (["--cfg-choice", 3], "--cfg-choice 3: unknown"), (["--assistant-steps", 0], "at least 1"),
                          (["--t-max", 1000], "0 to 999"), (["--student", tmp_path / "other.safetensors"], "not weights of"),
                          (["--student", tmp_path / "broken.bin"], "not weights of"), (["--student", tmp_path / "none.bin"], "not weights of"),
                          (["--iterations", 0], "--iterations 0"), (["--lr-assistant", 0], "--lr-assistant 0"),
                          (["--clip-norm", -1], "--clip-norm -1"), (["--reward", tmp_path / "headless"], "weights are missing"),
                          (["--decoder", tmp_path / "wide"], "--decoder"), (["--decoder", models / "sd" / "vae"], "--decoder"),
                          (["--model", tmp_path / "without_null", "--alpha-rew", 0, "--reward", "", "--probe", ""], "no empty condition"),
                          (["--assistant", "lora", "--lora-targets", "nope"], "--lora-targets nope")):
        with pytest.raises(UserError, match=message):
            run(flags(models, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_in_other_folders(models, tmp_path):
    """A, then B by --resume A, then B alone, then C by --resume B: the pictures and rewards from before travel along."""
    run(flags(models, tmp_path / "whole", "--iterations", 5))
    run(flags(models, tmp_path / "a", "--iterations", 2))
    run(flags(models, tmp_path / "b", "--iterations", 3, "--resume", tmp_path / "a"))
    assert not (tmp_path / "b" / "start").exists(), "what the checkpoint holds is not converted again"
    run(flags(models, tmp_path / "b", "--iterations", 4))
    run(flags(models, tmp_path / "c", "--iterations", 5, "--resume", tmp_path / "b"))
    assert (tmp_path / "c" / "before.safetensors").read_bytes() == (tmp_path / "whole" / "before.safetensors").read_bytes()
    assert equal(weights(tmp_path / "c" / "pipeline"), weights(tmp_path / "whole" / "pipeline"))
    (tmp_path / "c" / "before.safetensors").unlink()
    with pytest.raises(UserError, match="before.safetensors: missing"):
        run(flags(models, tmp_path / "c", "--iterations", 6))
    (tmp_path / "c" / "config.json").write_text("")
    with pytest.raises(UserError, match="not the configuration of a run of this script"):
        run(["sample", "--run", tmp_path / "c"])


def test_rewards_and_reference_do_not_depend_on_the_chunk(models, monkeypatch):
    """Every picture of the comparison starts from the noise of its column, however many are drawn at once."""
    teacher, codec = load(models / "sd")
    for chunk in (1, 3, 64):
        monkeypatch.setattr(common, "chunk_for", lambda codec, chunk=chunk: chunk)
        noise = torch.cat([z for _, z in common.chunks_of(["a"] * 7, codec, 0)])
        monkeypatch.setattr(common, "ddim_sample", lambda teacher, z, *rest: z)
        monkeypatch.setattr(codec, "decode", lambda x0: x0)
        assert torch.equal(common.draw_many_steps(teacher, codec, ["a"] * 7, 25, 2.0), noise.clamp(-1, 1))
