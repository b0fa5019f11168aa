"""What a load consists of: when each request arrives, which adapter it names, what it asks.

Pure functions of their arguments and a seed: two runs with one seed send the same requests at the same times. Sends
nothing and measures nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Popularity = Literal["uniform", "zipf", "distinct", "identical"]
POPULARITIES = get_args(Popularity)
Messages = list[dict[str, str]]

WORDS = (
    "river stone morning window garden letter station market winter bridge paper engine signal harbour copper field "
    "number simple early narrow quiet broken common heavy modern open carry measure answer follow remember gather "
    "build return change notice travel between behind around through without because before after under never often "
    "almost several other every little seven twelve forty hundred the a of and in to is was for with"
).split()


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    model: str
    messages: Messages
    arrival_s: float | None  # after the start of the level; None: when a place is free (closed loop)


def make_plan(
    models: Sequence[str],
    prompts: Mapping[str, Sequence[Messages]],
    *,
    num_requests: int,
    rate: float | None,
    duration_s: float,
    popularity: Popularity,
    zipf_exponent: float,
    prompt_words: int,
    seed: str,
) -> list[PlannedRequest]:
    """At most `num_requests` requests; with a `rate`, those that arrive within `duration_s`.

    `prompts` maps a model to its prompts, which take turns in an order drawn once; a model that it lacks gets
    prompts of `prompt_words` random words, no two alike, so that none is answered from a prefix cache.
    """
    arrivals: Sequence[float | None] = [None] * num_requests
    if rate is not None:
        arrivals = poisson_arrivals(rate, num_requests, duration_s, seed)
    chosen = pick_models(models, len(arrivals), popularity, zipf_exponent, seed)
    rng = random.Random(f"{seed}/prompts")
    turns = {model: rng.sample(list(rows), len(rows)) for model, rows in prompts.items()}
    used = dict.fromkeys(turns, 0)
    plan = []
    for model, arrival_s in zip(chosen, arrivals, strict=True):
        if model in turns:
            messages = turns[model][used[model] % len(turns[model])]
            used[model] += 1
        else:
            messages = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=prompt_words))}]
        plan.append(PlannedRequest(model, messages, arrival_s))
    return plan


def poisson_arrivals(rate: float, num_requests: int, duration_s: float, seed: str) -> list[float]:
    """Times of a Poisson process of `rate` a second: at most `num_requests`, none after `duration_s`."""
    rng = random.Random(f"{seed}/arrivals")
    arrivals: list[float] = []
    now_s = rng.expovariate(rate)
    while len(arrivals) < num_requests and now_s <= duration_s:
        arrivals.append(now_s)
        now_s += rng.expovariate(rate)
    return arrivals


def pick_models(
    models: Sequence[str], num_requests: int, popularity: Popularity, zipf_exponent: float, seed: str
) -> list[str]:
    """The model of each request. `zipf`: the i-th model has weight 1 / i^exponent; `distinct`: they take turns."""
    if popularity == "identical":
        return [models[0]] * num_requests
    if popularity == "distinct":
        return [models[idx % len(models)] for idx in range(num_requests)]
    exponent = zipf_exponent if popularity == "zipf" else 0.0
    weights = [(idx + 1) ** -exponent for idx in range(len(models))]
    return random.Random(f"{seed}/models").choices(models, weights, k=num_requests)
