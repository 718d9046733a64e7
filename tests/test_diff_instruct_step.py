"""One iteration of Diff-Instruct* on a tiny pipeline: who is trained by what, and what changes nothing."""

import pytest
import tiny
import torch
from helpers import CAPTIONS, equal, perturb

import diff_instruct_star as di
from common import chunks_of, one_step
from plumbing.cli import parse_config
from plumbing.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny models lie."""
    return tiny.save_models(tmp_path_factory.mktemp("models"))


def cast(folder, *more, rows=slice(0, 4)):
    """(config, run, models) of an iteration with the reward; the assistant differs from the reference."""
    argv = ["--preset", "shapes", "--model", folder / "sd", "--reward", folder / "clip",
            "--probe", folder / "judge", "--decoder", folder / "tae", "--prediction", "epsilon",
            "--batch-size", 4, "--rank", 4, "--alpha", 8, "--clip-norm", "inf", "--warmup", 0,
            "--assistant-warmup", 0, "--lr-assistant", 1e-30, "--device", "cpu", "--out", "unused", *more]
    config = parse_config(di.Config, di.PRESETS, [str(a) for a in argv], "")
    run = Run(config)
    if rows != run.rows:  # those of one process among several
        run.rows, run.micro_batches = rows, [slice(0, rows.stop - rows.start)]
    models = di.build(config, run)
    torch.manual_seed(1)
    perturb(models.assistant.trainable(), 0.05)
    return config, run, models


def step(config, run, models):
    return di.train_step(0, CAPTIONS[run.rows], config, run, models)


def gradients(folder, *more, **options):
    """Those of the student and of the assistant after one iteration."""
    config, run, models = cast(folder, *more, **options)
    step(config, run, models)
    return {role: {name: p.grad for name, p in denoiser.trainable().items()}
            for role, denoiser in (("student", models.student), ("assistant", models.assistant))}


@pytest.fixture(scope="module")
def plain(folder):
    """kind of assistant -> the gradients without any of the flags that change nothing."""
    return {kind: gradients(folder, "--assistant", kind) for kind in ("full", "lora")}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("divergence", ["score", "kl"])
def test_d10_who_moves_whom(folder, kind, divergence):
    """Each update sees and moves its own weights alone; the reference's get no gradient and stay."""
    more = ["--assistant", kind, "--divergence", divergence, "--lr-assistant", 1e-3]
    config, run, models = cast(folder, *more)
    student, assistant = models.student.trainable(), models.assistant.trainable()
    nets = dict(student=models.student.net, reference=models.reference.net, assistant=models.assistant.net)
    before = {name: {key: p.clone() for key, p in net.named_parameters()} for name, net in nets.items()}
    seen, update = {}, models.optimizer_assistant.step

    def update_assistant():
        seen.update({name: p.grad.clone() for name, p in assistant.items()})
        assert all(p.grad is None for p in student.values())
        update()

    models.optimizer_assistant.step = update_assistant
    step(config, run, models)
    assert equal(seen, {name: p.grad for name, p in assistant.items()}), "the student's loss adds nothing"
    assert all(p.requires_grad for p in (*student.values(), *assistant.values()))
    own = {"student": set(map(id, student.values())), "assistant": set(map(id, assistant.values()))}
    assert len(own["student"]) == len(student) > 0 and own["student"].isdisjoint(own["assistant"])
    trained = own["student"] | own["assistant"]
    for name, net in nets.items():
        for key, p in net.named_parameters():
            assert (p.grad is not None) == (id(p) in trained), key
            assert (not torch.equal(p, before[name][key])) == (id(p) in trained and bool(p.grad.any())), key


def plain_step(config, run, models):
    """The student's part of train_step in one loss and one backward pass."""
    draw, codec = run.draws(0), models.codec
    part, = run.split(z=draw.randn(*codec.shape), t=draw.randint(config.t_min, config.t_max + 1),
                      eps=draw.randn(*codec.shape), cond=codec.cond(CAPTIONS), null=models.null)
    models.assistant.net.requires_grad_(False)
    f = one_step(models.student, part.z, part.cond)
    x_t = models.reference.schedule.add_noise(f, part.eps, part.t)
    losses = di.divergence_losses(x_t, part, config, models)
    rewards = di.rewards_of(f, CAPTIONS, models.decode, models.scorers)
    (sum(losses.values()) + di.reward_loss(rewards["reward"], config.alpha_rew)).backward()


def peak_of_saved_tensors(function, *arguments):
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
        function(*arguments)
    return peak


def test_the_leaf_trick_changes_memory_and_nothing_else(folder):
    """Divergence and reward each go back to f on their own, so that their graphs are never held together."""
    ours, theirs = cast(folder), cast(folder)
    peaks = peak_of_saved_tensors(step, *ours), peak_of_saved_tensors(plain_step, *theirs)
    found, expected = (torch.cat([p.grad.flatten() for p in models.student.trainable().values()])
                       for *_, models in (ours, theirs))
    assert (found - expected).norm() < 1e-6 * expected.norm() and expected.norm() > 0
    assert peaks[0] < 0.9 * peaks[1], peaks


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointing_changes_nothing(folder, plain, kind):
    found = gradients(folder, "--gradient-checkpointing", "--assistant", kind)
    torch.testing.assert_close(found, plain[kind], atol=1e-6, rtol=1e-4)


def test_two_halves_of_a_batch_have_its_mean_gradient(folder, plain):
    """Two processes draw noise as one, each for its rows, and the mean of both is the whole."""
    halves = [gradients(folder, rows=rows) for rows in (slice(0, 2), slice(2, 4))]
    mean = {role: {name: (g + halves[1][role][name]) / 2 for name, g in gradient.items()}
            for role, gradient in halves[0].items()}
    torch.testing.assert_close(mean, plain["full"], atol=1e-6, rtol=1e-4)


def test_each_network_is_called_as_often_as_needed(folder):
    """Student and assistant once, the reference with and without prompt; and K_TA = 2 updates before."""
    config, run, models = cast(folder, "--score-updates", 2)
    calls = dict(student=0, assistant=0, reference=0)
    for name in calls:
        net = getattr(models, name).net
        net.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    step(config, run, models)
    assert calls == dict(student=1 + 2, assistant=1 + 2, reference=2)


def test_the_probe_has_no_graph(folder):
    """It is only logged; nor has the reward one where none is asked for."""
    _, _, models = cast(folder)
    f = torch.randn(4, *models.codec.shape, requires_grad=True)
    rewards = di.rewards_of(f, CAPTIONS, models.decode, models.scorers)
    assert {name: value.requires_grad for name, value in rewards.items()} == dict(reward=True, probe=False)
    with torch.no_grad():
        rewards = di.rewards_of(f, CAPTIONS, models.decode, models.scorers)
    assert not any(value.requires_grad for value in rewards.values())


def test_rewards_are_those_of_pictures_and_their_prompts(folder):
    """The mean over the prompts, taken in turn, of one-step pictures."""
    _, _, models = cast(folder)
    found, codec = di.measure_rewards(models, CAPTIONS[:3], num=5), models.codec
    prompts = CAPTIONS[:3] + CAPTIONS[:2]
    (_, z), = chunks_of(prompts, codec, 1)
    pictures = models.decode(one_step(models.student, z, codec.cond(prompts)))
    assert found.keys() == {"reward", "probe"}
    for name, scorer in models.scorers.items():
        expected = scorer(pictures, scorer.texts(prompts)).mean().item()
        assert found[name] == pytest.approx(expected, abs=1e-6)
