"""The memory table of the published architectures."""

import gc
import json

import forecast
import ladder
import pytest
import torch

import common
import swiftbrush_v2
import yoso

CPU = torch.device("cpu")


@pytest.mark.parametrize("name, parameters, text_parameters", [
    ("sd15", 859_520_964, [123_060_480]), ("sd21", 865_910_724, [340_387_840]),
    ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]), ("pixart", 610_856_096, [4_762_310_656])])
def test_the_architectures_have_the_published_sizes(name, parameters, text_parameters):
    with torch.device("meta"):
        denoiser, codec = ladder.empty_pipeline(name, "meta")
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(denoiser.net) == parameters
    assert [count(text) for text in codec.text_encoders] == text_parameters
    assert count(codec.vae) == 83_653_863


@pytest.fixture
def small(monkeypatch):
    """SD 1.5 with a narrow UNet of two resolutions and a narrow VAE."""
    config = ladder.SD15 | dict(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, up_block_types=ladder.UP,
        down_block_types=(ladder.CROSS, ladder.PLAIN))
    pipeline_class, network_class, _, text = ladder.BACKBONES["sd15"]
    monkeypatch.setitem(ladder.BACKBONES, "sd15", (pipeline_class, network_class, config, text))
    vae = ladder.VAE | dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    monkeypatch.setattr(ladder, "VAE", vae)


def test_a_rung(small, tmp_path):
    """States are those of the networks, a step grows with its samples, checkpointing saves.

    Nothing of it takes memory, or stays patched.
    """
    before = forecast.held_bytes(CPU)
    (step, states, flop), (more, same, four_times), (less, *_) = (
        ladder.memory_of("SD 1.5, YOSO, LoRA", samples, less, tmp_path)
        for samples, less in ((2, False), (8, False), (8, True)))
    assert forecast.held_bytes(CPU) - before < 2**24 and yoso.load is common.load
    assert states == pytest.approx(same, rel=0.02) and states < step < more and less < more
    assert flop * 4 == pytest.approx(four_times, rel=1e-6)


def test_judges_have_half_the_bytes(small):
    """Networks without numbers that are held in bf16; they can also go away."""
    with ladder.empty_networks(swiftbrush_v2):
        size = lambda net: sum(p.nbytes for p in net.parameters())
        net = swiftbrush_v2.load("sd15", CPU)[0].net
        whole, numbers = size(net), [p.requires_grad for p in net.parameters()]
        common.hold_in_bf16(net)
        assert 2 * size(net) == whole and [p.requires_grad for p in net.parameters()] == numbers
        assert all(p.dtype == torch.bfloat16 for p in net.parameters())
        net.to("meta")
        assert all(p.is_meta for p in net.parameters())


def test_shared_states(small, tmp_path):
    """Each of four processes has a fourth of the networks' states, and the text encoder and the VAE whole."""
    gc.collect()
    others = forecast.held_bytes(CPU) / 2**30  # what other tests have left in this process
    (step, states, flop), (less, part, same) = (
        ladder.memory_of("SD 1.5, YOSO, all weights", 2, True, tmp_path, processes) for processes in (1, 4))
    with torch.device("meta"):
        codec = ladder.empty_pipeline("sd15", "meta")[1]
    modules = (codec.vae, *codec.text_encoders)
    whole = sum(p.nbytes for module in modules for p in module.parameters()) / 2**30
    part, states = part - others - whole, states - others - whole
    assert part == pytest.approx(states / 4, rel=0.1)  # not all sizes are divisible
    assert less < step and flop == same and not torch.distributed.is_initialized()


def test_the_table(monkeypatch, tmp_path, capsys):
    """A row for each arm and number of samples, with and without checkpointing; an unknown arm is named."""
    sizes = {False: (20.0, 10.0, 8.0), True: (15.0, 10.0, 12.0)}
    monkeypatch.setattr(ladder, "memory_of", lambda arm, samples, checkpointing, *_: sizes[checkpointing])
    path = tmp_path / "rows.json"
    ladder.main(["--arms", "SDXL, Diff-Instruct*", "--samples", "2", "4", "--json", str(path)])
    out, rows = capsys.readouterr().out, json.loads(path.read_text())
    assert [(row["samples"], row["step_GB"], row["checkpointing_GB"], row["TFLOP"]) for row in rows] == [
        (2, 20, 15, 4), (4, 20, 15, 2)]
    assert "| SDXL, Diff-Instruct* | 2 | 10 | 20 | 15 | 4.0 |\n" in out and out.count("\n") == 4


@pytest.mark.parametrize("flags, message", [
    (["--arms", "SD 3"], "--arms SD 3: unknown"), (["--processes", "0"], "--processes 0: must be at least 1"),
    (["--processes", 10**20], "--processes .*: must be at least 1 and below"),
    (["--samples", "1", "0"], "--samples 0: must be at least 1"), (["--samples"], "--samples: expected"),
    (["--recipes", "--json", "x.json"], "--recipes: .*; leave the other flags out"),
    (["--json", "no/where.json"], "--json no/where.json: cannot be written"),
    (["--json", "/proc/x"], "--json /proc/x: cannot be written")])
def test_the_ladder_names_what_is_wrong(flags, message, monkeypatch, capsys):
    """Before the first row."""
    monkeypatch.setattr(ladder, "memory_of", None)
    monkeypatch.setattr(ladder, "print_recipes", lambda recipes: None)
    with pytest.raises(common.UserError, match=message):
        ladder.main(list(map(str, flags)))
    assert not capsys.readouterr().out
