"""What docs/reliability.md says of tests is so: each exists, and is slow where that is said and only there."""

from __future__ import annotations

import ast
import re

from places import ROOT

TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`( \(slow\))?")


def is_slow(function: ast.AST, module: ast.Module) -> bool:
    """Whether all of its cases are."""
    marks = [node.value for node in module.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    return any("slow" in ast.unparse(mark) for mark in marks) or any(
        ast.unparse(mark) == "pytest.mark.slow" for mark in function.decorator_list
    )


def test_every_row_names_tests_that_exist_and_says_which_are_slow():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) > 60 and not [row for row in TEXT.splitlines() if row.startswith("| ") and row.endswith("|  |")]
    for path, name, slow in NAMED.findall(TEXT):
        module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {
            node.name: node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, f"{path} has no {name}"
        assert is_slow(functions[name], module) == bool(slow), f"{path}::{name}"
    assert TEXT.count("`tests/") == len(NAMED.findall(TEXT))
