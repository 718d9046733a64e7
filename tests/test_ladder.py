"""The memory table of the published architectures."""

import pytest
import torch

import benchmark
import common
import ladder


@pytest.mark.parametrize("name, parameters, text_parameters", [
    ("sd15", 859_520_964, [123_060_480]), ("sd21", 865_910_724, [340_387_840]), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
    ("pixart", 610_856_096, [4_762_310_656])])
def test_the_architectures_have_the_published_sizes(name, parameters, text_parameters):
    with torch.device("meta"):
        denoiser, codec = ladder.empty_pipeline(name, "meta")
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(denoiser.net) == parameters and [count(text) for text in codec.text_encoders] == text_parameters
    assert count(codec.vae) == 83_653_863


def test_a_rung(tmp_path, monkeypatch):
    """States grow with what is trained, a step with its samples, checkpointing saves; nothing of it takes memory, or stays patched."""
    small = ladder.SD15 | dict(sample_size=16, block_out_channels=(32, 64, 64, 64), layers_per_block=1)
    pipeline_class, network_class, _, text = ladder.BACKBONES["sd15"]
    monkeypatch.setitem(ladder.BACKBONES, "sd15", (pipeline_class, network_class, small, text))
    monkeypatch.setattr(ladder, "VAE", ladder.VAE | dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1))
    before = common.held_bytes(torch.device("cpu"))
    (step, states, flop), (more, same, four_times), (less, *_) = (
        ladder.memory_of("SD 1.5, YOSO, LoRA", samples, less, tmp_path) for samples, less in ((2, False), (8, False), (8, True)))
    assert common.held_bytes(torch.device("cpu")) - before < 2**24 and benchmark.load is common.load
    assert states == pytest.approx(same, rel=0.02) and states < step < more and less < more and flop * 4 == pytest.approx(four_times, rel=1e-6)
