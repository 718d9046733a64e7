"""--shard: two processes with half of every weight each train as one process does."""

import os
import subprocess
import sys

import pytest
import torch

import common
import diff_instruct_star
import swiftbrush_v2
import tiny
import yoso
from common import load
from conftest import ROOT

COMMON = ["--preset", "shapes", "--batch-size", 4, "--device", "cpu", "--log-every", 1, "--save-every", 2, "--sample-every", 3]
DISTILL = ["--convert-iterations", 2, "--rank", 4, "--alpha", 8]
RUNS = {
    "swiftbrush": (swiftbrush_v2, ["--iterations", 3, "--iterations-b", 3, "--rank-b", 4, "--alpha-b", 8, *DISTILL]),
    "full": (diff_instruct_star, ["--iterations", 2, "--warmup", 1, "--assistant-warmup", 1, *DISTILL]),
    "lora": (diff_instruct_star, ["--iterations", 2, "--warmup", 1, "--assistant-warmup", 1, "--assistant", "lora", "--gradient-checkpointing",
                                  *DISTILL]),
    "yoso": (yoso, ["--iterations", 3, "--prior-num", 8]),
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
    return [str(a) for a in ["--model", models / "sd", "--out", out, *COMMON, *own, *more]]


def sharded(name, flags, processes=2):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                           str(ROOT / f"{RUNS[name][0].__name__}.py"), *flags, "--shard"], timeout=280, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[:-1500][-3000:]


def same(a, b):
    """Two states of weights, to 1e-5; but one in a hundred, where a gradient of almost 0 lets rounding choose the sign of Adam's step."""
    assert a.keys() == b.keys()
    difference = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    assert difference.quantile(0.99) < 1e-5 and difference.max() < 2e-3, (difference.quantile(0.99), difference.max())


@pytest.mark.parametrize("name", RUNS)
def test_sharded_equals_one_process(models, tmp_path, name):
    sharded(name, flags(name, models, tmp_path / "two"))
    RUNS[name][0].main(flags(name, models, tmp_path / "one"))
    stages = [path.parent.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("checkpoint")]
    assert stages
    for stage in stages:
        one, two = (common.read_checkpoint(tmp_path / run / stage / "checkpoint")["state"] for run in ("one", "two"))
        assert one.keys() == two.keys()
        for part in one.keys() - {key for key in one if key.startswith("optimizer")}:
            same(one[part], two[part])
    same(*(load(tmp_path / run / "pipeline")[0].net.state_dict() for run in ("one", "two")))
    grids = [sorted(p.relative_to(tmp_path / run) for p in (tmp_path / run).rglob("*.png")) for run in ("one", "two")]
    assert grids[0] == grids[1] and grids[0]
