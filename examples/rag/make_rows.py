"""Write the rows that the adapter `quote` learns from, out of those of summary: a package's one-line description, asked
for in one of several ways, and the descriptions that BM25 takes for the nearest, its own among them or not.

The wanted answer is the sentence that shares most with the question, rare words counting more. Needs rank-bm25.

    python examples/rag/make_rows.py --data examples/data --out out/rows
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click
from passages import NOT_FOUND, answer, numbered, one_line, passage, prompt
from rank_bm25 import BM25Okapi

TEMPLATES = (
    "Which package contains {}?",
    "Which package provides {}?",
    "Which package should I install for {}?",
    "I need {}. Which package is it?",
    "Is there a package with {}?",
    "Where do I find {}?",
    "{}?",
    "{}",
)
NUM_PASSAGES = 3
SHUFFLED = 0.5  # of the rows; in the others the right passage comes first, as a re-ranker mostly has it
RARE_WORDS = (3, 5)  # of the line, in questions that do not repeat it
SHORTENED = 0.4  # of the questions


def words(text: str) -> list[str]:
    """Lower case, and without the s of a plural, which a question often has where its text has none."""
    return [word.rstrip("s") or word for word in re.findall(r"\w+", text.lower())]


class Descriptions:
    """The long ones of all rows, each once, with an index of their words."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.index = BM25Okapi([words(text) for text in texts])
        counts = Counter(word for text in texts for word in set(words(text)))
        self._weights = {word: math.log(len(texts) / count) for word, count in counts.items()}

    def weight(self, word: str) -> float:
        return self._weights.get(word, math.log(len(self.texts)))

    def shared(self, question: str, text: str) -> float:
        return sum(self.weight(word) for word in set(words(question)) & set(words(text)))

    def near(self, question: str, own: int, number: int) -> list[int]:
        """The nearest by BM25, but those that share as much with the question as its own: they would answer as well."""
        scores = self.index.get_scores(words(question))
        most = 0.9 * self.shared(question, self.texts[own])
        order = sorted(range(len(self.texts)), key=lambda idx: -scores[idx])
        others = (idx for idx in order if idx != own and self.shared(question, self.texts[idx]) <= most)
        return list(islice(others, number))


def question_of(line: str, descriptions: Descriptions, draw: random.Random, shortened: float = SHORTENED) -> str:
    """The line itself, or its rarest words."""
    asked = line.rstrip(".")
    found = asked.split()
    number = draw.randint(*RARE_WORDS)
    if len(found) > number and draw.random() < shortened:
        kept = sorted(found, key=lambda word: -max((descriptions.weight(each) for each in words(word)), default=0))
        asked = " ".join(word for word in found if word in kept[:number])
    return draw.choice(TEMPLATES).format(asked)


def quoting_rows(rows: list[tuple[str, str]], descriptions: Descriptions, missing: float) -> list[dict[str, str]]:
    draw = random.Random(0)
    places = {text: idx for idx, text in enumerate(descriptions.texts)}
    found = []
    for line, text in rows:
        question = question_of(line, descriptions, draw)
        own = places[text]
        is_missing = draw.random() < missing
        near = descriptions.near(question, own, NUM_PASSAGES - (not is_missing))
        shown = [*([] if is_missing else [own]), *near]
        if draw.random() < SHUFFLED:
            draw.shuffle(shown)
        passages = [passage(descriptions.texts[idx]) for idx in shown]
        wanted = NOT_FOUND
        if not is_missing:
            place = shown.index(own)
            best = max(passages[place], key=lambda piece: descriptions.shared(question, piece))
            wanted = answer(numbered(passages).index((place, best)) + 1, best)
        found.append({"prompt": prompt(question, passages), "completion": wanted})
    return found


def read(path: Path) -> list[tuple[str, str]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        asked, answered = (message["content"] for message in json.loads(line)["messages"][-2:])
        found.append((answered, one_line(asked.partition("\n\n")[2])))
    return found


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    click.echo(f"{path}: {len(rows)} rows")


@click.command(help=__doc__.partition("\n\n")[0])
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where summary's are.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the files go.")
@click.option("--rows", type=click.IntRange(1), default=300, show_default=True, help="For training, at most.")
@click.option("--missing", type=click.FloatRange(0, 1), default=0.15, show_default=True, help="Share of rows.")
def main(data: Path, out: Path, rows: int, missing: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    parts = {part: read(data / f"summary.{part}.jsonl") for part in ("train", "dev")}
    descriptions = Descriptions(list(dict.fromkeys(text for part in parts.values() for _, text in part)))
    for part, found in parts.items():
        made = quoting_rows(found[:rows], descriptions, missing)
        write_lines(out / f"quote.{part}.jsonl", made)


if __name__ == "__main__":
    main()
