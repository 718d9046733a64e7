"""The memory table of the published architectures."""

import forecast
import ladder
import pytest
import torch

import common
import yoso


@pytest.mark.parametrize("name, parameters, text_parameters", [
    ("sd15", 859_520_964, [123_060_480]), ("sd21", 865_910_724, [340_387_840]), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
    ("pixart", 610_856_096, [4_762_310_656])])
def test_the_architectures_have_the_published_sizes(name, parameters, text_parameters):
    with torch.device("meta"):
        denoiser, codec = ladder.empty_pipeline(name, "meta")
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(denoiser.net) == parameters and [count(text) for text in codec.text_encoders] == text_parameters
    assert count(codec.vae) == 83_653_863


@pytest.fixture
def small(monkeypatch):
    """SD 1.5 with a narrow UNet and VAE."""
    config = ladder.SD15 | dict(sample_size=16, block_out_channels=(32, 64, 64, 64), layers_per_block=1)
    pipeline_class, network_class, _, text = ladder.BACKBONES["sd15"]
    monkeypatch.setitem(ladder.BACKBONES, "sd15", (pipeline_class, network_class, config, text))
    monkeypatch.setattr(ladder, "VAE", ladder.VAE | dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1))


def test_a_rung(small, tmp_path):
    """States grow with what is trained, a step with its samples, checkpointing saves; nothing of it takes memory, or stays patched."""
    before = forecast.held_bytes(torch.device("cpu"))
    (step, states, flop), (more, same, four_times), (less, *_) = (
        ladder.memory_of("SD 1.5, YOSO, LoRA", samples, less, tmp_path) for samples, less in ((2, False), (8, False), (8, True)))
    assert forecast.held_bytes(torch.device("cpu")) - before < 2**24 and yoso.load is common.load
    assert states == pytest.approx(same, rel=0.02) and states < step < more and less < more and flop * 4 == pytest.approx(four_times, rel=1e-6)


def test_shared_states(small, tmp_path):
    """Each of four processes has a fourth of the networks' states, and what is not shared: text encoder and VAE."""
    (step, states, flop), (less, part, same) = (
        ladder.memory_of("SD 1.5, YOSO, all weights", 2, True, tmp_path, processes) for processes in (1, 4))
    with torch.device("meta"):
        codec = ladder.empty_pipeline("sd15", "meta")[1]
    whole = sum(p.nbytes for module in (codec.vae, *codec.text_encoders) for p in module.parameters()) / 2**30
    assert part - whole == pytest.approx((states - whole) / 4, rel=0.1)  # not all sizes are divisible
    assert less < step and flop == same and not torch.distributed.is_initialized()
