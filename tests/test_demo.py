"""The page of tools/demo.py: what it draws and times, without gradio; and once with it."""

import json
import re
import socket
import sys

import demo
import pytest
import tiny
import torch
from helpers import ROOT, fails

from common import InformativePrior, ddim_sample, draw_samples, load, one_step
from plumbing.grids import to_levels
from yoso import Sampler, draw_pictures

CAPTION = "a large red circle on white"


@pytest.fixture(scope="module")
def mini():
    """(teacher, student) of assets/, as yoso.Samplers."""
    return [Sampler(*load(ROOT / "assets" / name)) for name in ("mini-sd", "mini-student")]


def test_the_noise_at_the_ends_is_that_of_the_seeds(mini):
    """As `sample` draws it; between them it keeps the length of a standard normal, and equal seeds stay."""
    noise = {u: demo.noise_of((3, 7), u, (4, 8, 8)) for u in (0, 0.5, 1)}
    student = mini[1]
    for u, seed in ((0, 3), (1, 7)):
        picture, _ = demo.panels(*mini, CAPTION, noise[u], 2, 1, ("student",))["student"]
        sampled = to_levels(draw_samples(student.generator, student.codec, [CAPTION], seed))[0]
        assert (picture.int() - sampled.int()).abs().max() <= 1
    lengths = [noise[u].square().mean().sqrt().item() for u in noise]
    assert lengths == pytest.approx([1] * 3, abs=0.1)
    assert torch.allclose(demo.noise_of((3, 3), 0.5, (4, 8, 8)), noise[0], atol=1e-5)


def test_panels_are_what_they_say(mini):
    """One unguided call of each network, and the teacher's guided DDIM, from the same noise; with times."""
    (teacher, student), noise = mini, demo.noise_of((0, 1), 0.3, (4, 8, 8))
    drawn = demo.panels(*mini, CAPTION, noise, 4, 2.0)
    assert tuple(drawn) == demo.ALL and all(milliseconds > 0 for _, milliseconds in drawn.values())
    z, codec = noise[:1], teacher.codec
    cond, null = codec.cond([CAPTION]), codec.null(1)
    expected = dict(teacher=one_step(teacher.generator, z, cond),
                    student=one_step(student.generator, z, cond),
                    many=ddim_sample(teacher.generator, z, 4, cond, null, 2.0))
    for name, x0 in expected.items():
        assert torch.equal(drawn[name][0], to_levels(codec.decode(x0))[0]), name
    assert not torch.equal(drawn["teacher"][0], drawn["many"][0])
    assert tuple(demo.panels(*mini, CAPTION, noise, 4, 2.0, demo.ONE_CALL)) == demo.ONE_CALL


def test_calls_of_the_network_are_as_announced(mini):
    """A call each, and two a step with guidance, one without."""
    teacher, noise, calls = mini[0], demo.noise_of((0, 1), 0, (4, 8, 8)), []
    hook = teacher.generator.net.register_forward_hook(lambda *_: calls.append(1))
    try:
        for name, guidance, expected in (("teacher", 2.0, 1), ("many", 2.0, 10), ("many", 1.0, 5)):
            calls.clear()
            demo.panels(*mini, CAPTION, noise, 5, guidance, (name,))
            assert len(calls) == expected
    finally:
        hook.remove()


def test_a_students_prior_is_its_start(tmp_path):
    """A student of YOSO with an informative prior starts as yoso.py lets it start."""
    tiny.sd().save_pretrained(tmp_path)
    prior = InformativePrior(torch.full((4, 8, 8), 3.0), torch.ones(4, 1, 1))
    student = Sampler(*load(tmp_path), prior)
    noise = demo.noise_of((5, 6), 0, student.codec.shape)
    picture, _ = demo.panels(student, student, "x", noise, 1, 1, ("student",))["student"]
    sampled = to_levels(next(draw_pictures(student, ["x"], 1, 5)))[0]
    assert (picture.int() - sampled.int()).abs().max() <= 1


def test_a_panel_as_html():
    """Enlarged by the browser, a small picture without blur."""
    black = lambda size: torch.zeros(3, size, size, dtype=torch.uint8)
    page = lambda size: demo.figure("A title", "a note", black(size), 1234.4)
    assert "pixelated" in page(32) and "pixelated" not in page(512)
    assert {"A title", "a note", "1,234 ms"} <= set(re.findall(r">([^<]+)<", page(32)))


def test_demo_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    """Flags, models that do not fit one another, and gradio where it is missing, each in one line."""
    refused = lambda *flags: fails(monkeypatch, capsys, demo, "--device", "cpu", *flags)
    assert "--steps 0: must be at least 1" in refused("--steps", 0)
    assert "--port 70000: must be at least 1 and at most 65535" in refused("--port", 70000)
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    tiny.pixel(tmp_path / "pixel", classes=())
    mini = ["--teacher", ROOT / "assets/mini-sd"]
    for flag in ("--teacher", "--student"):
        message = f"demo.py: {flag} {tmp_path}/absent: there is no such directory; give "
        assert refused(*mini, flag, tmp_path / "absent").startswith(message)
    assert "give a student of this teacher" in refused(*mini, "--student", tmp_path / "pixel")
    pair = ["--teacher", tmp_path / "pixel", "--student", tmp_path / "pixel"]
    assert "--guidance 2.0: " in refused(*pair)
    path = tmp_path / "pixel/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(num_train_timesteps=20)))
    assert "--steps 25: " in refused(*pair, "--guidance", 1)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "gradio' in fails(monkeypatch, capsys, demo)


def test_the_page_answers(mini, monkeypatch, capsys):
    """All panels, the two that follow the slider, a seed that is none, and a port that is taken."""
    pytest.importorskip("gradio")
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = demo.build(*mini, CAPTION, 2, 2.0)
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, quiet=True,
                    prevent_thread_lock=True)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False)
        shown = client.predict(CAPTION, 0.5, 0, 1, api_name="/all")
        assert [re.search('"title">([^<]*)', html)[1] for html in shown] == [
            "Teacher, 1 step", "Student, 1 step", "Teacher, 2 steps"]
        assert "4 network calls" in shown[2]
        assert len(client.predict(CAPTION, 0.5, 0, 1, api_name="/one_call")) == 2
        for seed in (None, -1):
            with pytest.raises(AppError, match="both seeds"):
                client.predict(CAPTION, 0.5, seed, 1, api_name="/all")
        assert page.analytics_enabled is False
        taken = fails(monkeypatch, capsys, demo, "--port", port, "--device", "cpu", "--steps", 1)
        assert f"--port {port}: is taken" in taken
    finally:
        page.close(verbose=False)
