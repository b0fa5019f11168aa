"""What docs/security.md says of tests and dependencies is so, and served code runs nothing that it reads."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest
from places import ROOT

TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
SERVED = ("specserve", "kernels", "drafters")  # training reads checkpoints that it wrote itself
# Calls that run what they read.
EXECUTING = {"eval", "exec", "compile", "__import__", "unsafe_load", "full_load"}
MODULES = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "runpy"}


def section(title: str) -> list[list[str]]:
    """The rows of its table, without the head."""
    body = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in body.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_every_promise_names_tests_that_exist():
    promises = section("What is promised")
    assert len(promises) > 15
    for promise, tests in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named and tests.count("`") == 2 * len(named), promise
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert name in found, f"{promise}: {path} has no {name}"


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert {package for package, _ in section("Dependencies")} == needed


def test_links_of_the_page_lead_somewhere():
    for target in re.findall(r"\]\((?!https)([^)#]+)", TEXT + (ROOT / "SECURITY.md").read_text(encoding="utf-8")):
        assert (ROOT / "docs" / target).exists() or (ROOT / target).exists(), target


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if last in EXECUTING and called in (last, f"builtins.{last}", f"yaml.{last}", f"importlib.{last}"):
            found.append(called)
        if called == "torch.load" or keywords.get("trust_remote_code", "False") != "False":
            found.append(called)
        if called in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            found.append(called)
        if called == "yaml.load" and keywords.get("Loader") != "strict_loader()":
            found.append(called)
        if keywords.get("shell", "False") != "False" or called == "os.system":
            found.append(called)
    return found


def test_served_code_runs_nothing_that_it_reads():
    files = [path for folder in SERVED for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    wrong = {str(path.relative_to(ROOT)): offences(path.read_text(encoding="utf-8")) for path in files}
    assert not {path: found for path, found in wrong.items() if found}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=True)", "eval(x)"),
        *("yaml.load(x)", "yaml.load(x, Loader=yaml.Loader)", "np.load(f, allow_pickle=True)", "os.system(x)"),
        *("AutoModel.from_pretrained(x, trust_remote_code=True)", "subprocess.run(x, shell=True)"),
    ],
)
def test_what_would_run_it_is_found(source):
    assert offences(source)
