"""How much of JSON Schema is enforced, how much is refused by name, and is anything enforced wrongly?

Runs the public JSON-Schema-Test-Suite (as packed into jsonschema's source distribution) through the grammar compiler.
Each instance is written as JSON, cut into the model's tokens and offered token by token. A schema is

    supported  every valid instance is accepted as Python's json.dumps writes it, every invalid one refused
    stricter   the same, but a valid instance is accepted only in another key order or number format
    narrower   the same, but some valid instance is refused in every form (formats are asserted, for one)
    refused    not compiled; the message says why
    wrong      an invalid instance is accepted, in whatever form; must be 0

    python -m bench.json_schema_suite [--draft draft2020-12] ... [--save]
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from specserve.errors import UserError
from specserve.grammar.compiler import GrammarCompiler
from specserve.grammar.grammar import CompiledGrammar
from specserve.messages import GrammarSpec
from specserve.model.store import resolve_model
from specserve.text.special_tokens import eos_token_ids, load_backend_tokenizer

from . import common, options

VERSION = "4.26.0"  # of jsonschema; its source distribution holds the suite of its day
DRAFTS = ("draft2020-12", "draft2019-09", "draft7", "draft6", "draft4")
MAX_FORMS = 256
STATUSES = ("supported", "stricter", "narrower", "refused", "wrong")
_KEYWORDS = re.compile(r"keyword '([^']*)'|Unimplemented keys: \[([^\]]*)\]|(\$ref) to|Unknown (format: \S+)|(oneOf)")


def suite_dir() -> Path:
    """The unpacked suite; downloaded once."""
    target = common.cache_dir() / f"json-schema-suite-{VERSION}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "-d", str(target.parent), f"jsonschema=={VERSION}"], check=True)
        with tarfile.open(target.parent / f"jsonschema-{VERSION}.tar.gz") as archive:
            archive.extractall(target.parent / "unpacked", filter="data")
        (target.parent / "unpacked" / f"jsonschema-{VERSION}" / "json").rename(target)
    return target / "tests"


def forms(value: Any, numbers: bool) -> Iterator[str]:
    """JSON texts of `value`, first as json.dumps writes it, then in other key orders and, for `numbers`, formats."""
    yield json.dumps(value, ensure_ascii=False)
    yield json.dumps(value)
    yield from itertools.islice(_forms(value, numbers), MAX_FORMS)


def _forms(value: Any, numbers: bool) -> Iterator[str]:
    if isinstance(value, dict):
        orders = itertools.permutations(value.items()) if len(value) <= 4 else iter([tuple(value.items())])
        for items in orders:
            keys = [json.dumps(key, ensure_ascii=False) for key, _ in items]
            for parts in itertools.product(*[list(itertools.islice(_forms(item, numbers), 8)) for _, item in items]):
                yield "{" + ", ".join(f"{key}: {part}" for key, part in zip(keys, parts, strict=True)) + "}"
    elif isinstance(value, list):
        for parts in itertools.product(*[list(itertools.islice(_forms(item, numbers), 8)) for item in value]):
            yield "[" + ", ".join(parts) + "]"
    else:
        yield json.dumps(value, ensure_ascii=False)
        if numbers and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
            yield str(int(value))


class Checker:
    """Offers texts to grammars, token by token."""

    def __init__(self, model_dir: Path):
        self._tokenizer = load_backend_tokenizer(model_dir)
        self._eos = sorted(eos_token_ids(model_dir))
        self._compiler = GrammarCompiler(self._tokenizer, self._tokenizer.get_vocab_size(), self._eos)

    def compile(self, schema: Any) -> CompiledGrammar:
        return self._compiler.compile(GrammarSpec("json_schema", json.dumps(schema)))

    def accepts(self, compiled: CompiledGrammar, text: str) -> bool:
        grammar = compiled.start()
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not all(grammar.commit([token]) for token in tokens):
            return False
        return grammar.is_terminated or any(grammar.allows(token) for token in self._eos)

    def status(self, compiled: CompiledGrammar, tests: list[dict[str, Any]]) -> tuple[str, list[str]]:
        """The worst status over the tests of a schema, and the instances that made it so."""
        worst, why = "supported", []
        for test in tests:
            # Draft 4 tells 1.0 from 1: an invalid instance keeps its numbers as they are written.
            texts = dict.fromkeys(forms(test["data"], numbers=test["valid"]))
            accepted = [self.accepts(compiled, text) for text in texts]
            if not test["valid"]:
                status = "wrong" if any(accepted) else "supported"
            else:
                status = "supported" if accepted[0] else "stricter" if any(accepted) else "narrower"
            if status != "supported":
                why.append(f"{status}: {test['description']}: {json.dumps(test['data'])[:80]}")
            worst = max(worst, status, key=STATUSES.index)
        return worst, why


def reason(error: str) -> str:
    """The keyword that a refusal names."""
    match = _KEYWORDS.search(error)
    return next(group for group in match.groups() if group) if match else error.partition(":")[2].strip()[:60] or error


@click.command(help=__doc__.partition("\n")[0])
@click.option("--draft", "drafts", multiple=True, type=click.Choice(DRAFTS), default=DRAFTS[:1], show_default=True)
@click.option("--model", default="", help="Whose tokens; default: specserve's default model.")
@click.option("--verbose", is_flag=True, help="Print every schema that is not supported, with its instances.")
@options.save("json_schema_suite")
def main(drafts: tuple[str, ...], model: str, verbose: bool, save: bool) -> None:
    checker, root = Checker(resolve_model(model)), suite_dir()
    figures: dict[str, Any] = {}
    for draft in drafts:
        counts, refusals = Counter({status: 0 for status in STATUSES}), Counter[str]()
        for path in sorted((root / draft).rglob("*.json")):
            for case in json.loads(path.read_text(encoding="utf-8")):
                try:
                    compiled = checker.compile(case["schema"])
                except UserError as error:
                    status, why = "refused", [str(error)]
                    refusals[reason(str(error))] += 1
                else:
                    status, why = checker.status(compiled, case["tests"])
                counts[status] += 1
                if status == "wrong" or (verbose and status != "supported"):
                    click.echo(f"{status}: {path.relative_to(root)}: {case['description']}")
                    for line in why:
                        click.echo(f"    {line}")
        figures[draft] = {**counts, "refused_by": dict(refusals.most_common(20))}
        click.echo(f"{draft}: {dict(counts)}")
    fields = {"commit": common.commit(), "versions": common.versions("llguidance", "tokenizers")}
    common.report("json_schema_suite", {**fields, "suite": f"jsonschema {VERSION}", "figures": figures}, save)
    if any(figures[draft]["wrong"] for draft in drafts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
