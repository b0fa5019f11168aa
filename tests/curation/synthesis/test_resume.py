"""A synthesis that ends anywhere goes on where it was and pays for nothing twice; review files that people edit."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from places import ROOT
from synthesis_place import input_of, what_is_asked, wise


def often_malformed(body, number):
    """So that there are several rounds; the same for the same ask."""
    return "no JSON" if what_is_asked(body) == "proposal" and body["seed"] % 3 == 0 else wise(body)


@pytest.fixture
def uninterrupted(place):
    """How many requests a run of 20 rows takes that nothing ends; its files are whole.*"""
    place.endpoint.respond = often_malformed
    code, _, err = place.run("--teacher-cache", place.path / "other", rows=20, out="whole.jsonl")
    assert code == 0 and "round 2" in err, err
    num, place.endpoint.bodies = len(place.endpoint.bodies), []
    return num


def goes_on(place, num_requests):
    """The same command, which makes what the uninterrupted run made, for what was under way at most."""
    place.endpoint.respond = often_malformed
    assert place.run("--teacher-concurrency", 2, rows=20)[0] == 0
    assert place.rows() == place.rows("whole.jsonl")
    assert place.lines("rows.review.jsonl") == place.lines("whole.review.jsonl")
    assert num_requests <= len(place.endpoint.bodies) <= num_requests + 2
    assert not list(place.path.glob("*.lock")) and not list(place.path.glob("*.tmp"))


def test_after_kill_nine_in_a_later_round_only_what_was_under_way_is_paid_again(place, uninterrupted):
    process = None

    def respond(body, number):
        if number == uninterrupted - 3:
            os.kill(process.pid, signal.SIGKILL)
        return often_malformed(body, number)

    place.endpoint.respond = respond
    command = [sys.executable, "-m", "specserve.cli", *place.arguments("--teacher-concurrency", 2, rows=20)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and "round 1" in err, err
    assert (place.path / "rows.review.jsonl").exists() and not (place.path / "rows.jsonl").exists()
    goes_on(place, uninterrupted)


def test_an_end_in_the_first_round_loses_no_answer_either(place, uninterrupted):
    place.endpoint.respond = lambda body, number: (
        often_malformed(body, number) if number < 9 else (401, {"error": {"message": "the key is used up"}}, {})
    )
    code, _, err = place.run("--teacher-concurrency", 1, rows=20)
    assert code == 2 and "the key is used up" in err and not (place.path / "rows.review.jsonl").exists()
    place.endpoint.bodies = place.endpoint.bodies[:9]
    goes_on(place, uninterrupted)


def test_a_larger_number_of_rows_goes_on_and_asks_for_no_row_again(place):
    """Inputs that were left over are answered first."""
    rng = random.Random(3)
    inputs = [input_of(rng) for _ in range(8)]
    place.endpoint.respond = lambda body, number: (
        json.dumps({"inputs": inputs}) if what_is_asked(body) == "proposal" else wise(body)
    )
    assert place.run("--per-ask", 8, rows=3)[0] == 0
    first = place.rows()
    assert place.verdicts() == {"kept": 3, "surplus": 5}
    code, _, err = place.run("--per-ask", 8, rows=7)
    assert code == 0 and "has 8 candidates and 3 rows of an earlier run" in err
    assert place.rows()[:3] == first and [row["prompt"] for row in place.rows()] == inputs[:7]
    assert [what_is_asked(body) for body in place.endpoint.bodies] == ["proposal"] + ["answer"] * 7
    place.endpoint.bodies = []
    assert place.run("--per-ask", 8, rows=5)[0] == 0
    assert [row["prompt"] for row in place.rows()] == inputs[:5] and not place.endpoint.bodies
    assert place.lines("rows.report.json")[0]["rows"] == 5


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--task", "Something else."), "task"),
        (("--method", "refine"), "method"),
        (("--seed", 1), "seed"),
        (("--near", 0.9), "near"),
        (("--held-out", "seeds.jsonl"), "held_out"),
    ],
)
def test_a_run_goes_on_with_no_other_settings(place, monkeypatch, flags, name):
    monkeypatch.chdir(place.path)
    assert place.run(rows=2)[0] == 0
    before = (place.path / "rows.review.jsonl").read_bytes()
    code, _, err = place.run(*flags, rows=4)
    assert code == 2 and f"is of a run with {name} " in err and "give another --output" in err
    assert (place.path / "rows.review.jsonl").read_bytes() == before


def test_other_seeds_are_another_run(place):
    assert place.run(rows=2)[0] == 0
    place.seeds(place.lines("seeds.jsonl")[:5])
    code, _, err = place.run(rows=4)
    assert code == 2 and "is of a run with seeds " in err


def test_a_second_process_keeps_out(place):
    with (place.path / "rows.review.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = place.run()
    assert code == 2 and "another process is writing" in err and not place.endpoint.bodies
    assert place.run()[0] == 0  # a lock file that nobody holds is nothing


def edit(place, change):
    path = place.path / "rows.review.jsonl"
    head, *lines = path.read_text().splitlines()
    candidates = [json.loads(line) for line in lines]
    change(candidates)
    path.write_text("\n".join([head, *map(json.dumps, candidates)]) + "\n")


def apply(place, *flags):
    place.run("--apply", place.path / "rows.review.jsonl", *flags, out="final.jsonl")
    return place.run("--apply", place.path / "rows.review.jsonl", *flags, out="final.jsonl")


def test_what_a_person_keeps_is_what_is_written(place):
    place.run(rows=4)

    def change(candidates):
        candidates[1]["keep"] = False
        candidates[2]["row"] = {"prompt": "mine", "completion": "too"}

    edit(place, change)
    code, out, err = apply(place, "--include-seeds")
    assert code == 0, err
    assert "has 11 rows" in out
    rows, made = place.rows("final.jsonl"), place.rows()
    assert rows == [*place.lines("seeds.jsonl"), made[0], {"prompt": "mine", "completion": "too"}, made[3]]
    place.endpoint.bodies = []
    assert place.run(rows=4)[0] == 0, "a run goes on from what was edited"
    assert len(place.rows()) == 4 and made[1] not in place.rows() and place.endpoint.bodies


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: [x.update(keep=False) for x in c], "keeps none of its 4 candidates"),
        (lambda c: c[0].update(row=None), "line 2 is kept and has no row"),
        (lambda c: c[0].update(row={"prompt": "a"}), "candidate 1: completion is missing"),
        (lambda c: c[0].update(row={"a": "b"}), "candidate 1 has the fields 'a'"),
        (lambda c: c[0].update(keep="yes"), "line 2 is not a candidate"),
        (lambda c: c[0].update(verdict="fine"), "line 2 is not a candidate"),
        (lambda c: c[0].pop("id"), "line 2 is not a candidate"),
    ],
)
def test_a_review_that_cannot_be_applied_is_refused(place, change, problem):
    place.run(rows=3)
    edit(place, change)
    code, _, err = apply(place)
    assert code == 2 and problem in err and not (place.path / "final.jsonl").exists()


def test_a_review_without_its_first_line_is_refused(place):
    place.run(rows=3)
    path = place.path / "rows.review.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "line 1 is not the first line of a review file" in apply(place)[2]
    path.write_text("")
    assert "is empty" in apply(place)[2]


def test_a_review_is_not_written_over(place):
    assert place.run(rows=2)[0] == 0
    before = place.candidates()
    code, _, err = place.run("--apply", place.path / "rows.review.jsonl", out="rows.review.jsonl")
    assert code == 2 and "rows.review.jsonl is read, too" in err and place.candidates() == before


CRITIQUES = {"good": "nothing", "fix": "the number is wrong", "drop": "nonsense"}


def refining(verdicts, refined):
    """A teacher that gives these verdicts in turn, and refined rows."""
    verdicts, refined = iter(verdicts), iter(refined)

    def respond(body, number):
        asked = what_is_asked(body)
        if asked == "critique":
            verdict = next(verdicts)
            return json.dumps({"critique": CRITIQUES.get(verdict, "?"), "verdict": verdict})
        return next(refined) if asked == "refinement" else wise(body)

    return respond


def test_rows_are_criticised_and_refined(place):
    better = {"input": "name: better than all the others\nnumber: 7", "answer": '{"name": "b", "n": 7}'}
    seed = place.lines("seeds.jsonl")[0]["prompt"]
    place.endpoint.respond = refining(
        ["good", "drop", "fix", "fix", "fix", "unheard of", "good"],
        [json.dumps(better), json.dumps({"input": seed, "answer": "{}"}), "no JSON"],
    )
    code, _, err = place.run("--method", "refine", "--per-ask", 6, "--teacher-concurrency", 1, rows=6)
    found = place.candidates()[:6]
    assert [candidate["verdict"] for candidate in found] == [
        "kept", "criticised", "kept", "duplicate", "malformed", "kept",
    ]  # fmt: skip
    assert found[1]["reason"] == "nonsense" and not found[1]["keep"]
    assert found[2]["row"] == {"prompt": better["input"], "completion": better["answer"]}
    assert found[2]["critique"] == "the number is wrong" and found[2]["proposed"] != better["input"]
    assert found[3]["reason"] == "refined: the same as seed line 1"
    assert "none that can be read" in found[5]["critique"]
    last = next(body for body in place.endpoint.bodies if what_is_asked(body) == "critique")["messages"][-1]["content"]
    assert re.search(r"<answer (\w{8})>\n.*\n</answer \1>\n\nTexts stand between marks", last, re.DOTALL)


def test_inputs_alone_are_refined_too(place):
    place.endpoint.respond = refining(["fix", "good", "good"], ['{"input": "name: x\\nnumber: 1"}'])
    code, _, err = place.run("--method", "refine", "--inputs-only", "--teacher-concurrency", 1, rows=3)
    assert code == 0, err
    assert place.rows()[0] == {"prompt": "name: x\nnumber: 1"}
