"""Runs: one update, the log, signals, several processes, and all that a run from scratch leaves behind."""

import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline
from helpers import (
    ROOT,
    TINY,
    equal,
    fails,
    finish,
    forking,
    metrics,
    ranks,
    start,
    state,
    tiny_config,
    torchrun,
    unexplained,
)
from PIL import Image

import plumbing.run
import yoso
from common import Draws, UserError
from plumbing.checkpoint import latest_checkpoint, read_checkpoint
from plumbing.cli import RunFlags, flag
from plumbing.run import Run

ITERATIONS = 10
FLAGS = [*TINY, "--iterations", str(ITERATIONS)]


@dataclass
class Flags(RunFlags):
    """The least that a Run needs."""
    device: str = flag("cpu", "where", "run")
    iterations: int = flag(4, "updates")
    batch_size: int = flag(8, "global batch")


def run_of(folder, **changes):
    """A Run that has not begun."""
    return Run(Flags(out=str(folder / "run"), **changes))


# One update

def test_a_batch_is_split_into_rows(tmp_path):
    """Tensors, lists and nested conditions by rows; numbers and None stay."""
    t, cond = torch.arange(8), dict(text=torch.randn(8, 3), added=dict(ids=torch.arange(8), none=None))
    run = run_of(tmp_path, micro_batch=2)
    batches = run.split(t=t, captions=list("abcdefgh"), cond=cond, scale=7.5, nothing=None, bare={})
    assert len(batches) == 4
    for i, batch in enumerate(batches):
        rows = slice(2 * i, 2 * i + 2)
        assert torch.equal(batch.t, t[rows]) and batch.captions == list("abcdefgh")[rows]
        assert equal(batch.cond, dict(text=cond["text"][rows], added=dict(ids=t[rows], none=None)))
        assert (batch.scale, batch.nothing, batch.bare) == (7.5, None, {})
    whole, = run_of(tmp_path).split(t=t, cond=cond)
    assert torch.equal(whole.t, t) and equal(whole.cond, cond)


def layers():
    torch.manual_seed(3)
    return torch.nn.Linear(5, 4), torch.nn.Linear(4, 1)


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("clip_norm", [math.inf, 0.1])
def test_one_update_is_that_of_plain_torch(tmp_path, micro_batch, clip_norm):
    """Adam on the mean over all samples, with the gradient of both groups clipped together; mean scalars."""
    run, x, y = run_of(tmp_path, micro_batch=micro_batch), torch.randn(8, 5), torch.randn(8, 1)
    ours, theirs = layers(), layers()
    groups = lambda nets: [dict(params=net.parameters(), lr=0.1 * i) for i, net in enumerate(nets, 1)]
    optimizers = [torch.optim.Adam(groups(nets)) for nets in (ours, theirs)]

    def loss_of(batch):
        error = (ours[1](ours[0](batch.x).relu()) - batch.y).square()
        return error.mean(), dict(error=error.mean(), x=batch.x.mean())

    for _ in range(2):
        scalars = run.descend(optimizers[0], run.split(x=x, y=y), loss_of, clip_norm)
        optimizers[1].zero_grad()
        loss = (theirs[1](theirs[0](x).relu()) - y).square().mean()
        loss.backward()
        parameters = [p for net in theirs for p in net.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizers[1].step()
        assert norm > 0.1, "there is something to clip"
        assert scalars["error"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert scalars["x"].item() == pytest.approx(x.mean().item(), abs=1e-6)
        assert not any(value.requires_grad for value in scalars.values())
    for a, b in zip(ours, theirs):
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_two_optimisers_do_not_mix(tmp_path):
    """A loss that reaches both networks moves its optimiser's alone; the other's gradient is dropped."""
    run, x = run_of(tmp_path, micro_batch=4), torch.randn(8, 5)
    (first, second), (kept, alone) = layers(), layers()
    optimizers = [torch.optim.SGD(net.parameters(), 0.5) for net in (first, second)]
    run.descend(optimizers[0], run.split(x=x), lambda batch: (second(first(batch.x)).square().mean(), {}))
    assert equal(second.state_dict(), alone.state_dict()) and not equal(first.state_dict(), kept.state_dict())
    assert all(p.grad.abs().sum() > 0 for p in second.parameters()), "the loss has left a gradient there"
    h = first(x).detach()
    run.descend(optimizers[1], run.split(h=h), lambda batch: (second(batch.h).square().mean(), {}))
    loss = alone(h).square().mean()
    for p, q in zip(second.parameters(), torch.autograd.grad(loss, alone.parameters())):
        torch.testing.assert_close(p.grad, q)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_float32_is_rounded_to_tf32_only_where_it_is_asked_for(precision, tmp_path):
    """By convolutions, which torch rounds by default, and by all other products."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "tf32"
    run_of(tmp_path, precision=precision)
    rounded = precision == "tf32"
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (rounded, rounded)


@pytest.mark.parametrize("most, handled", [(4096, 8), (8, 8), (7, 4), (3, 2), (1, 1), (0, 8)])
def test_a_micro_batch_is_the_largest_that_divides_the_samples_of_a_process(tmp_path, most, handled):
    """So a preset's number fits every --batch-size."""
    run = run_of(tmp_path, micro_batch=most)
    assert run.micro_batches == [slice(i, i + handled) for i in range(0, 8, handled)]


def test_networks_run_in_bf16_and_weights_stay_float32(tmp_path):
    run, net, seen = run_of(tmp_path, precision="bf16", micro_batch=4), torch.nn.Linear(5, 1), []

    def loss_of(batch):
        output = net(batch.x)
        seen.append(output.dtype)
        return output.float().square().mean(), {}

    run.descend(torch.optim.SGD(net.parameters(), 0.1), run.split(x=torch.randn(8, 5)), loss_of)
    assert seen == [torch.bfloat16] * 2 and net.weight.dtype == net.weight.grad.dtype == torch.float32


def test_gradients_are_exchanged_in_pieces(monkeypatch):
    """The mean over two ranks, the other's gradients 3 times as large; no piece is far above the limit."""
    pieces = []
    exchange = lambda flat: (pieces.append(len(flat)), flat.mul_(4))
    monkeypatch.setattr(plumbing.run, "EXCHANGED_AT_ONCE", 10)
    sizes = (2, 3), (5,), (0,), (4, 7), (3,), (9,)
    *parameters, without = [torch.zeros(size, requires_grad=True) for size in sizes]
    for i, p in enumerate(parameters):
        p.grad = torch.arange(p.numel()).view(p.shape) + 100.0 * i
    own = [p.grad.clone() for p in parameters]
    Run.average_gradients(SimpleNamespace(world=2, _reduce=exchange), [*parameters, without])
    for p, gradient in zip(parameters, own):
        assert torch.equal(p.grad, 2 * gradient)
    assert without.grad is None and sum(pieces) == 42 and len(pieces) > 2 and max(pieces) <= 10 + 28


def test_random_numbers_are_those_of_the_seed(tmp_path):
    """Those of an iteration for this rank's rows; and those of fresh weights, which follow the Run."""
    run = run_of(tmp_path, seed=5)
    run.rows = slice(4, 8)
    expected = Draws(5, 3, 8, slice(4, 8), "cpu")
    assert torch.equal(run.draws(3).randn(2), expected.randn(2))
    weights = [run_of(tmp_path, seed=seed) and torch.rand(3) for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# Prompts and the log

def test_prompts_come_in_shuffled_passes(tmp_path):
    """Each pass is another order of all of them; a run that starts later goes on in the same order."""
    prompts = [f"prompt {i}" for i in range(12)]
    drawn = list(run_of(tmp_path, iterations=6).prompts(prompts))
    assert [len(batch) for batch in drawn] == [8] * 6
    flat = sum(drawn, [])
    passes = [flat[i:i + 12] for i in range(0, 48, 12)]
    assert all(sorted(order) == sorted(prompts) for order in passes) and len(set(map(tuple, passes))) == 4
    later = run_of(tmp_path, iterations=6)
    later.start = 4
    assert list(later.prompts(prompts)) == drawn[4:]
    assert list(run_of(tmp_path, iterations=6, seed=1).prompts(prompts)) != drawn
    ranks = [run_of(tmp_path, iterations=6) for _ in range(2)]
    for rank, rows in zip(ranks, (slice(0, 4), slice(4, 8))):
        rank.rows = rows
    shares = zip(*(rank.prompts(prompts) for rank in ranks))
    assert [first + second for first, second in shares] == drawn, "two ranks share them out"


def test_the_log_has_means_over_its_iterations(tmp_path):
    """A loss that only some iterations have is averaged over these; a checkpoint ends a line too."""
    run = run_of(tmp_path, iterations=5, log_every=2, save_every=3)
    run.begin(dict(net=torch.nn.Linear(1, 1)))
    for i in range(5):
        losses = dict(L=torch.tensor(float(i))) | (dict(rare=torch.tensor(2.0)) if i == 3 else {})
        assert run.finish_iteration(i, losses) is False
    run.end()
    rows = metrics(run.out)
    assert [(row["iteration"], row["L"]) for row in rows] == [(2, 0.5), (3, 2.0), (4, 3.0), (5, 4.0)]
    assert [row.get("rare") for row in rows] == [None, None, 2.0, None]
    assert all(row["images_per_second"] > 0 and row["peak_memory_gb"] > 0 for row in rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, bad):
    """At the next log line, with the iteration and the name; nothing that it spoiled is saved."""
    honest = yoso.train_step

    def poisoned(iteration, *rest):
        losses = honest(iteration, *rest)
        return losses | dict(L_con=losses["L_con"] + (bad if iteration >= 5 else 0))
    monkeypatch.setattr(yoso, "train_step", poisoned)
    message = r"iteration 6: L_con is not finite.*checkpoint of iteration 4 is kept"
    with pytest.raises(UserError, match=message):
        yoso.train(tiny_config(tmp_path, iterations=12, log_every=100))
    assert read_checkpoint(tmp_path / "checkpoint")["iteration"] == 4


def test_a_loss_that_is_not_finite_in_another_process_stops_this_one(tmp_path, monkeypatch):
    """Both name the first such iteration of all."""
    def exchange(tensor, op=None, group=None):  # with one whose loss was nan in iteration 2
        if op is plumbing.run.dist.ReduceOp.MIN:
            tensor.clamp_(max=2.0)

    run = run_of(tmp_path, log_every=4)
    run.begin(dict(net=torch.nn.Linear(1, 1)))
    run.world = 2
    monkeypatch.setattr(plumbing.run.dist, "all_reduce", exchange)
    with pytest.raises(UserError, match="iteration 2: L is not finite"):
        for i in range(4):
            run.finish_iteration(i, dict(L=torch.tensor(1.0)))
    run.end()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_of_a_part_that_is_not_finite_is_named(tmp_path, bad):
    """Before it is shown, also where nothing is to be saved."""
    run, (first, second) = run_of(tmp_path, sample_every=2), layers()
    run.begin(dict(first=first, second=second))
    draw = lambda: pytest.fail("drawn before the check")
    assert run.finish_iteration(0, {}, draw) is False
    with torch.no_grad():
        second.bias.fill_(bad)
    with pytest.raises(UserError, match="iteration 2: second.bias is not finite.*no checkpoint yet"):
        run.finish_iteration(1, {}, draw)
    run.end()


def test_a_number_that_is_not_finite_in_another_process_stops_this_one(tmp_path, monkeypatch):
    """Here in the second of the numbers that a checkpoint would hold."""
    def exchange(tensor, op=None, group=None):
        if op is plumbing.run.dist.ReduceOp.MIN:
            tensor[1] = 0

    run = run_of(tmp_path, sample_every=2)
    run.begin(dict(net=torch.nn.Linear(1, 1)))
    run.world = 2
    monkeypatch.setattr(plumbing.run.dist, "all_reduce", exchange)
    with pytest.raises(UserError, match="iteration 1: net.bias is not finite"):
        run.check_finite(1)
    run.end()


def test_lines_of_the_log_that_a_run_goes_on_behind(tmp_path, capsys):
    """Damaged ones are dropped and told, except the last one, which a kill has cut short."""
    run = run_of(tmp_path)
    run.make_folder()
    run.start = 4
    good = ['{"iteration": 2}', '{"iteration": 4, "L": 1}']
    bad = ["", "{", "[]", "3", "null", "{}", '{"iteration": "x"}', "[" * 10**5, '{"iteration": 6}', "\ufffd"]
    log = run.out / "metrics.jsonl"
    log.write_text("\n".join([good[0], *bad, good[1], '{"iteration": 6, "L"']))
    run._cut_log()
    assert log.read_text().splitlines() == good
    assert capsys.readouterr().err.count(f"{log}: a damaged line is dropped") == len(bad) - 1
    log.write_text("")
    run._cut_log()
    assert log.read_text() == ""


def test_the_run_waits_after_what_only_the_first_process_does(tmp_path, monkeypatch):
    """Which may take longer than a step: without the time-out of one."""
    waits = []
    run = run_of(tmp_path, iterations=6, log_every=1, sample_every=2, save_every=3)
    exchange = lambda tensor, operation=None, group=None: waits.append("step" if group else "all")
    monkeypatch.setattr(plumbing.run.dist, "all_reduce", exchange)
    monkeypatch.setattr(plumbing.run, "wait_for_first", lambda: waits.append("first"))
    monkeypatch.setattr(plumbing.run.dist, "broadcast", lambda *more: None)
    run.world = 2
    run.steps = "the group of the steps"
    run.begin(dict(net=torch.nn.Linear(1, 1)))
    assert waits == ["all"], "for the checkpoint, the log and the folder"
    for i, shows_or_saves in enumerate((False, True, True, True, False, True)):
        waits.clear()
        run.finish_iteration(i, {}, lambda: torch.zeros(1, 3, 8, 8))
        # After the first, all wait for one another: one that has stopped meanwhile is noticed.
        assert waits[-2:] == (["first", "step"] if shows_or_saves else ["step"] * len(waits[-2:]))
    run.end()


def test_a_run_that_cannot_draw_has_saved(tmp_path):
    """Where there is no memory for the pictures, the next start goes on behind them."""
    def draw():
        raise MemoryError

    run = run_of(tmp_path, sample_every=2, save_every=2)
    run.begin(dict(net=torch.nn.Linear(1, 1)))
    run.finish_iteration(0, {}, draw)
    with pytest.raises(MemoryError):
        run.finish_iteration(1, dict(L=torch.tensor(1.0)), draw)
    run.end()
    assert read_checkpoint(run.checkpoints)["iteration"] == metrics(run.out)[-1]["iteration"] == 2
    assert not (run.out / "samples").exists() and run_of(tmp_path).start == 2


def test_broken_pictures_are_counted_and_not_fatal(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"broken")
    yoso.train(tiny_config(tmp_path / "run", dataset=str(folder), iterations=2))
    assert metrics(tmp_path / "run")[-1]["skipped_pictures"] == 1
    assert re.search(r"skipped.*3\.png \(not a picture\) \(1 so far\)", capsys.readouterr().err)


def test_changed_pictures_are_told(tmp_path, capsys):
    """At the next start, once; not where nothing has changed. So are changed prompts."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(folder / f"{i}.png")
    train = lambda iterations: yoso.train(tiny_config(tmp_path / "run", dataset=str(folder), lr_decay=0.0,
                                                      iterations=iterations))
    told = lambda: capsys.readouterr().err.count(f"--dataset {folder}: changed since iteration")
    train(1)
    train(2)
    assert told() == 0
    Image.new("RGB", (20, 20), (0, 99, 0)).save(folder / "4.png")
    train(3)
    assert told() == 1
    train(4)
    assert told() == 0
    run = run_of(tmp_path / "prompts")
    run.begin({})
    next(run.prompts(["a"] * 9))
    run.save(1)
    run.end()
    for prompts, times in ((["a"] * 9, 0), (["b"] * 9, 1)):
        next(run_of(tmp_path / "prompts").prompts(prompts))
        assert capsys.readouterr().err.count("--prompts: changed since iteration 1") == times


# A whole run from scratch

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    yoso.main([*FLAGS, "--out", str(out)])
    return out


def test_a_run_leaves_what_the_readme_says(finished):
    assert [row["iteration"] for row in metrics(finished)] == list(range(2, ITERATIONS + 1, 2))
    assert json.loads((finished / "config.json").read_text())["channels"] == [8, 16]
    assert {p.name for p in (finished / "samples").iterdir()} == {"final.png", "0000004.png", "0000008.png"}
    assert (finished / "pipeline" / "model_index.json").exists()
    assert latest_checkpoint(finished / "checkpoint").name == f"{ITERATIONS:08d}"
    assert metrics(finished)[0]["L_D"] == pytest.approx(2 * math.log(2), abs=0.02), "D starts undecided"
    assert not unexplained(finished)
    assert (finished / "pipeline" / "checksums.json").exists()


def test_the_same_command_on_a_finished_run_changes_nothing(finished, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and p.suffix != ".png"}
    yoso.main([*FLAGS, "--out", str(finished)])
    assert "done" in capsys.readouterr().out and before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_the_exported_pipeline_gives_our_samples(finished, nfe):
    pipeline = DDPMPipeline.from_pretrained(finished / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    theirs = pipeline(batch_size=3, num_inference_steps=nfe, generator=generator, output_type="pt").images
    sampler, config = yoso.load_sampler(finished)
    draws = torch.Generator().manual_seed(1)
    x_T, *noise = [torch.randn(3, 3, 16, 16, generator=draws) for _ in range(nfe)]
    ours = yoso.sample(sampler.generator, yoso.sampling_levels(config.levels, nfe), x_T, noise, {}, 1.0)
    torch.testing.assert_close(theirs, ours / 2 + 0.5, atol=1e-5, rtol=0)


def test_samples_come_from_the_average(finished):
    saved, sampler = state(finished), yoso.load_sampler(finished)[0]
    assert equal(dict(sampler.generator.net.state_dict()), saved["ema"])
    assert not equal(saved["ema"], saved["generator"])


def test_the_sample_command(finished, tmp_path, monkeypatch, capsys):
    grid = lambda name: str(tmp_path / name)
    for nfe in (1, 4):
        yoso.main(["sample", "--run", str(finished), "--num", "9", "--nfe", str(nfe), "--device", "cpu",
                   "--grid", grid(f"{nfe}.png")])
    one, four = (Image.open(grid(f"{nfe}.png")) for nfe in (1, 4))
    assert one.size == four.size == (8 * 66 + 2, 2 * 66 + 2) and one.tobytes() != four.tobytes()
    refused = lambda *flags: fails(monkeypatch, capsys, yoso, "sample", "--run", *flags)
    assert "config.json: not the configuration of a run" in refused(tmp_path)
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    assert "no checkpoint yet" in refused(tmp_path)
    assert "1 to 4 network calls" in refused(finished, "--nfe", 5)
    assert "trained without captions" in refused(finished, "--prompts", "a cat")
    (tmp_path / "folder").mkdir()
    assert re.search("--grid .*folder: cannot be written", refused(finished, "--grid", grid("folder")))


# Signals

def interrupted(monkeypatch, number, at, out, *more):
    """The run, to which and to whose workers a signal is sent in the middle of iteration `at`."""
    step = yoso.train_step

    def signalling(iteration, *rest):
        if iteration == at:
            workers = multiprocessing.active_children()
            assert len(workers) == ("--workers" in more)
            for pid in (*(worker.pid for worker in workers), os.getpid()):
                os.kill(pid, number)
        return step(iteration, *rest)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(yoso, "train_step", signalling)
        yoso.main([*FLAGS, *more, "--out", str(out)])
    assert stopped.value.code == 128 + number
    assert read_checkpoint(out / "checkpoint")["iteration"] == at + 1, "it has ended its iteration and saved"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_same_weights(finished, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    interrupted(monkeypatch, number, 4, tmp_path / "run")
    assert "the same command continues" in capsys.readouterr().err and signal.getsignal(number) is before
    yoso.main([*FLAGS, "--out", str(tmp_path / "run")])
    assert equal(state(finished), state(tmp_path / "run"))
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [2, 4, 5, 6, 8, 10]


def test_a_killed_run_ends_with_the_same_weights(finished, tmp_path):
    """It gets no chance to save; a log line that was cut short goes."""
    out, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    process = forking().Process(target=yoso.main, args=([*FLAGS, "--out", str(out)],))
    process.start()
    while not log.exists() or '"iteration": 6,' not in log.read_text():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with open(log, "a") as file:
        file.write('{"iteration": 8, "L_D"')
    assert read_checkpoint(out / "checkpoint")["iteration"] in (4, 8)
    yoso.main([*FLAGS, "--out", str(out)])
    assert equal(state(finished), state(out))
    assert [row["iteration"] for row in metrics(out)] == [2, 4, 6, 8, 10]


def test_workers_outlive_a_signal_and_the_run_goes_on_elsewhere(finished, tmp_path, monkeypatch):
    """A signal to the whole group reaches the processes that read pictures too."""
    interrupted(monkeypatch, signal.SIGTERM, 4, tmp_path / "a", "--workers", "1")
    yoso.main([*FLAGS, "--workers", "1", "--out", str(tmp_path / "b"), "--resume", str(tmp_path / "a")])
    assert equal(state(finished), state(tmp_path / "b")), "neither workers nor the folder change the result"


# Several processes

def signalled(out):
    """A run of two processes whose second gets a SIGTERM in iteration 1."""
    step = yoso.train_step

    def signalling(iteration, *rest):
        if iteration == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(iteration, *rest)
    yoso.train_step = signalling
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        yoso.main([*FLAGS, "--out", str(out)])


def test_a_signal_to_one_process_stops_all_at_one_iteration(tmp_path):
    ranks(2, signalled, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoint")["iteration"] == 2


def digest(tensors):
    """Of all bytes of the tensors."""
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def recorded(folder, *argv):
    """yoso.main(argv), which also notes each step's pictures and weights in folder/rank<i>.json."""
    weights, batches, step = [], [], yoso.train_step

    def recording(iteration, pictures, captions, config, run, models):
        networks = lambda: digest([*models.generator.net.parameters(), *models.discriminator.parameters()])
        if not weights:
            weights.append(networks())
        losses = step(iteration, pictures, captions, config, run, models)
        weights.append(networks())
        batches.append(digest([pictures]))
        note = dict(weights=weights, batches=batches, rows=len(pictures))
        (folder / f"rank{run.rank}.json").write_text(json.dumps(note))
        return losses
    yoso.train_step = recording
    yoso.main([*argv])


def test_two_processes_equal_one(tmp_path):
    flags = [*TINY, "--iterations", "3", "--r1", "1.0"]
    ranks(2, recorded, tmp_path, *flags, "--out", str(tmp_path / "two"))
    yoso.main([*flags, "--out", str(tmp_path / "one")])
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"], "equal at the start and after every step"
    assert len(set(first["weights"])) == 4 and not set(first["batches"]) & set(second["batches"])
    assert first["rows"] == second["rows"] == 4, "the global batch stays 8"
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name in ("generator", "discriminator"):
        for key in one[name]:
            torch.testing.assert_close(one[name][key], two[name][key], atol=1e-5, rtol=1e-4)
    for row, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        assert other["L_rec"] == pytest.approx(row["L_rec"], rel=1e-3), "the mean over both"


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The README's command in processes of their own; a wrong flag is told once."""
    command = [ROOT / "yoso.py", *TINY, "--iterations", 3, "--out", tmp_path / "run"]
    torchrun(2, *command)
    assert read_checkpoint(tmp_path / "run" / "checkpoint")["iteration"] == 3
    assert (tmp_path / "run" / "samples" / "final.png").exists()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    _, error = finish(start(*launcher, *command, "--lr", 0), 1)
    assert error.count("yoso.py: --lr 0.0: must be above 0") == 1
