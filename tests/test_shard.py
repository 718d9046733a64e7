"""--shard: two processes with half of every weight each train as one process does."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import tiny
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import diff_instruct_star
import plumbing.checkpoint
import plumbing.cli
import plumbing.run
import plumbing.shard
import swiftbrush_v2
import yoso
from common import load

COMMON = ["--preset", "shapes", "--batch-size", 4, "--device", "cpu", "--log-every", 1, "--save-every", 2, "--sample-every", 3]
DISTILL = ["--convert-iterations", 2, "--rank", 4, "--alpha", 8]
RUNS = {
    "swiftbrush": (swiftbrush_v2, ["--iterations", 3, "--iterations-b", 3, "--rank-b", 4, "--alpha-b", 8, *DISTILL]),
    "full": (diff_instruct_star, ["--iterations", 2, "--warmup", 1, "--assistant-warmup", 1, *DISTILL]),
    "lora": (diff_instruct_star, ["--iterations", 2, "--warmup", 1, "--assistant-warmup", 1, "--assistant", "lora", "--gradient-checkpointing",
                                  *DISTILL]),
    "yoso": (yoso, ["--iterations", 3, "--prior-num", 8, "--micro-batch", 1, "--gradient-checkpointing"]),
    "yoso-lora": (yoso, ["--iterations", 3, "--prior-num", 8, "--adapt", "--adapt-iterations", 3, "--rank", 4]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny SD pipeline, CLIPModel and AutoencoderTiny."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny.sd().save_pretrained(folder / "sd")
    for part in tiny.clip():
        part.save_pretrained(folder / "clip")
    tiny.vae(tiny=True).save_pretrained(folder / "tae")
    return folder


def flags(name, models, out):
    script, more = RUNS[name]
    own = {swiftbrush_v2: ["--clip", models / "clip", "--decoder", models / "tae"], yoso: [],
           diff_instruct_star: ["--reward", models / "clip", "--probe", models / "clip", "--decoder", models / "tae"]}[script]
    model = ROOT / "assets" / "mini-sd" if name == "yoso" else models / "sd"  # one whose weights are most of the memory
    return [str(a) for a in ["--model", model, "--out", out, *COMMON, *own, *more]]


class Held(TorchDispatchMode):
    """The most bytes that tensors hold inside the with block, those that exist before it included; FSDP resizes what it gathers into."""

    def __init__(self):
        super().__init__()
        self.peak, self.operations, self.storages = 0, 0, weakref.WeakSet()
        gc.collect()
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                self.see(thing)

    def see(self, tensor):
        """Remembers where the tensor lies."""
        if (tensor := plumbing.shard.part_here(tensor)).device.type == "cpu":
            self.storages.add(tensor.untyped_storage())
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, (args, out))
        self.operations += 1
        if self.operations % 4 == 0:  # it takes as long as the operation
            self.peak = max(self.peak, sum(storage.nbytes() for storage in list(self.storages)))
        return out


# The real command, which also writes how many bytes of weights, moments and averages this process holds, and how many there are; and
# what the tensors of the last step held at their most.
SCRIPT = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tools"]
import common, plumbing.run, plumbing.shard, {module} as script
from test_shard import Held
end, finish, update, watching, peaks = plumbing.run.Run.end, plumbing.run.Run.finish_iteration, common.EMA.update, [], [0]

def after(run, iteration, losses):
    stop = finish(run, iteration, losses)
    if iteration == run.config.iterations - 2 and (run.out / "forecast.json").exists():
        watching.append(Held())
        watching[0].__enter__()
    return stop

def updated(ema):
    update(ema)
    for held in watching:
        held.__exit__(None, None, None)
        peaks.append(held.peak)
    watching.clear()

def measured(run):
    tensors = plumbing.checkpoint.flat_state(run.parts).values()
    state = [sum(t.numel() * t.element_size() for t in some) for some in (map(plumbing.shard.part_here, tensors), tensors)]
    with open({folder!r} + f"/bytes{{run.rank}}.json", "w") as file:
        json.dump([*state, max(peaks)], file)
    end(run)

plumbing.run.Run.end, plumbing.run.Run.finish_iteration, common.EMA.update = measured, after, updated
plumbing.cli.run_command(script.main)
"""


def sharded(name, flags, folder):
    """Two processes; returns the share of the run's state that each of them holds, and the bytes of an iteration."""
    script = folder / "ranks.py"
    script.write_text(SCRIPT.format(root=str(ROOT), module=RUNS[name][0].__name__, folder=str(folder)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *flags, "--shard"],
                          timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:-1500][-3000:]
    measured = [json.loads((folder / f"bytes{rank}.json").read_text()) for rank in (0, 1)]
    return [held / all_there_is for held, all_there_is, _ in measured], [peak for *_, peak in measured]


def same(a, b):
    """Two states of weights, to 1e-5; but one in a hundred, where a gradient of almost 0 lets rounding choose the sign of Adam's step."""
    assert a.keys() == b.keys()
    difference = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    assert difference.quantile(0.99) < 1e-5 and difference.max() < 1e-2, (difference.quantile(0.99), difference.max())


@pytest.mark.parametrize("name", RUNS)
def test_sharded_equals_one_process(models, tmp_path, name):
    shares, peaks = sharded(name, flags(name, models, tmp_path / "two"), tmp_path)
    if name in ("full", "yoso"):
        assert max(shares) < 0.55
    forecasts = [json.loads(path.read_text())["memory_GB"] * 2**30 for path in (tmp_path / "two").rglob("forecast.json")]
    assert max(forecasts) == pytest.approx(max(peaks), rel=0.1)
    RUNS[name][0].main(flags(name, models, tmp_path / "one"))
    stages = [path.parent.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("checkpoint")]
    assert stages
    for stage in stages:
        one, two = (plumbing.checkpoint.read_checkpoint(tmp_path / run / stage / "checkpoint")["state"] for run in ("one", "two"))
        assert one.keys() == two.keys()
        for part in one.keys() - {key for key in one if key.startswith("optimizer")}:
            same(one[part], two[part])
    same(*(load(tmp_path / run / "pipeline")[0].net.state_dict() for run in ("one", "two")))
    grids = [sorted(p.relative_to(tmp_path / run) for p in (tmp_path / run).rglob("*.png")) for run in ("one", "two")]
    assert grids[0] == grids[1] and grids[0]


def test_a_run_moves_into_shards_and_back(models, tmp_path):
    """Saved whole, continued in halves, then whole again: the run that stayed whole."""
    def upto(iterations, out):
        return [*flags("yoso", models, tmp_path / out), "--iterations", str(iterations)]
    yoso.main(upto(1, "moved"))
    sharded("yoso", upto(2, "moved"), tmp_path)
    yoso.main(upto(3, "moved"))
    yoso.main(upto(3, "stayed"))
    moved, stayed = (plumbing.checkpoint.read_checkpoint(tmp_path / run / "checkpoint")["state"] for run in ("moved", "stayed"))
    assert {part: value.keys() for part, value in moved.items()} == {part: value.keys() for part, value in stayed.items()}
    for part in ("generator", "discriminator", "ema"):
        same(moved[part], stayed[part])
