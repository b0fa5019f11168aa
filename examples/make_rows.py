"""Write the rows of the demo tasks that pool (search, rerank, tags) from those of summary and debtags.

search: a package's one-line description finds its long one. rerank: the same, among documents that BM25 takes for the
nearest. tags: facets of a package as questions about its description, answered in one pass. Needs rank-bm25.

    python examples/make_rows.py --data examples/data --out out/rows
"""

import json
import re
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
    """The documents that BM25 ranks highest for a query."""

    def __init__(self, pairs: list[Pair]):
        self._documents = list(dict.fromkeys(text for _, text in pairs))
        self._bags = [frozenset(words(text)) for text in self._documents]
        self._index = BM25Okapi([words(text) for text in self._documents])

    def __call__(self, pair: Pair, num: int) -> list[str]:
        """Without its own, and without those of nearly the same words, which probably fit, too."""
        scores = self._index.get_scores(words(pair[0]))
        own, found = frozenset(words(pair[1])), []
        for idx in sorted(range(len(scores)), key=lambda idx: -scores[idx]):
            if len(found) == num:
                break
            if not is_near(self._bags[idx], own, 0.8):
                found.append(self._documents[idx])
        return found


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
def main(data: Path, out: Path, negatives: int, rerank_rows: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    held_out = summary_pairs(read(data / "summary.dev.jsonl"))
    given = summary_pairs(read(data / "summary.train.jsonl")) + debtags_pairs(read(data / "debtags.train.jsonl"))
    for part, pairs in (("train", apart(given, held_out)), ("dev", held_out)):
        nearest = Nearest(pairs)
        made = {
            "search": search_rows(pairs, nearest if part == "train" else None),
            "rerank": reranked_rows(pairs[:rerank_rows], nearest, negatives),
            "tags": tags_rows(read(data / f"debtags.{part}.jsonl")),
        }
        for task, rows in made.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (out / f"{task}.{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            click.echo(f"{out / f'{task}.{part}.jsonl'}: {len(rows)} rows")


if __name__ == "__main__":
    main()
