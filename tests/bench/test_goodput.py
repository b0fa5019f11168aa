"""The search for the largest good rate, and one run of it on servers of a tiny model."""

import pytest
from bench_process import bench_record
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model

from bench.goodput import LEAST_RATE, Search, on_over_off

MOST = 4096.0


def found(limit: float, first: float, precision: float = 1.1) -> tuple[float, list[float]]:
    """What a search finds where rates up to `limit` are good, and what it tries."""
    search, tried = Search(first, MOST, precision), []
    while (rate := search.next()) is not None:
        tried.append(rate)
        search.add(rate, rate <= limit)
    return search.rate, tried


@pytest.mark.parametrize("limit", [0.05, 0.9, 1.0, 7.3, 900.0])
@pytest.mark.parametrize("first", [0.5, 20.0])
def test_the_search_comes_within_its_precision_from_either_side(limit, first):
    rate, tried = found(limit, first)
    assert limit / 1.1 <= rate <= limit
    assert len(tried) == len(set(tried)) < 20


def test_the_search_ends_where_every_rate_is_good_or_none():
    rate, tried = found(0.0, 1.0)
    assert rate == 0 and min(tried) == LEAST_RATE
    rate, tried = found(1e9, 1.0)
    assert rate == MOST == max(tried)


def test_ratios_are_of_the_same_load():
    figures = {"base, auto": {"rate": 3.0}, "base, off": {"rate": 2.0}, "8, auto": {"rate": 1.0}, "8, off": {"rate": 0}}
    assert on_over_off(figures) == {"base": 1.5, "8": None}


@pytest.mark.slow
def test_a_run_ends_in_its_line(tmp_path):
    model = make_tiny_model(tmp_path / "tiny")
    make_peft_adapter(model, tmp_path / "adapters" / "one")
    record = bench_record(
        *("goodput", "--model", str(model), "--adapters-dir", str(tmp_path / "adapters"), "--loras", "2", "--no-save"),
        *("--goodput", "e2el:60000", "--first-rate", "4", "--most-rate", "8", "--duration", "1", "--least", "4"),
        *("--max-tokens", "4", "--endpoint", "completions"),
    )
    assert set(record["figures"]) == {"base, auto", "base, off", "2 LoRAs, auto", "2 LoRAs, off"}
    for of_case in record["figures"].values():
        assert of_case["rate"] > 0 and of_case["levels"] and of_case["goodput"] > 0
    assert set(record["on_over_off"]) == {"base", "2 LoRAs"}
