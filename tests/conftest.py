"""The import path, the options of pytest, and the seed of every test."""

import os
import sys
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test may wait for a network
os.environ["OMP_NUM_THREADS"] = "1"  # a thread for each of pytest's processes, and for those that tests start

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes, if -n says nothing else (0 for a debugger).

    A file's tests stay in one process, for they share the file's models. The files come in their own order:
    by size test_shard.py would be last, alone.
    """
    if getattr(config.option, "numprocesses", 0) is None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.option.numprocesses, config.option.dist, config.option.loadscopereorder = 2, "loadfile", False


def pytest_configure(config):
    """Slow tests only run when they are asked for: python -m pytest -m "slow or not slow"."""
    config.addinivalue_line("markers", "slow: more of what a quick test has shown")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(scope="module")
def few_pictures():
    """Rewards are measured on 8 pictures in place of 512, which would take longer than a tiny training."""
    import diff_instruct_star  # only where a test needs it: the import takes seconds

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diff_instruct_star, "measure_rewards",
                        partial(diff_instruct_star.measure_rewards, num=8))
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
