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

QUESTIONS = ("section", "role", "implemented_in", "interface", "use", "works_with", "suite")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def search_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        question, answer = (message["content"] for message in row["messages"][-2:])
        found.append({"query": answer, "positive": question.partition("\n\n")[2]})
    return found


def reranked_rows(rows: list[dict[str, Any]], num_negatives: int) -> list[dict[str, Any]]:
    """Negatives are the documents that BM25 ranks highest for the query, of those that are not its own."""
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    index = BM25Okapi([words(text) for text in documents])
    found = []
    for number, row in enumerate(rows):
        scores = index.get_scores(words(row["query"]))
        order = sorted(range(len(documents)), key=lambda idx: -scores[idx])
        negatives = [documents[idx] for idx in order if documents[idx] != row["positive"]][:num_negatives]
        place = number % (num_negatives + 1)  # no place is better than another
        texts = [*negatives[:place], row["positive"], *negatives[place:]]
        found.append({"query": row["query"], "documents": texts, "positive": place})
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
    for part in ("train", "dev"):
        search = search_rows(read(data / f"summary.{part}.jsonl"))
        made = {
            "search": search,
            "rerank": reranked_rows(search, negatives)[:rerank_rows],
            "tags": tags_rows(read(data / f"debtags.{part}.jsonl")),
        }
        for task, rows in made.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (out / f"{task}.{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            click.echo(f"{out / f'{task}.{part}.jsonl'}: {len(rows)} rows")


if __name__ == "__main__":
    main()
