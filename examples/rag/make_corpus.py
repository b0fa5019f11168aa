"""Write corpus.jsonl and questions.jsonl: packages of the debtags rows that no row of summary describes, and questions
about some of the held-out ones, and about others of them that are not there.

So no adapter here has learned from what is asked about, nor from others of the same source package, which begin alike.
The other texts of the corpus may have been among those that search and rerank learned from. Needs rank-bm25.

    python examples/rag/make_corpus.py --data FOLDER --out examples/rag
"""

import json
import random
from pathlib import Path
from typing import Any

import click
from corpus import Document
from make_rows import Descriptions, question_of, read, write_lines
from passages import one_line, passage

SAME_BEGINNING = 60  # characters
LEAST_CHARS = 80  # of a description that says anything


def packages(path: Path) -> list[tuple[Document, str]]:
    """With their one-line descriptions."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        header, summary, text = json.loads(line)["prompt"].split("\n", 2)
        found.append((Document(header.removeprefix("Package: "), one_line(text)), summary))
    return found


def asked(package: tuple[Document, str], own: Descriptions, draw: random.Random, is_there: bool) -> dict[str, Any]:
    document, summary = package
    question = question_of(summary, own, draw, shortened=0)
    sentence = max(passage(document.text), key=lambda piece: own.shared(question, piece))
    answer = {"name": document.name, "sentence": sentence} if is_there else {"name": None, "sentence": None}
    return {"question": question, **answer}


@click.command(help=__doc__.partition("\n\n")[0])
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True, help="Rows of both tasks.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the files go.")
@click.option("--documents", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--questions", type=click.IntRange(1), default=120, show_default=True)
@click.option("--missing", type=click.IntRange(0), default=20, show_default=True, help="Questions without an answer.")
def main(data: Path, out: Path, documents: int, questions: int, missing: int) -> None:
    draw = random.Random(0)
    seen = {text[:SAME_BEGINNING] for part in ("train", "dev") for _, text in read(data / f"summary.{part}.jsonl")}
    held_out, others = (
        [(document, line) for document, line in packages(data / f"debtags.{part}.jsonl")
         if document.text[:SAME_BEGINNING] not in seen and len(document.text) >= LEAST_CHARS]
        for part in ("dev", "train")
    )  # fmt: skip
    shown = list({document.text: (document, line) for document, line in [*held_out[missing:], *others]}.values())
    shown = shown[:documents]
    own = Descriptions([document.text for document, _ in shown])
    rows = [asked(package, own, draw, True) for package in shown[:questions]]
    rows += [asked(package, own, draw, False) for package in held_out[:missing]]
    draw.shuffle(rows)
    draw.shuffle(shown)
    write_lines(out / "corpus.jsonl", [{"name": document.name, "text": document.text} for document, _ in shown])
    write_lines(out / "questions.jsonl", rows)


if __name__ == "__main__":
    main()
