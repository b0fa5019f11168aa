"""Labelling functions that need no model: regular expressions and Python functions, and the checks of any vote.

Each is made of its part of the label file. `digest` says what its votes depend on.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from importlib.abc import InspectLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType
from typing import Any

from ...errors import UserError
from .label_file import FunctionSpec, QuestionSpec
from .votes import Vote, digest_of


class _ReadSource(InspectLoader):
    """Of a module: what was read, and nothing that its file or a cache of it holds by now; the digest is of that."""

    def __init__(self, source: str, file: Path):
        self._source, self._file = source, file

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source, str(self._file))


class PatternFunction:
    """Votes for its label where the pattern is found; where not, it abstains, or says that the label does not hold."""

    def __init__(self, spec: FunctionSpec, question: QuestionSpec):
        assert spec.pattern is not None and spec.label is not None
        self._pattern, self._label = re.compile(spec.pattern), spec.label
        self._several = question.several
        self._says_absent = question.several and spec.otherwise != "abstain"
        self.digest = digest_of("pattern", spec.pattern, spec.label, str(self._says_absent), str(self._several))

    async def votes(self, texts: Sequence[tuple[int, str]]) -> AsyncGenerator[tuple[int, Vote]]:
        for place, text in texts:
            found = self._pattern.search(text) is not None
            if self._several:
                yield place, {self._label: found} if found or self._says_absent else None
            else:
                yield place, self._label if found else None


class PythonFunction:
    """Calls a function of a file with each text: a label, None to abstain, or with `several` the labels that hold."""

    def __init__(self, spec: FunctionSpec, question: QuestionSpec, at: str):
        assert spec.python is not None
        file, _, self._name = spec.python.rpartition(":")
        self._question, self._at = question, at
        try:
            source = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{at}.python: cannot read {file}: {reason}", param=f"{at}.python") from None
        self._call = self._loaded(Path(file), source)
        self.digest = digest_of("python", source, self._name, *question.labels, str(question.several))

    async def votes(self, texts: Sequence[tuple[int, str]]) -> AsyncGenerator[tuple[int, Vote]]:
        for place, text in texts:
            try:
                answer = self._call(text)
            except Exception as error:
                raise UserError(
                    f"{self._at}: {self._name} raised {type(error).__name__}: {error}, for the text {text[:80]!r}; let "
                    f"it return None where it cannot tell",
                    param=self._at,
                ) from error
            yield place, checked_vote(answer, self._question, f"{self._at}: {self._name} of {text[:80]!r}")

    def _loaded(self, file: Path, source: str) -> Callable[[str], Any]:
        loader = _ReadSource(source, file)
        spec = spec_from_loader(f"label_functions_{digest_of(str(file))[:8]}", loader, origin=str(file))
        assert spec is not None
        module = module_from_spec(spec)
        module.__file__ = str(file)
        try:
            loader.exec_module(module)
        except Exception as error:
            at = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise UserError(
                f"{self._at}.python: {file}{at} cannot be imported: {type(error).__name__}: {error}",
                param=f"{self._at}.python",
            ) from error
        called = getattr(module, self._name, None)
        if not callable(called):
            raise UserError(f"{self._at}.python: {file} has no function {self._name!r}", param=f"{self._at}.python")
        return called


def checked_vote(answer: Any, question: QuestionSpec, at: str) -> Vote:
    """What a function returned as a vote: with `several`, it speaks for every label. Raises `UserError`."""
    if answer is None:
        return None
    known = set(question.labels)
    if question.several:
        said = [answer] if isinstance(answer, str) else list(answer) if isinstance(answer, Iterable) else [answer]
        if not all(isinstance(label, str) for label in said):
            raise UserError(f"{at} is {answer!r}; labels in a list, or None to abstain, are expected", param="python")
        unknown = [label for label in said if label not in known]
        if not unknown:
            return {label: label in said for label in question.labels}
    else:
        unknown = [] if isinstance(answer, str) and answer in known else [answer]
        if not unknown:
            return answer
    raise UserError(
        f"{at} is {answer!r}; {unknown[0]!r} is none of the labels {', '.join(question.labels)}", param="python"
    )
