"""Write the rows of the demo tasks that pool (search, rerank, tags) from those of summary and debtags.

search: a package's one-line description finds its long one; no row resembles a held-out one. rerank: the same, among
documents that BM25 takes for the nearest and, with --embedder, an adapter that embeds. tags: facets of a package as
questions about its description, answered in one pass. Needs rank-bm25.

    python examples/make_rows.py --data examples/data --out out/rows
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rank_bm25 import BM25Okapi

Pair = tuple[str, str]  # a one-line description and a long one
QUESTIONS = ("section", "role", "implemented_in", "interface", "use", "works_with", "suite")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def summary_pairs(rows: list[dict[str, Any]]) -> list[Pair]:
    found = []
    for row in rows:
        question, answer = (message["content"] for message in row["messages"][-2:])
        found.append((answer, question.partition("\n\n")[2]))
    return found


def debtags_pairs(rows: list[dict[str, Any]]) -> list[Pair]:
    """A prompt is the package's name, its line, and its description."""
    return [(line, rest) for _, line, rest in (row["prompt"].split("\n", 2) for row in rows)]


def is_near(one: frozenset[str], other: frozenset[str], share: float) -> bool:
    return len(one & other) > share * len(one | other)


def apart(pairs: list[Pair], held_out: list[Pair]) -> list[Pair]:
    """Those of `pairs`, each once, that no held-out one resembles: in its line, a paragraph, or half of its words."""
    lines = {line.lower() for line, _ in held_out}
    known = {part for _, text in held_out for part in paragraphs(text)}
    bags = [frozenset(words(text)) for _, text in held_out]
    found = []
    for line, text in dict.fromkeys(pairs):
        bag = frozenset(words(text))
        resembles = line.lower() in lines or any(part in known for part in (text, *paragraphs(text)))
        if not resembles and not any(is_near(bag, other, 0.5) for other in bags):
            found.append((line, text))
    return found


def paragraphs(text: str) -> list[str]:
    """Long enough to say something."""
    return [part.strip() for part in text.split("\n\n") if len(part.strip()) > 60]


class Nearest:
    """The documents that rank highest for a query, by BM25 and, with an adapter that embeds, by cosines in turn."""

    def __init__(self, pairs: list[Pair], embedder: Path | None = None):
        self._documents = list(dict.fromkeys(text for _, text in pairs))
        self._bags = [frozenset(words(text)) for text in self._documents]
        self._index = BM25Okapi([words(text) for text in self._documents])
        self._cosines = cosines_of(embedder, pairs, self._documents) if embedder is not None else {}

    def __call__(self, pair: Pair, num: int) -> list[str]:
        """Without its own, and without those of nearly the same words, which probably fit, too."""
        own, found = frozenset(words(pair[1])), []
        lists = [self._order(self._index.get_scores(words(pair[0])))]
        if pair[0] in self._cosines:
            lists.append(self._order(self._cosines[pair[0]]))
        for idx in itertools.chain.from_iterable(zip(*lists, strict=True)):
            if len(found) == num:
                break
            if not is_near(self._bags[idx], own, 0.8) and self._documents[idx] not in found:
                found.append(self._documents[idx])
        return found

    def _order(self, scores: Sequence[float]) -> list[int]:
        return sorted(range(len(scores)), key=lambda idx: -scores[idx])


def cosines_of(embedder: Path, pairs: list[Pair], documents: list[str]) -> dict[str, Sequence[float]]:
    """Of each line with all documents."""
    from specserve.adapters.pooling_config import parse_pooling_config
    from specserve.model.store import resolve_model
    from specserve.text.tokenizer import TextTokenizer
    from specserve.training.pooling.examples import ExampleEncoder
    from specserve.training.pooling.served import ServedTexts

    model_dir = resolve_model("")
    shape = parse_pooling_config(embedder.name, (embedder / "pooling_config.json").read_bytes())
    encoder, lines = ExampleEncoder(TextTokenizer(model_dir), shape), list(dict.fromkeys(line for line, _ in pairs))
    texts = [*map(encoder.query, lines), *map(encoder.document, documents)]
    vectors = ServedTexts(model_dir, embedder, max(map(len, texts))).vectors(texts)
    return dict(zip(lines, (vectors[: len(lines)] @ vectors[len(lines) :].T).tolist(), strict=True))


def search_rows(pairs: list[Pair], nearest: Nearest | None) -> list[dict[str, Any]]:
    """Every second row has a negative: they are negatives of the other rows of its step, too."""
    rows: list[dict[str, Any]] = [{"query": line, "positive": text} for line, text in pairs]
    if nearest is not None:
        for row, pair in zip(rows[::2], pairs[::2], strict=True):
            row["negatives"] = nearest(pair, 1)
    return rows


def reranked_rows(pairs: list[Pair], nearest: Nearest, num_negatives: int) -> list[dict[str, Any]]:
    found = []
    for number, (line, text) in enumerate(pairs):
        negatives = nearest((line, text), num_negatives)
        place = number % (num_negatives + 1)  # no place is better than another
        texts = [*negatives[:place], text, *negatives[place:]]
        found.append({"query": line, "documents": texts, "positive": place})
    return found


def tags_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the name of the package, which is no question but a copy."""
    answers = [json.loads(row["completion"]) for row in rows]
    return [
        {"text": row["prompt"], "answers": {name: given[name] for name in QUESTIONS}}
        for row, given in zip(rows, answers, strict=True)
    ]


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where their rows are.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the files go.")
@click.option("--negatives", type=click.IntRange(1), default=3, show_default=True, help="Of each row of rerank.")
@click.option("--rerank-rows", type=click.IntRange(1), default=100, show_default=True, help="They are long.")
@click.option(
    "--embedder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Ranks for rerank, too."
)
def main(data: Path, out: Path, negatives: int, rerank_rows: int, embedder: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    held_out = summary_pairs(read(data / "summary.dev.jsonl"))
    given = summary_pairs(read(data / "summary.train.jsonl")) + debtags_pairs(read(data / "debtags.train.jsonl"))
    for part, pairs in (("train", apart(given, held_out)), ("dev", held_out)):
        nearest, ranked = Nearest(pairs), pairs[:rerank_rows]
        made = {
            "search": search_rows(pairs, nearest if part == "train" else None),
            "rerank": reranked_rows(ranked, Nearest(ranked, embedder) if embedder else nearest, negatives),
            "tags": tags_rows(read(data / f"debtags.{part}.jsonl")),
        }
        for task, rows in made.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (out / f"{task}.{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            click.echo(f"{out / f'{task}.{part}.jsonl'}: {len(rows)} rows")


if __name__ == "__main__":
    main()
