"""One iteration of SwiftBrush v2 on a tiny pipeline: who is trained by what, and what changes nothing."""

import pytest
import tiny
import torch
from helpers import CAPTIONS, equal, perturb

import swiftbrush_v2 as sb
from common import Denoiser, load
from plumbing.cli import parse_config
from plumbing.run import Run
from plumbing.students import dense_copy, fold_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny models lie."""
    return tiny.save_models(tmp_path_factory.mktemp("models"))


def cast(folder, stage, *more, rows=slice(0, 4), fresh=False):
    """(config, run, models) of a stage; its LoRAs change their networks, if they are not to be fresh."""
    argv = ["--preset", "shapes", "--model", folder / "sd", "--clip", folder / "clip", "--tau", 1,
            "--decoder", folder / "tae", "--regularise", "pairs", "--prediction", "epsilon", "--stage", stage,
            "--batch-size", 4, "--rank", 4, "--alpha", 8, "--rank-b", 4, "--alpha-b", 8, "--clip-norm", "inf",
            "--device", "cpu", "--out", "unused", *more]
    config = parse_config(sb.Config, sb.PRESETS, [str(a) for a in argv], "")
    run = Run(config)
    if rows != run.rows:  # those of one process among several
        run.rows, run.micro_batches = rows, [slice(0, rows.stop - rows.start)]
    models = sb.build(config, run, stage)
    torch.manual_seed(1)
    if config.regularise:
        models.loaded.pairs = *torch.randn(2, 5, *models.loaded.codec.shape), [*CAPTIONS, "a"]
    for denoiser in (models.student, models.lora_teacher):
        if denoiser.adapter and not fresh:
            perturb(denoiser.trainable())
    return config, run, models


def step(config, run, models):
    return sb.train_step(0, CAPTIONS[run.rows], config, run, models)


def gradients(folder, stage, *more, **options):
    """Those of the student and of the LoRA teacher after one iteration."""
    config, run, models = cast(folder, stage, *more, **options)
    step(config, run, models)
    return {role: {name: p.grad for name, p in denoiser.trainable().items()}
            for role, denoiser in (("student", models.student), ("LoRA teacher", models.lora_teacher))}


@pytest.fixture(scope="module")
def plain(folder):
    """stage -> its gradients without any of the flags that change nothing."""
    return {stage: gradients(folder, stage) for stage in "ab"}


def test_s5_a_fresh_lora_teacher_is_the_teacher(folder):
    """To the bit, as the teacher is itself beside any LoRA teacher; the LoRA folded in predicts the same."""
    teacher, codec = load(folder / "sd")
    original = {name: p.clone() for name, p in teacher.net.state_dict().items()}
    x_t, t, cond = torch.randn(2, *codec.shape), torch.tensor([20, 980]), codec.cond(CAPTIONS[:2])
    before = teacher.predict(x_t, t, "epsilon", cond)
    lora_teacher = teacher.with_lora("lora_teacher", 4, 8)
    assert torch.equal(teacher.predict(x_t, t, "epsilon", cond), before)
    assert torch.equal(lora_teacher.predict(x_t, t, "epsilon", cond), before)
    perturb(lora_teacher.trainable())
    changed = lora_teacher.predict(x_t, t, "epsilon", cond)
    assert (changed - before).abs().max() > 0.1
    assert torch.equal(teacher.predict(x_t, t, "epsilon", cond), before)
    folded = dense_copy(teacher.net, fold_lora(teacher.net, "lora_teacher"), "cpu")
    found = Denoiser(folded, teacher.schedule, "epsilon").predict(x_t, t, "epsilon", cond)
    torch.testing.assert_close(found, changed, atol=1e-5, rtol=1e-4)
    assert equal(dict(fold_lora(teacher.net, None)), original)


def test_s5_so_the_first_step_moves_no_student(folder):
    """With a fresh LoRA teacher and nothing but VSD the student's gradient is 0, to the bit."""
    config, run, models = cast(folder, "a", "--regularise", "", fresh=True)
    losses = step(config, run, models)
    assert losses["L_vsd"] == 0 and not any(p.grad.any() for p in models.student.trainable().values())
    assert all(p.grad is not None for p in models.lora_teacher.trainable().values())


@pytest.mark.parametrize("stage", ["a", "b"])
def test_who_moves_whom(folder, stage):
    """Each update sees and moves its own weights alone; the frozen ones stay as they were."""
    config, run, models = cast(folder, stage)
    student, lora_teacher = models.student.trainable(), models.lora_teacher.trainable()
    nets = dict(student=models.student.net, teacher=models.teacher.net)
    before = {name: {key: p.clone() for key, p in net.named_parameters()} for name, net in nets.items()}
    seen, update = {}, models.optimizer.step

    def update_student():
        seen.update({name: p.grad.clone() for name, p in student.items()})
        assert all(p.grad is None for p in lora_teacher.values())
        update()

    models.optimizer.step = update_student
    step(config, run, models)
    assert equal(seen, {name: p.grad for name, p in student.items()}), "the LoRA teacher's loss adds nothing"
    own = {"student": set(map(id, student.values())), "LoRA teacher": set(map(id, lora_teacher.values()))}
    assert len(own["student"]) == len(student) > 0 and own["student"].isdisjoint(own["LoRA teacher"])
    trained = own["student"] | own["LoRA teacher"]
    for name, net in nets.items():
        for key, p in net.named_parameters():
            assert (p.grad is not None) == (id(p) in trained), key
            assert (not torch.equal(p, before[name][key])) == (id(p) in trained and bool(p.grad.any())), key
    assert models.ema.average.keys() == student.keys()


@pytest.mark.parametrize("stage", ["a", "b"])
def test_checkpointing_changes_nothing(folder, plain, stage):
    """All losses take part; in b three Denoisers of one net are recomputed, each with its own adapter."""
    found = gradients(folder, stage, "--gradient-checkpointing")
    torch.testing.assert_close(found, plain[stage], atol=1e-6, rtol=1e-4)


def test_two_halves_of_a_batch_have_its_mean_gradient(folder, plain):
    """Two processes draw noise and pairs as one, each for its rows, and the mean of both is the whole."""
    halves = [gradients(folder, "b", rows=rows) for rows in (slice(0, 2), slice(2, 4))]
    mean = {role: {name: (g + halves[1][role][name]) / 2 for name, g in gradient.items()}
            for role, gradient in halves[0].items()}
    torch.testing.assert_close(mean, plain["b"], atol=1e-6, rtol=1e-4)


def test_each_network_is_called_as_often_as_needed(folder):
    """The student once; the teacher's net twice as each of the guided teachers, and three times to learn."""
    config, run, models = cast(folder, "a", "--regularise", "", "--score-updates", 3)
    calls = dict(student=0, teacher=0)
    for name, net in (("student", models.student.net), ("teacher", models.teacher.net)):
        net.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    step(config, run, models)
    assert calls == dict(student=1, teacher=4 + 3)
