"""Does a request without a model find its adapter, and what does the choice cost?

Held-out rows of the demo adapters' tasks and chat prompts that are nobody's are compared to the adapters' profiles in
two ways: by counts of characters, as the server does, and by the base model's own embeddings (mean pooling, one pass of
the engine for each text). Both have the same prompts and the same rule: the nearest, unless it is three standard
deviations further away than an adapter's own prompts are from each other. `nearest` leaves that rule out: the share of
the tasks' rows whose nearest adapter is theirs. The limit is printed first: a pass of the model reads its weights once,
and counts need none.

    python -m bench.routing [--data-dir DIR] [--rows 60] [--no-embeddings]

--data-dir has NAME.train.jsonl, from which the profiles are made, and NAME.dev.jsonl, with more rows than the
repository; without it profiles are those of the demo adapters.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from specserve import LLM
from specserve.routing_profile import PROFILE_FILE, RoutingProfile, excerpt, parse_profile, profile_of
from specserve.server.routing.likeness import (
    LEAST_SLACK,
    NUM_FEATURES,
    Likeness,
    Vector,
    cosines,
    features_of,
    likeness_of,
    likeness_of_vectors,
)
from specserve.server.routing.router import choice_of
from specserve.training.data.rows import read_rows, routed_texts

from . import common, options
from .tasks import DEMO_TASKS, BaseModel, demo_adapter, demo_rows

CHAT_PROMPTS = common.ROOT / "bench" / "data" / "chat_prompts.jsonl"
BASE = "base"
CUTS = (50, 100, 200, 400)  # characters of requests that are shorter than what adapters were trained on
ADAPTERS = (3, 100, 1000)  # whose profiles one text is compared to, in what a choice costs

Vectors = Callable[[str], Vector]


def profile(task: str, data_dir: Path | None) -> RoutingProfile:
    if data_dir is None:
        path = demo_adapter(task) / PROFILE_FILE
        return parse_profile(path.read_bytes(), str(path))
    return profile_of(routed_texts(read_rows(data_dir / f"{task}.train.jsonl")))


def held_out(data_dir: Path | None, num_rows: int | None) -> dict[str, list[str]]:
    """Texts by who should answer them."""
    files = {task: demo_rows(task) if data_dir is None else data_dir / f"{task}.dev.jsonl" for task in DEMO_TASKS}
    texts = {task: routed_texts(read_rows(file, num_rows)) for task, file in files.items()}
    return texts | {
        BASE: [json.loads(line)["prompt"] for line in CHAT_PROMPTS.read_text(encoding="utf-8").splitlines()]
    }


def measured(
    vector: Vectors, least_slack: float, profiles: dict[str, RoutingProfile], texts: dict[str, list[str]]
) -> dict[str, Any]:
    """Shares that were right, who got whose, and the time of a text's vector."""
    likely: dict[str, Likeness] = {
        name: likeness_of_vectors(np.stack([vector(prompt) for prompt in profile.prompts]), least_slack)
        for name, profile in profiles.items()
    }
    table: dict[str, Counter[str]] = {name: Counter() for name in texts}
    num_nearest, seconds = 0, []
    for wanted, members in texts.items():
        for text in members:
            start = time.perf_counter()
            found = vector(text)
            seconds.append(time.perf_counter() - start)
            scores = {name: float(one.direction @ found) for name, one in likely.items()}
            nearest = max(scores, key=lambda name: scores[name])
            num_nearest += nearest == wanted
            table[wanted][nearest if scores[nearest] >= likely[nearest].threshold else BASE] += 1
    shares = {name: counts[name] / counts.total() for name, counts in table.items()}
    num_of_adapters = sum(len(members) for name, members in texts.items() if name != BASE)
    return {
        "right": {name: round(share, 4) for name, share in shares.items()},
        "mean_right": round(statistics.mean(shares.values()), 4),
        "nearest": round(num_nearest / num_of_adapters, 4),
        "got": {name: dict(counts) for name, counts in table.items()},
        "us_a_text": round(1e6 * statistics.median(seconds), 1),
    }


def by_characters(profiles: dict[str, RoutingProfile], texts: dict[str, list[str]]) -> dict[str, Any]:
    fields = measured(features_of, LEAST_SLACK, profiles, texts)
    some = [text for members in texts.values() for text in members][::10]
    rng = np.random.default_rng(0)
    costs = {}
    for num in ADAPTERS:
        directions = rng.random((num, NUM_FEATURES), dtype=np.float32)
        costs[str(num)] = round(statistics.median(_timed(partial(cosines, directions=directions), some)), 1)
    cut = {str(num): _right_when_cut(num, profiles, texts) for num in CUTS}
    return fields | {"us_a_choice_by_adapters": costs, "right_by_first_characters": cut}


def _right_when_cut(
    num_chars: int, profiles: dict[str, RoutingProfile], texts: dict[str, list[str]]
) -> dict[str, float]:
    """Of requests that end after so many characters, while the profiles stay whole."""
    likely = {name: likeness_of(profile) for name, profile in profiles.items()}
    return {
        wanted: round(statistics.mean(choice_of(text[:num_chars], likely).adapter == wanted for text in members), 4)
        for wanted, members in texts.items()
        if wanted != BASE
    }


def by_embeddings(model: Path, profiles: dict[str, RoutingProfile], texts: dict[str, list[str]]) -> dict[str, Any]:
    with LLM(str(model), log_level="warning") as llm:

        def vector(text: str) -> Vector:
            (output,) = llm.embed([excerpt(text)], pooling="mean", use_tqdm=False)
            found = np.asarray(output.outputs.embedding, dtype=np.float32)
            return found / np.linalg.norm(found)

        vector("warm")
        return measured(vector, 0.0, profiles, texts)


def _timed(work: Callable[[str], object], texts: Sequence[str]) -> list[float]:
    """Microseconds of each."""
    taken = []
    for text in texts:
        start = time.perf_counter()
        work(text)
        taken.append(1e6 * (time.perf_counter() - start))
    return taken


@click.command()
@options.model
@click.option("--data-dir", type=options.ADAPTER, help="Rows, instead of the repository's.")
@options.at_least(1, "--rows", 60, "Held-out rows of each task.")
@click.option("--embeddings/--no-embeddings", default=True, show_default=True)
@options.save("routing", default=False)
def main(model: str, data_dir: Path | None, rows: int, embeddings: bool, save: bool) -> None:
    run = common.start("routing", "numpy", "torch")
    base = BaseModel.load(model)
    floor = common.print_floor(base.path)
    profiles, texts = {task: profile(task, data_dir) for task in DEMO_TASKS}, held_out(data_dir, rows)
    ways = {"characters": by_characters(profiles, texts)}
    if embeddings:
        ways["embeddings"] = by_embeddings(base.path, profiles, texts)
    for name, found in ways.items():
        right = ", ".join(f"{task} {100 * share:.1f} %" for task, share in found["right"].items())
        click.echo(
            f"{name}: right {100 * found['mean_right']:.1f} % ({right}); nearest {100 * found['nearest']:.1f} %; "
            f"{found['us_a_text']:.0f} us a text"
        )
    fields = {"model": base.name, "data": "repository" if data_dir is None else data_dir.name, "ways": ways}
    fields |= {"num_held_out": {name: len(members) for name, members in texts.items()}, "floor_ms": floor.ms()}
    run.finish(fields, save)


if __name__ == "__main__":
    main()
