"""What all tests share: the import path and the seed."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test may wait for a network
os.environ["OMP_NUM_THREADS"] = "1"  # a thread for each of pytest's processes, and for those that tests start

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_forecast(request, monkeypatch):
    """Runs inside the test process say nothing of their cost, which takes a second each; tests/test_forecast.py has it."""
    from common import Run
    if request.module.__name__ != "test_forecast":
        monkeypatch.setattr(Run, "forecast", lambda *_: None)
