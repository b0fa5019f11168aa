"""How many tokens a verification can a head's vocabulary give at most, on answers that it has not seen?

A head names the most frequent tokens of training answers, and may copy from a window of the prompt. Here it is taken to
be right whenever the wanted token is among them, so that what is left is the vocabulary's doing alone. Copying is given
its best: any token of the prompt.

    python -m bench.head_words --train FILE --data FILE [--sizes 1024,2048,4096,8192] [--draft-len 12]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from specserve.training.data.dataset import Example
from specserve.training.head_module import task_vocab

from . import common, options
from .tasks import BaseModel


def most_tokens(examples: Sequence[Example], words: set[int], draft_len: int, copies: bool) -> float:
    """A verification, where a draft ends before the first token that cannot be named."""
    lengths = []
    for example in examples:
        known = words | set(example.prompt) if copies else words
        answer, position = example.completion[1:], 0  # the first comes with the prompt
        while position < len(answer):
            named = 0
            while named < min(draft_len, len(answer) - position - 1) and answer[position + named] in known:
                named += 1
            lengths.append(named + 1)
            position += named + 1
    return sum(lengths) / max(1, len(lengths))


@click.command(help=__doc__.partition("\n")[0])
@options.file("--train", "Rows whose answers the vocabulary is made of.")
@options.file("--data", "Held-out rows.")
@options.model
@options.numbers("--sizes", "1024,2048,4096,8192", "Words.", 1)
@click.option("--draft-len", type=click.IntRange(1, 32), default=12, show_default=True)
@options.save("head_words")
def main(train: Path, data: Path, model: str, sizes: list[int], draft_len: int, save: bool) -> None:
    run = common.start("head_words", "torch")
    base = BaseModel.load(model)
    learned, held_out = base.examples(train), base.examples(data)
    click.echo(f"limit: {draft_len + 1} tokens a verification")
    tokens = [token for example in held_out for token in example.completion[1:]]
    figures = {}
    for size in sizes:
        words = set(task_vocab(learned, size))
        figures[str(size)] = {
            "words": len(words),
            "share_of_tokens": round(sum(token in words for token in tokens) / len(tokens), 3),
            "most_tokens": round(most_tokens(held_out, words, draft_len, copies=False), 2),
            "most_tokens_copied": round(most_tokens(held_out, words, draft_len, copies=True), 2),
        }
        click.echo(f"{size}: {figures[str(size)]}")
    settings = {"train": train.name, "data": data.name, "rows": len(held_out), "draft_len": draft_len}
    run.finish({**settings, "model": base.name, "figures": figures}, save)


if __name__ == "__main__":
    main()
