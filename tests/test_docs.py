"""README.md and docs: commands and their flags exist, keys are explained, links lead somewhere."""

import importlib
import re
import shlex
from itertools import chain

import ablate
import evaluate
import pytest
from helpers import ROOT
from torch.distributed.run import get_args_parser

import diff_instruct_star
import swiftbrush_v2
import yoso
from common import UserError
from plumbing.cli import Parser, parse_config

SCRIPTS = {f"{script.__name__}.py": script for script in (yoso, swiftbrush_v2, diff_instruct_star)}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def code_of(page):
    """The code in a page: fenced and indented lines as they are, then the inline pieces, each as one line."""
    fenced = re.findall(r"(?ms)^```.*?\n(.*?)^```", page)
    page = re.sub(r"(?ms)^```.*?^```", "", page)
    indented = re.findall(r"(?m)^ {4,}(?![-|*]).*$", page)
    inline = re.findall(r"`([^`]+)`", re.sub(r"(?m)^ {4,}(?![-|*]).*$", "", page))
    return "\n".join([*fenced, *indented, *(" ".join(piece.split()) for piece in inline)])


def commands_in(code):
    """(launcher's words, program, its words) of every command that runs a program of ours."""
    code = re.sub(r"\\\n *", " ", code)
    pattern = r"(?m)(?:\bpython3? |\btorchrun ([^\n#]*?))((?:tools/)?\w+\.py)(?![\w/])([^\n]*)"
    found = []
    for launcher, program, rest in re.findall(pattern, code):
        rest = re.split(r" {3,}| # | && ", rest)[0].replace("...", "")  # without what is said behind it
        found.append((shlex.split(launcher), program, shlex.split(rest)))
    return found


class Parsed(Exception):
    """Raised in place of what a command would do."""


def expect_flags(program, words, patched):
    """The program takes these words; those of a training also work together."""
    if program in SCRIPTS and words[:1] not in (["sample"], ["merge"]) and "--help" not in words:
        script = SCRIPTS[program]
        script.check(parse_config(script.Config, script.PRESETS, words, "", script.preset_of))
        return
    parse_args = Parser.parse_args

    def parse_and_stop(*arguments):
        raise Parsed(parse_args(*arguments))

    name = program.removesuffix(".py").split("/")[-1]
    with patched.context() as here:
        here.setattr(Parser, "parse_args", parse_and_stop)
        with pytest.raises((Parsed, SystemExit)) as stopped:
            importlib.import_module(name).main(words)
    assert isinstance(stopped.value, Parsed) or stopped.value.code == 0  # of --help
    if name == "forecast":  # which hands the rest on
        args = stopped.value.args[0]
        expect_flags(args.script, args.flags, patched)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_of_a_page_exists(path, monkeypatch):
    """Program, subcommand and flags, by the program's own parser; of torchrun too."""
    for launcher, program, words in commands_in(code_of(path.read_text())):
        assert (ROOT / program).exists(), program
        try:
            expect_flags(program, words, monkeypatch)
            if launcher:
                get_args_parser().parse_args([*launcher, program])
        except (UserError, SystemExit) as error:
            raise AssertionError(f"{path.name}: {program} {shlex.join(words)}: {error}")


@pytest.mark.parametrize("path", [*(ROOT / name for name in SCRIPTS), *TOOLS], ids=lambda path: path.name)
def test_every_command_of_a_docstring_exists(path, monkeypatch):
    docstring = importlib.import_module(path.stem).__doc__
    for _, program, words in commands_in(docstring):
        try:
            expect_flags(program, words, monkeypatch)
        except UserError as error:
            raise AssertionError(f"{path.name}: {program} {shlex.join(words)}: {error}")


def test_commands_are_found():
    """All three scripts, all subcommands, several tools; and a command of a page is read as it is meant."""
    commands = list(chain(*(commands_in(code_of(page.read_text())) for page in PAGES)))
    assert {program for _, program, _ in commands} >= set(SCRIPTS) | {f"tools/{path.name}" for path in TOOLS}
    assert {words[0] for _, _, words in commands if words} >= {"sample", "merge", "yoso"}
    assert any(launcher for launcher, _, _ in commands)
    page = ("Text `python a.py\n--x 1`, python none.py.\n\n    torchrun --nproc-per-node 2 b.py --y \\\n"
            "        --z 'q r' ...      # said\n\n```\npython tools/c.py\n```\n")
    assert commands_in(code_of(page)) == [
        ([], "tools/c.py", []), (["--nproc-per-node", "2"], "b.py", ["--y", "--z", "q r"]),
        ([], "a.py", ["--x", "1"])]


@pytest.mark.parametrize("program, words", [
    ("absent.py", []), ("yoso.py", ["sample", "--steps", "2"]), ("yoso.py", ["--sped", "2"]),
    ("yoso.py", ["--rank", "4"]), ("swiftbrush_v2.py", ["merge"]), ("yoso.py", ["merge", "--base", "a"]),
    ("tools/evaluate.py", ["--features"]), ("tools/ablate.py", ["yolo"]),
    ("tools/benchmark.py", ["yoso", "-x"]), ("tools/ladder.py", ["--samples", "many"]),
    ("tools/forecast.py", ["yoso.py", "--model", "m", "--rnk", "4"]), ("tools/pretrain.py", ["--teacher"])])
def test_a_wrong_command_is_noticed(program, words, monkeypatch):
    with pytest.raises((UserError, ImportError)):
        expect_flags(program, words, monkeypatch)


def explained():
    """The keys that have a row in docs/metrics.md."""
    return set(re.findall(r"(?m)^\| `(\w+)` \|", (ROOT / "docs" / "metrics.md").read_text()))


def test_every_key_of_a_report_is_explained():
    """Of pictures with captions, in all features, with all scores."""
    clip = str(ROOT / ablate.CLIP)
    report = evaluate.evaluate(model=ROOT / "assets/mini-student", num=5, nfe=1, features=clip, clip=clip,
                               judge=clip, reward=clip, device="cpu")
    assert {"right", "judge_frechet", "reward_score", "informative_prior"} <= report.keys() <= explained()


def test_every_key_that_is_explained_exists():
    """Those of metrics.jsonl stand in the code, some without L_ or grad_; for the rest see unexplained()."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    log = page[page.index("## Keys of metrics.jsonl"):page.index("## Keys of the report")]
    keys = re.findall(r"(?m)^\| `(\w+)` \|", log)
    files = [*SCRIPTS, "plumbing/run.py", "plumbing/students.py"]
    code = "\n".join((ROOT / name).read_text() for name in files)
    assert len(keys) > 25 and len(keys) == len(set(keys))
    for key in keys:
        assert re.search(rf"\b(L_|loss_|grad_)?{re.sub('^(L|grad)_', '', key)}\b", code), key


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """To files that exist, and to headings that they have."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("http"):
            continue
        place, _, heading = link.partition("#")
        target = path.parent / place if place else path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text())
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
            assert heading in slugs, link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_figures_are_written_whole(path):
    """0.0065 and not .0065; and the README stays short, its last line ended like the others."""
    text = path.read_text()
    assert not re.findall(r"(?<![\w./)\]])\.\d+", text) and text.endswith("\n")
    assert path.name != "README.md" or text.count("\n") <= 200
