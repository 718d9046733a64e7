"""What all tests share: the import path and the seed."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
