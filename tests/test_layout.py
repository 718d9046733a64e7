"""Who imports whom: no import runs back up from common over plumbing and the scripts to tools and tests."""

import ast
import graphlib

import pytest
from helpers import ROOT

SCRIPTS = {"yoso", "swiftbrush_v2", "diff_instruct_star"}
PLUMBING, SUPPLEMENTS = (
    {f"{name}.{path.stem}" for path in (ROOT / name).glob("[!_]*.py")} | {name}
    for name in ("plumbing", "supplements"))
TOOLS = {path.stem for path in (ROOT / "tools").glob("*.py")} | {"tools"}
TESTS = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests"}
OURS = {"common"} | SCRIPTS | PLUMBING | SUPPLEMENTS | TOOLS | TESTS


def imports(path):
    """Our modules that a file imports, wherever in it, as statements or through importlib.import_module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    beginnings = {name.rsplit(".", i)[0] for name in found for i in range(name.count(".") + 1)}
    return beginnings & OURS


def test_the_imports_are_found(tmp_path):
    (tmp_path / "file.py").write_text("""
import os, common
from plumbing.cli import flag
def function():
    from plumbing import run
    import tools.plot
    importlib.import_module("yoso")
""")
    plumbing = {"plumbing", "plumbing.cli", "plumbing.run"}
    assert imports(tmp_path / "file.py") == {"common", "tools", "yoso"} | plumbing


def test_common_imports_nothing_of_ours():
    assert imports(ROOT / "common.py") == set()


@pytest.mark.parametrize("name", sorted(PLUMBING - {"plumbing"}))
def test_plumbing_imports_common_and_plumbing(name):
    assert imports(ROOT / f"{name.replace('.', '/')}.py") <= {"common"} | PLUMBING


def test_plumbing_imports_in_one_direction():
    modules = PLUMBING - {"plumbing"}
    order = {name: imports(ROOT / f"{name.replace('.', '/')}.py") & modules for name in modules}
    graphlib.TopologicalSorter(order).prepare()  # raises CycleError


@pytest.mark.parametrize("name", sorted(SUPPLEMENTS - {"supplements"}))
def test_a_supplement_imports_common(name):
    assert imports(ROOT / f"{name.replace('.', '/')}.py") <= {"common"}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_imports_common_plumbing_and_supplements(name):
    assert imports(ROOT / f"{name}.py") <= {"common"} | PLUMBING | SUPPLEMENTS


def test_tools_import_no_test():
    for path in (ROOT / "tools").glob("*.py"):
        assert not imports(path) & TESTS, path.name


def test_a_test_file_imports_none_of_the_others():
    """Several share helpers.py, tiny.py and reference.py, which hold no tests."""
    for path in (ROOT / "tests").glob("*.py"):
        assert imports(path) & TESTS <= {"helpers", "tiny", "reference"}, path.name


def test_every_module_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS | {"common"}
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert folders == {"plumbing", "supplements", "tools", "tests"}
