"""tools/break_it.py: its arms are the rows of the docs, their lines and tests exist, and some are made."""

import ast
import importlib
import json
import re
from types import SimpleNamespace

import break_it
import pytest
from ablate import LENGTH
from helpers import ROOT, TINY, finish, start
from PIL import Image

from common import UserError
from plumbing.cli import parse_config

LINES = [(method, name) for method, arms in break_it.ARMS.items() for name, arm in arms.items() if arm.before]
STOPS, DRIFTS = "D's loss reaches G", "the printed loss of D"


def rows_of(method):
    """The rows of the docs' table by their names: the inline code of the change, and the cell of the test."""
    page = (ROOT / "docs" / f"{method}.md").read_text()
    lines = re.search(r"(?m)^\| change \| .*\n\|[-|]+\n((?:\|.*\n)+)", page)[1].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {name: (re.findall(r"`([^`]+)`", where), caught) for name, where, *_, caught in cells}


@pytest.mark.parametrize("method", break_it.ARMS)
def test_the_arms_are_the_rows_of_the_docs(method):
    """With the same flags, which the script takes, or with the same test, which exists."""
    arms, rows, script = break_it.ARMS[method], rows_of(method), importlib.import_module(method)
    assert all(name.endswith(break_it.AS_IT_IS) for name in arms.keys() - rows.keys())
    args = SimpleNamespace(method=method, iterations=3, seed=0, out=ROOT)
    assert len({break_it.folder_of(args, name) for name in arms}) == len(arms)
    for name in arms:
        flags = break_it.flags_of(args, name)
        script.check(parse_config(script.Config, script.PRESETS, flags, "", script.preset_of))
    for name, (code, caught) in rows.items():
        arm = arms[name]
        if caught.startswith("a flag"):
            assert not arm.before and not arm.test and code[0] in arm.flags, name
        else:
            file, test = arm.test.split("::")
            functions = ast.parse((ROOT / "tests" / file).read_text()).body
            assert test == re.search(r"`(test_\w+)`", caught)[1], name
            assert test in {function.name for function in functions if isinstance(function, ast.FunctionDef)}


@pytest.mark.parametrize("method, name", LINES)
def test_an_arm_changes_the_line_that_the_docs_name(method, name):
    """One line of the named function, to what the docs say; the script still compiles."""
    script, (function, *code) = (ROOT / f"{method}.py").read_text(), rows_of(method)[name][0]
    changed = break_it.changed(script, break_it.ARMS[method][name])
    compile(changed, f"{method}.py", "exec")
    lines = zip(script.splitlines(), changed.splitlines(), strict=True)
    (number, line), = [(i, new) for i, (old, new) in enumerate(lines, 1) if old != new]
    named = [node for node in ast.walk(ast.parse(script)) if getattr(node, "name", "") == function]
    assert any(node.lineno <= number <= node.end_lineno for node in named)
    assert any(all(part in line for part in piece.split("...")) for piece in code), line


def test_a_line_that_is_not_there_once():
    for script in ("", "p.fake.detach() p.fake.detach()"):
        with pytest.raises(UserError, match=f"has 'p.fake.detach..' {script.count('fake')} times, not once"):
            break_it.changed(script, break_it.YOSO[STOPS])


@pytest.mark.parametrize("flags, message", [
    (["--iterations", "-1"], "--iterations -1: must be at least 0"), (["--jobs", "0"], "--jobs 0: must be"),
    (["--num", "0"], "--num 0: must be at least 5"), (["--seed", "-1"], "--seed -1: must be at least"),
    (["--arms", "GAN"], "--arms GAN: unknown"), (["--out", ""], "--out '': must be given"),
    (["--out", "LICENSE"], "--out LICENSE/.*: cannot be written"), (["--out", "/proc/x"], "--out /proc/x/"),
    (["--table", "--out", "no/where"], "--out no/where: there is no such folder"),
    (["--arm", "x"], "unrecognized arguments: --arm x"), (["GAN"], "unrecognized arguments: GAN")])
def test_break_it_names_what_is_wrong(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(break_it, "run_row", None)
    with pytest.raises(UserError, match=message):
        break_it.main(["yoso", *flags])


@pytest.mark.parametrize("status, last, wanted", [
    ((0, 1), "RuntimeError: twice", dict(caught="PASSES", stops="RuntimeError: twice")),
    ((1, 2), "L_D is not finite", dict(caught="fails, as it should", stops="L_D is not finite")),
    ((1, 2), "--lr -1: must be", r"train.log: --lr -1: must be \(exit status 2\)"),
    ((1, -9), "", r"train.log: nothing said \(exit status -9\)"),
    ((4, 0), "no such test", "test.log: no such")])
def test_what_an_arm_ends_in(status, last, wanted, tmp_path, monkeypatch):
    """A mistake's error is a result, any other is told; what the test said is kept in any case."""
    ended = iter(status)
    monkeypatch.setattr(break_it, "run_python", lambda words, log, **options: (next(ended), last))
    args = ["yoso", "--arms", STOPS, "--iterations", "2", "--num", "10", "--out", str(tmp_path)]
    if isinstance(wanted, dict):
        break_it.main(args)
        row = json.loads((tmp_path / "d-s-loss-reaches-g" / "row.json").read_text())
        assert wanted.items() <= row.items()
        break_it.main(args)  # nothing is run again
        with pytest.raises(UserError, match="row.json: measured with .* choose another --out"):
            break_it.main([*args, "--seed", "1"])
        assert Image.open(tmp_path / "yoso.png").getpixel((300, 30)) == (128, 128, 128)
    else:
        with pytest.raises(UserError, match=wanted):
            break_it.main(args)
        assert (tmp_path / "d-s-loss-reaches-g" / "row.json").exists() == (status[0] == 1)


def test_the_last_line_of_a_log(tmp_path):
    """Not that of a progress bar, which ends behind the error."""
    program = r"print('  0%|  | 0/2 [00:00<?]\nError: x\n\r  0%|  | 0/2 [00:03<?]'); exit(3)"
    assert break_it.run_python(["-c", program], tmp_path / "arm" / "log") == (3, "Error: x")
    assert break_it.run_python(["-c", ""], tmp_path / "arm" / "log") == (0, "")


@pytest.mark.slow
def test_an_arm_from_end_to_end(tmp_path, monkeypatch, capsys):
    """First its test alone, then its row, a picture and a table; then nothing is left to do."""
    monkeypatch.setitem(break_it.FLAGS, "yoso", [*LENGTH, *TINY])
    args = ["yoso", "--arms", DRIFTS, "--iterations", "2", "--num", "10", "--out", str(tmp_path)]
    break_it.main([*args, "--no-train"])
    assert capsys.readouterr().out.count("not run") == len(break_it.COLUMNS["yoso"])
    assert not (tmp_path / "yoso.png").exists()
    break_it.main(args)
    table = capsys.readouterr().out
    row = json.loads((tmp_path / "the-printed-loss-of-d" / "row.json").read_text())
    assert f"| {DRIFTS} | {row['clean']:.3g} | {row['sharp']:.3g} | {row['recall']:.3g} | " in table
    assert table.endswith("| `test_y3_optimal_discriminator_loss` fails, as it should |\n")
    picture = Image.open(tmp_path / "yoso.png")
    assert len(picture.crop((picture.width - 66, 2, picture.width - 2, 66)).getcolors(10**6)) > 10
    # The copy's tests are no tests of the folder that they are in.
    out, _ = finish(start("-m", "pytest", "-n", "0", "--collect-only", "-q", tmp_path, cwd=tmp_path), code=5)
    assert "no tests collected" in out
    monkeypatch.setattr(break_it, "run_python", None)
    break_it.main(args)
    break_it.main(["yoso", "--table", "--out", str(tmp_path)])
    assert capsys.readouterr().out == 2 * table
