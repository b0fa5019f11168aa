"""Answer questions over package descriptions by quoting them; starts a server if none runs.

    python examples/rag/ask.py "Which package contains data files for Neverball?"
    python examples/rag/ask.py --examples 5
    python examples/rag/ask.py

The last asks for questions.
"""

import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import click
import msgspec
from answering import Adapters, Answerer, Found
from client import Server, running
from corpus import Document, read_documents

from specserve.cache_dirs import cache_dir
from specserve.cli.shading import Shading, visible
from specserve.errors import UserError
from specserve.messages import TokenTrace
from specserve.terminal import wants_colour

HERE = Path(__file__).resolve().parent


def show(found: Found, documents: Sequence[Document]) -> None:
    shading = Shading(wants_colour(sys.stdout))
    text = shading.text(msgspec.convert(found.quoted.trace, list[TokenTrace]))
    if found.quoted.problem:
        print(f"no answer: {visible(found.quoted.problem)}")
    elif found.source is None:
        print("not found")
    else:
        print(visible(documents[found.source].name))
    print(f"  {text}")
    for number, idx in enumerate(found.shown, 1):
        print(f"  [{number}] {visible(documents[idx].name)}")
    stages = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in found.seconds.items())
    print(f"  {shading.legend()}\n  {stages}\n", flush=True)


def told(done: int, of: int) -> None:
    print(f"\r{done} of {of} descriptions are embedded", end="\n" if done == of else "", file=sys.stderr, flush=True)


def asked(questions: Sequence[str]) -> Sequence[str]:
    """One after the other, from a terminal or a pipe until it ends."""
    if questions:
        return questions
    print("Ask; an empty line ends.", file=sys.stderr)
    return (line.strip() for line in iter(sys.stdin.readline, "") if line.strip() or sys.exit())


def chosen(server: Server, rerank: bool | None) -> Adapters:
    """With a re-ranker if it is wanted; if nobody says, where there is one."""
    if rerank is None and not (rerank := server.has("rerank")):
        print("no adapter 'rerank' here: the search's order is kept", file=sys.stderr)
    return Adapters(rerank="rerank" if rerank else None)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("questions", nargs=-1)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server; started if it is here.")
@click.option("--api-key", envvar="SPECSERVE_API_KEY", help="If the server wants one.")
@click.option("--adapters-dir", type=click.Path(file_okay=False, path_type=Path), default=HERE.parent / "adapters",
              help="What a server is started with; default: examples/adapters.")  # fmt: skip
@click.option("--corpus", type=click.Path(dir_okay=False, path_type=Path), default=HERE / "corpus.jsonl",
              help='JSONL of {"name", "text"}; default: 1,000 packages of Debian 12.')  # fmt: skip
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), help="Where vectors are kept.")
@click.option("--examples", type=click.IntRange(0), default=0, help="Ask so many of the questions beside the corpus.")
@click.option("--rerank/--no-rerank", default=None, help="With a re-ranker; default: if there is one.")
@click.option("--free", is_flag=True, help="Without the grammar: what is written is only checked.")
@click.option("--drafts/--no-drafts", default=True, help="Whether tokens are drafted.")
def main(questions, url, api_key, adapters_dir, corpus, cache, examples, rerank, free, drafts) -> None:
    try:
        documents = read_documents(corpus)
        if examples:
            with (HERE / "questions.jsonl").open(encoding="utf-8") as file:
                questions = [*questions, *(json.loads(line)["question"] for line in islice(file, examples))]
        server = Server(url, api_key)
        with running(server, "--adapters-dir", str(adapters_dir)):
            adapters = chosen(server, rerank)
            answerer = Answerer(server, documents, cache or cache_dir("rag"), adapters, told)
            for question in asked(questions):
                print(visible(question))
                show(answerer.answer(question, not free, drafts), documents)
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
