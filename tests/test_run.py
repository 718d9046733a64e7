"""The real commands: training, resuming, sampling, several processes, and wrong input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import plumbing.checkpoint
import plumbing.cli
import plumbing.run
import yoso
from common import NoiseSchedule, UserError
from plumbing.run import Run

ROOT = Path(__file__).parent.parent
TINY = ["--preset", "shapes", "--channels", "8", "16", "--channels-d", "8", "16", "--batch-size", "8",
        "--log-every", "2", "--save-every", "4", "--sample-every", "4", "--device", "cpu"]


def config(out, **changes):
    values = plumbing.cli.parse_config(yoso.Config, yoso.PRESETS, [*TINY, "--out", str(out)], "")
    return yoso.Config(**{**vars(values), "iterations": 4, **changes})


def command(*flags, **kwargs):
    """Starts `python yoso.py FLAGS`."""
    return subprocess.Popen([sys.executable, str(ROOT / "yoso.py"), *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def finish(process, code=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    return out, err


def equal(a, b):
    """Nested state dicts with exactly the same tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def state(out):
    return plumbing.checkpoint.read_checkpoint(out / "checkpoint")["state"]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run of 40 iterations."""
    out = tmp_path_factory.mktemp("finished") / "run"
    finish(command(*TINY, "--iterations", 40, "--out", out))
    return out


def wait_for(process, out, iteration):
    """Until the run has logged `iteration`."""
    for _ in range(2000):
        log = out / "metrics.jsonl"
        if log.exists() and f'"iteration": {iteration},' in log.read_text():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


def test_a_run_leaves_what_the_readme_says(finished):
    assert [row["iteration"] for row in metrics(finished)] == list(range(2, 41, 2))
    assert json.loads((finished / "config.json").read_text())["channels"] == [8, 16]
    assert {p.name for p in (finished / "samples").iterdir()} == {"final.png", *(f"{i:07d}.png" for i in range(4, 41, 4))}
    assert (finished / "pipeline" / "model_index.json").exists() and plumbing.checkpoint.latest_checkpoint(finished / "checkpoint").name == "00000040"
    assert metrics(finished)[0]["L_D"] == pytest.approx(1.386, abs=0.02), "D starts at 2 ln 2"


def test_every_logged_key_is_explained_in_the_readme(finished):
    readme = (ROOT / "README.md").read_text()
    for key in metrics(finished)[0]:
        assert f"| `{key}` |" in readme, key


def stop(process, out, number, group=False):
    """Sends the signal once the run has logged iteration 6; returns (stderr, the iteration that was saved)."""
    wait_for(process, out, 6)
    (os.killpg if group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
    saved = plumbing.checkpoint.read_checkpoint(out / "checkpoint")["iteration"]
    assert 4 <= saved < 40
    return err, saved


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_same_weights(finished, tmp_path, number):
    flags = [*TINY, "--iterations", 40, "--out", tmp_path / "run"]
    err, saved = stop(command(*flags), tmp_path / "run", number)
    if number != signal.SIGKILL:
        assert "the same command continues" in err and saved >= 6
    finish(command(*flags))
    assert equal(state(finished), state(tmp_path / "run"))
    assert metrics(tmp_path / "run")[-1]["iteration"] == 40
    iterations = [row["iteration"] for row in metrics(tmp_path / "run")]
    assert iterations == sorted(set(iterations))


def test_a_signal_to_the_whole_group_with_workers_and_resume_elsewhere(finished, tmp_path):
    flags = [*TINY, "--iterations", 40, "--workers", 1]
    stop(command(*flags, "--out", tmp_path / "a", start_new_session=True), tmp_path / "a", signal.SIGTERM, group=True)
    finish(command(*flags, "--out", tmp_path / "b", "--resume", tmp_path / "a"))
    assert equal(state(finished), state(tmp_path / "b")), "neither workers nor the folder change the result"


def test_the_same_command_on_a_finished_run_changes_nothing(finished):
    before = state(finished)
    out, _ = finish(command(*TINY, "--iterations", 40, "--out", finished))
    assert equal(before, state(finished)) and "done" in out


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_exported_pipeline_gives_our_samples(finished, nfe):
    from diffusers import DDPMPipeline
    pipeline = DDPMPipeline.from_pretrained(finished / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=3, num_inference_steps=nfe, generator=torch.Generator().manual_seed(1), output_type="pt").images
    generator, schedule, c = yoso.load_generator(finished)
    draws = torch.Generator().manual_seed(1)
    x_T, *noise = [torch.randn(3, 3, 16, 16, generator=draws) for _ in range(nfe)]
    ours = yoso.sample(generator, schedule, yoso.sampling_levels(c.levels, nfe), x_T, None, noise)
    torch.testing.assert_close(theirs, ours / 2 + 0.5, atol=1e-5, rtol=0)


def test_sample_command(finished, tmp_path):
    for nfe in (1, 4):
        yoso.main(["sample", "--run", str(finished), "--num", "9", "--nfe", str(nfe), "--grid", str(tmp_path / f"{nfe}.png"), "--device", "cpu"])
    one, four = (Image.open(tmp_path / f"{nfe}.png") for nfe in (1, 4))
    assert one.size == four.size == (8 * 66 + 2, 2 * 66 + 2) and one.tobytes() != four.tobytes()


def test_samples_come_from_the_average(finished):
    generator, _, _ = yoso.load_generator(finished)
    saved = state(finished)
    assert equal(dict(generator.state_dict()), saved["ema"]) and not equal(saved["ema"], dict(saved["generator"]))


def networks(c):
    torch.manual_seed(0)
    generator, discriminator = yoso.Generator(c), yoso.Discriminator(c)
    torch.nn.init.normal_(discriminator.end.weight)
    return dict(generator=generator, discriminator=discriminator, optimizer_g=torch.optim.SGD(generator.parameters(), 1e-3),
                optimizer_d=torch.optim.SGD(discriminator.parameters(), 1e-3))


def one_step(c, **replaced):
    nets = {**networks(c), **replaced}
    torch.manual_seed(1)
    x0 = torch.randn(c.batch_size, 3, c.image_size, c.image_size)
    losses = yoso.train_step(0, x0, Run(c), c, NoiseSchedule.from_config(yoso.scheduler_config(c)), yoso.squared_distance, **nets)
    return nets, losses


def moved(before, after):
    return any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_each_update_moves_its_own_network(tmp_path, which):
    c = config(tmp_path)
    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    nets, _ = one_step(c, **{"optimizer_d" if which == "generator" else "optimizer_g": nothing})
    start = networks(c)
    assert moved(start["generator"], nets["generator"]) == (which == "generator")
    assert moved(start["discriminator"], nets["discriminator"]) == (which == "discriminator")


def test_the_discriminator_update_sends_nothing_to_the_generator(tmp_path):
    c = config(tmp_path, r1=1.0)
    nets, schedule = networks(c), NoiseSchedule.from_config(yoso.scheduler_config(c))
    x0, t = torch.randn(8, 3, 16, 16), torch.full((8,), 2)
    fake = nets["generator"](x0, t)
    part = dict(fake=fake, target=nets["generator"](x0, t), x0=x0, x_r=x0, t=t, noise=x0)
    yoso.update_discriminator(0, [part], Run(c), c, schedule, nets["discriminator"], nets["optimizer_d"])
    assert all(p.grad is None for p in nets["generator"].parameters())
    gradients = {n: p.grad.clone() for n, p in nets["discriminator"].named_parameters()}
    nets["optimizer_g"].zero_grad()
    part["z"], part["x_t"] = None, x0
    yoso.update_generator([part], True, Run(c), c, schedule, yoso.squared_distance, nets["generator"], nets["discriminator"], nets["optimizer_g"])
    assert all(torch.equal(p.grad, gradients[n]) for n, p in nets["discriminator"].named_parameters())


def test_no_network_pass_is_spent_twice(tmp_path):
    c, calls = config(tmp_path), {"generator": 0, "discriminator": 0}
    nets = networks(c)
    for name in calls:
        nets[name].register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    one_step(c, **nets)
    assert calls == dict(generator=2, discriminator=2), "G at t and t-1; D on the joint batch, and on the fakes for G"


@pytest.mark.parametrize("adversary", ["self", "data", "ufogen"])
def test_micro_batches_equal_the_full_batch(tmp_path, adversary):
    full, full_losses = one_step(config(tmp_path, batch_size=16, adversary=adversary, r1=1.0, latent_z=8))
    parts, part_losses = one_step(config(tmp_path, batch_size=16, adversary=adversary, r1=1.0, latent_z=8, micro_batch=4))
    for name in ("generator", "discriminator"):
        for a, b in zip(full[name].parameters(), parts[name].parameters()):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert all(part_losses[k].item() == pytest.approx(v.item(), rel=1e-4, abs=1e-6) for k, v in full_losses.items())


def test_both_levels_share_data_noise_and_z(tmp_path):
    """What train_step hands to the networks: Algorithm 1, lines 3 to 8, and Eq. 1's p^(0) at level 1."""
    c, x0, given, compared = config(tmp_path, batch_size=16, latent_z=8), torch.randn(16, 3, 16, 16), [], []
    nets, schedule = networks(c), NoiseSchedule.from_config(yoso.scheduler_config(c))
    nets["generator"].register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    nets["discriminator"].register_forward_pre_hook(lambda _, inputs: compared.append(inputs))
    yoso.train_step(0, x0, Run(c), c, schedule, yoso.squared_distance, **nets)
    (x_t, t, z), (x_r, r, z_r) = given
    assert torch.equal(r, t - 1) and torch.equal(z, z_r) and set(t.tolist()) == {1, 2, 3, 4}
    alpha, sigma = schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(schedule.add_noise(x0, (x_t - alpha * x0) / sigma, r), x_r, atol=1e-5, rtol=0)
    real, level = compared[0][0][:16], compared[0][1]
    assert torch.equal(level, torch.cat([t, t])), "D is told the fake's level for both"
    assert [torch.equal(a, b) for a, b in zip(real, x0)] == (t == 1).tolist()


def test_the_average_follows_the_generator(tmp_path):
    c = config(tmp_path, iterations=1, ema=0.75)
    torch.manual_seed(c.seed)
    start = dict(yoso.Generator(c).named_parameters())
    yoso.train(c)
    saved = state(tmp_path)
    for name, value in start.items():
        torch.testing.assert_close(saved["ema"][name], 0.75 * value.detach() + 0.25 * saved["generator"][name])


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    plain, _ = one_step(config(tmp_path))
    checkpointed = networks(config(tmp_path))
    checkpointed["generator"].unet.enable_gradient_checkpointing()
    one_step(config(tmp_path), **checkpointed)
    for a, b in zip(plain["generator"].parameters(), checkpointed["generator"].parameters()):
        torch.testing.assert_close(a, b)


def test_bf16_keeps_float32_weights_and_losses(tmp_path):
    nets, losses = one_step(config(tmp_path, precision="bf16", r1=1.0))
    plain, exact = one_step(config(tmp_path, r1=1.0))
    assert all(v.dtype == torch.float32 for v in [*losses.values(), *nets["generator"].parameters()])
    assert losses["L_rec"] != exact["L_rec"] and losses["L_rec"].item() == pytest.approx(exact["L_rec"].item(), rel=0.05)


def test_latent_z_changes_the_picture(tmp_path):
    c = config(tmp_path, latent_z=8)
    generator = networks(c)["generator"]
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([4, 4])
    assert not torch.allclose(generator(x, t, torch.randn(2, 8)), generator(x, t, torch.randn(2, 8)))


def test_cifar10_preset_has_the_papers_size():
    c = plumbing.cli.parse_config(yoso.Config, yoso.PRESETS, ["--dataset", "cifar10"], "")
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in net(c).parameters()) / 1e6 for net in (yoso.Generator, yoso.Discriminator)]
    assert sizes == pytest.approx([48.4, 12.7], rel=0.03)
    assert (c.batch_size, c.iterations, c.lr, c.ema, c.distance, c.latent_z) == (256, 200_000, 2e-4, 0.9999, "lpips", 100)


RANK_SCRIPT = """
import sys, hashlib, json, torch
sys.path.insert(0, {root!r})
import yoso, plumbing.run
digests, batches, finish, step = [], [], plumbing.run.Run.finish_iteration, yoso.train_step
def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
def recording_step(iteration, x0, run, config, schedule, distance, generator, discriminator, *rest):
    if not digests:
        digests.append(digest([*generator.parameters(), *discriminator.parameters()]))
    losses = step(iteration, x0, run, config, schedule, distance, generator, discriminator, *rest)
    digests.append(digest([*generator.parameters(), *discriminator.parameters()]))
    batches.append(digest([x0]))
    json.dump(dict(digests=digests, batches=batches, rows=len(x0)), open(f"{{sys.argv[1]}}/rank{{run.rank}}.json", "w"))
    return losses
yoso.train_step = recording_step
yoso.main(sys.argv[2:])
"""


def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANK_SCRIPT.format(root=str(ROOT)))
    flags = [*TINY, "--iterations", "3", "--r1", "1.0"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path),
                    *flags, "--out", str(tmp_path / "two")], check=True, timeout=200, capture_output=True)
    finish(command(*flags, "--out", tmp_path / "one"))
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first["digests"] == second["digests"] and len(set(first["digests"])) == 4, "equal at start and after every step"
    assert not set(first["batches"]) & set(second["batches"]), "different data"
    assert first["rows"] == second["rows"] == 4, "the global batch stays 8"
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name in ("generator", "discriminator"):
        for key in one[name]:
            torch.testing.assert_close(one[name][key], two[name][key], atol=1e-5, rtol=1e-4)


def test_gradients_are_exchanged_in_pieces(monkeypatch):
    """The mean over two ranks, the other one with gradients of three times the size; no piece above the limit by more than a tensor."""
    pieces = []
    monkeypatch.setattr(plumbing.run, "EXCHANGED_AT_ONCE", 10)
    monkeypatch.setattr(plumbing.run.dist, "all_reduce", lambda flat: (pieces.append(len(flat)), flat.mul_(4)))
    parameters = [torch.zeros(size, requires_grad=True) for size in ((2, 3), (5,), (0,), (4, 7), (3,))] + [torch.zeros(9, requires_grad=True)]
    for i, p in enumerate(parameters[:-1]):
        p.grad = torch.arange(p.numel()).view(p.shape) + 100.0 * i
    own = [p.grad.clone() for p in parameters[:-1]]
    plumbing.run.Run.average_gradients(SimpleNamespace(world=2), parameters)
    for p, gradient in zip(parameters, own):
        assert torch.equal(p.grad, 2 * gradient)
    assert parameters[-1].grad is None and sum(pieces) == 42 and len(pieces) > 2 and max(pieces) <= 10 + 28


def test_a_run_moves_between_two_three_and_one_processes(tmp_path):
    """Saved on 2, continued on 3, then on 1: the weights and averages of a run that stayed on 1."""
    flags = [*TINY, "--lr-decay", "0", "--batch-size", "24", "--save-every", "2"]
    for iterations, processes in ((2, 2), (4, 3)):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(ROOT / "yoso.py"),
                        *flags, "--iterations", str(iterations), "--out", str(tmp_path / "moved")], check=True, timeout=200,
                       capture_output=True)
    finish(command(*flags, "--iterations", 6, "--out", tmp_path / "moved"))
    finish(command(*flags, "--iterations", 6, "--out", tmp_path / "stayed"))
    assert [row["iteration"] for row in metrics(tmp_path / "moved")] == [2, 4, 6]
    moved, stayed = state(tmp_path / "moved"), state(tmp_path / "stayed")
    assert {name: value.keys() for name, value in moved.items()} == {name: value.keys() for name, value in stayed.items()}
    for name in ("generator", "ema"):  # rounding, times Adam's sign where D's gradient is almost 0: a lost moment would be 1e-3
        for key in stayed[name]:
            torch.testing.assert_close(moved[name][key], stayed[name][key], atol=5e-5, rtol=0)


def test_checkpoints_take_their_place_when_complete(tmp_path, monkeypatch):
    """A half-written one is not seen and swept away; only the last is kept; a full disk keeps the one before; nothing is unpickled."""
    folder = tmp_path / "checkpoint"
    yoso.train(config(tmp_path))
    assert [p.name for p in folder.iterdir()] == ["00000004"]
    (folder / "new").mkdir()
    (folder / "new" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    (folder / "00000005").mkdir()  # without its note: a kill between the files
    monkeypatch.setattr("pickle.load", None), monkeypatch.setattr("pickle.loads", None), monkeypatch.setattr("torch.load", None)
    run = Run(config(tmp_path))
    part = torch.nn.Linear(2, 2)
    run.parts = dict(part=part)
    assert run.start == 4

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched, pytest.raises(UserError, match="iteration 6 cannot be saved.*No space left"):
        patched.setattr("plumbing.run.dcp.save", full)
        run.save(6)
    assert plumbing.checkpoint.latest_checkpoint(folder).name == "00000004"
    run.save(6)
    assert [p.name for p in folder.iterdir()] == ["00000006"]
    assert torch.equal(plumbing.checkpoint.read_checkpoint(folder)["state"]["part"]["weight"], part.weight)


def test_non_finite_loss_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    honest = yoso.train_step

    def poisoned(iteration, *rest):
        losses = honest(iteration, *rest)
        return losses | dict(L_con=losses["L_con"] * (float("nan") if iteration >= 6 else 1))
    monkeypatch.setattr(yoso, "train_step", poisoned)
    with pytest.raises(UserError, match=r"iteration 7: L_con is not finite.*checkpoint of iteration 4 is kept"):
        yoso.train(config(tmp_path, iterations=12, log_every=100))
    assert plumbing.checkpoint.read_checkpoint(tmp_path / "checkpoint")["iteration"] == 4


def test_broken_pictures_are_counted_and_not_fatal(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"broken")
    yoso.train(config(tmp_path / "run", dataset=str(folder), iterations=4))
    assert metrics(tmp_path / "run")[-1]["skipped_pictures"] == 1
    assert re.search(r"skipped.*3\.png \(1 so far\)", capsys.readouterr().err)


def fails(monkeypatch, capsys, *flags):
    """The one line that the command prints; exit code 2."""
    monkeypatch.setattr(sys, "argv", ["yoso.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        plumbing.cli.run_command(yoso.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "imagenet"], "--dataset imagenet: unknown; choose shapes"),
    (["--preset", "huge"], "--preset huge: unknown"),
    (["--adversary", "none"], "--adversary none: unknown"),
    (["--distance", "l1"], "--distance l1: unknown"),
    (["--precision", "fp16"], "--precision fp16: unknown; choose fp32 or bf16"),
    (["--device", "quantum"], "--device quantum: cannot be used"),
    (["--batch-size", "8", "--micro-batch", "3"], "--micro-batch 3: does not divide"),
    (["--batch-size", "6"], "must be a multiple of 4"),
    (["--image-size", "20", "--channels", "8", "8", "8", "8"], "--image-size 20: must be a multiple of 8"),
    (["--channels", "3"], "--channels (3,): must be at least 4"),
    (["--channels", "8", "--attention"], "--attention True: must be off"),
    (["--levels", "0"], "--levels 0: must be at least 1"),
    (["--r1-every", "0"], "--r1-every 0: must be at least 1"),
    (["--seed", "-1"], "--seed -1: must not be negative"),
    (["--iterations", "0"], "--iterations 0: must be at least 1"),
    (["--resume", "absent"], "--resume absent: there is no checkpoint"),
])
def test_wrong_flags(tmp_path, monkeypatch, capsys, flags, words):
    assert words in fails(monkeypatch, capsys, *TINY, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_batch_not_divisible_by_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--batch-size 8: the global batch is not divisible by 3 processes" in fails(monkeypatch, capsys, *TINY, "--out", tmp_path / "run")


def test_another_configuration_is_refused_and_nothing_overwritten(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "--lr was 0.001, is 0.1" in fails(monkeypatch, capsys, *TINY, "--iterations", 40, "--out", tmp_path / "run", "--lr", 0.1)
    assert "--iterations was 40, is 80" in fails(monkeypatch, capsys, *TINY, "--iterations", 80, "--out", tmp_path / "run"), "lr_decay"
    assert "another configuration" in fails(monkeypatch, capsys, *TINY, "--out", tmp_path / "new", "--resume", finished, "--seed", 5)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_damaged_checkpoint_is_named(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    path = plumbing.checkpoint.latest_checkpoint(tmp_path / "run" / "checkpoint")
    file, note = next(path.glob("*.safetensors")), path / "checkpoint.json"
    whole, text = file.read_bytes(), note.read_text()
    command = [*TINY, "--iterations", 40, "--out", tmp_path / "run"]
    file.write_bytes(whole[:-1000])
    assert "has not the size it was written with" in fails(monkeypatch, capsys, *command)
    file.write_bytes(b"x" * len(whole))
    assert f"{path}: damaged" in fails(monkeypatch, capsys, *command)
    file.unlink()
    assert f"{path}: damaged" in fails(monkeypatch, capsys, *command)
    file.write_bytes(whole), note.write_text(text[:-9])
    assert f"{path}: damaged" in fails(monkeypatch, capsys, *command)


def test_out_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write there" in fails(monkeypatch, capsys, *TINY, "--out", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


def test_sample_of_nothing(tmp_path, monkeypatch, capsys, finished):
    assert "no checkpoint yet" in fails(monkeypatch, capsys, "sample", "--run", tmp_path)
    assert "--num 0: must be at least 1" in fails(monkeypatch, capsys, "sample", "--run", finished, "--num", 0)
    assert "cannot be written" in fails(monkeypatch, capsys, "sample", "--run", finished, "--num", 1, "--grid", tmp_path / "grid")
    assert "1 to 4 network calls" in fails(monkeypatch, capsys, "sample", "--run", finished, "--nfe", 5)


def test_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        yoso.main(["--iteration", "3"])
    assert stopped.value.code == 2 and "--iteration" in capsys.readouterr().err


def test_lpips_has_a_gradient_and_vanishes_for_equal_pictures(monkeypatch):
    """The real lpips network, on random VGG weights in place of the downloaded ones."""
    import torchvision
    weights = torchvision.models.vgg16(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: weights)
    distance = yoso.load_distance("lpips", "cpu")
    a, b = torch.rand(2, 3, 32, 32).requires_grad_(), torch.rand(2, 3, 32, 32)
    d = distance(a, b)
    assert d.shape == (2,) and (d > 0).all() and (distance(a, a).abs() < 1e-6).all()
    gradient, = torch.autograd.grad(d.sum(), a)
    assert gradient.abs().sum() > 0


def test_lpips_without_network(tmp_path, monkeypatch, capsys):
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    assert "use --distance l2" in fails(monkeypatch, capsys, *TINY, "--out", tmp_path / "run", "--distance", "lpips")
