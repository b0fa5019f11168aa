"""`specserve distill` as it is typed: flags, what it says, its exit codes, and `kill -9` in the middle."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

import pytest
from fake_teacher import MODEL, FakeTeacher, echo

from specserve.cli import main as cli
from specserve.cli import teacher_options
from specserve.curation.distillation import answers

NUM_PROMPTS = 40


class Command:
    def __init__(self, folder):
        self.folder, self.fake = folder, FakeTeacher()
        (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "q{idx}"}}\n' for idx in range(NUM_PROMPTS)))
        self.out = folder / "rows.jsonl"

    def argv(self, *flags):
        files = (
            "--data",
            self.folder / "prompts.jsonl",
            "--output",
            self.out,
            "--teacher-cache",
            self.folder / "cache",
        )
        teacher = () if "--teacher" in flags else ("--teacher", f"{MODEL}@{self.fake.url}")
        return [str(word) for word in ("distill", *teacher, *files, *flags)]

    async def run(self, *flags):
        return await asyncio.to_thread(cli.exit_code_of, self.argv(*flags))


@pytest.fixture
async def command(tmp_path):
    command = Command(tmp_path)
    async with command.fake.serving():
        yield command


async def test_what_is_paid_for_outlives_kill_9_and_two_at_once_pay_once(command, capsys):
    enough, hanging = asyncio.Event(), {"q25", "q26", "q27"}

    async def respond(body, number):
        if (question := body["messages"][-1]["content"]) in hanging:
            hanging.remove(question)
            if not hanging:
                enough.set()
            await asyncio.sleep(600)
        return echo(body)

    command.fake.respond = respond
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "specserve.cli", *command.argv("--accept-teacher-terms", "--teacher-concurrency", "3")
    )
    await asyncio.wait_for(enough.wait(), 120)
    await asyncio.sleep(0.2)  # the answers before it have come
    second = asyncio.create_task(command.run("--output", command.folder / "other.jsonl"))
    while len(command.fake.bodies) < NUM_PROMPTS:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert not second.done() and len(command.fake.bodies) == NUM_PROMPTS
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert not command.out.exists() and await second == 0, capsys.readouterr().err
    assert len(command.fake.bodies) == NUM_PROMPTS + 3
    assert "40 chosen; 15 requests, 25 cached" in capsys.readouterr().err
    assert await command.run() == 0, capsys.readouterr().err
    assert len(command.fake.bodies) == NUM_PROMPTS + 3
    rows = [json.loads(line)["messages"][-1]["content"] for line in command.out.read_text().splitlines()]
    assert rows == [f"answer to q{idx}" for idx in range(NUM_PROMPTS)]
    told = capsys.readouterr().err
    assert f"40 rows of 40 prompts, best by first\n{MODEL}@{command.fake.url}: 40 chosen; 0 requests, 40 cached" in told
    summary = json.loads((command.folder / "rows.summary.json").read_text())
    assert summary["settings"]["data"].endswith("prompts.jsonl") and summary["teachers"][0]["cached"] == 40
    assert await command.run() == 2 and "rows.jsonl exists; remove it" in capsys.readouterr().err


async def test_terms_are_told_and_agreed_to(command, capsys, monkeypatch):
    assert await command.run() == 2
    told = capsys.readouterr().err
    assert "may forbid training other models" in told and told.count("\n") == 1
    monkeypatch.setattr(teacher_options, "_can_ask", lambda: True)
    monkeypatch.setattr("click.confirm", lambda *args, **kwargs: False)
    assert await command.run() == 2 and not command.fake.bodies
    monkeypatch.setattr("click.confirm", lambda *args, **kwargs: True)
    assert await command.run() == 0
    monkeypatch.setattr("click.confirm", lambda *args, **kwargs: pytest.fail("was agreed to"))
    command.out.unlink()
    assert await command.run() == 0


async def test_a_limit_of_cost_says_what_is_kept_and_how_to_go_on(command, capsys):
    flags = ("--accept-teacher-terms", "--max-tokens", "10", "--teacher-concurrency", "1")
    assert await command.run(*flags, "--max-cost", "1") == 2
    assert "--max-cost needs --teacher-price" in capsys.readouterr().err
    priced = (*flags, "--teacher-price", f"{MODEL}=0,1e6")
    assert await command.run(*priced, "--max-cost", "30") == 2
    told = capsys.readouterr().err.splitlines()
    assert "stopped: 7 answers are kept, for 21.0000 in this run; the same command goes on" in told[0]
    assert told[1].startswith("error: the limit of cost is reached: 21.0000 of 30.0000 is spent") and len(told) == 2
    assert await command.run(*priced, "--from-cache") == 0
    assert "dropped: 33 not asked" in capsys.readouterr().err
    assert len(command.out.read_text().splitlines()) == 7 == len(command.fake.bodies)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--teacher", "wise-1@http://127.0.0.1:1/v1"), "cannot reach wise-1@http://127.0.0.1:1/v1"),
        (("--teacher", "https://host/v1"), "names no model"),
        (("--teacher-key-env", "NO_SUCH_KEY"), "the environment variable NO_SUCH_KEY is not set"),
        (("--teacher-key-env", "elsewhere=NO_SUCH_KEY", "--data", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (
            ("--teacher-key-env", "A_KEY", "--judge", "big@https://elsewhere/v1"),
            "--teacher-key-env A_KEY names no host",
        ),
        (("--teacher", "wise-1@https://host/v1?key=sk-1"), "the teacher's address 'https://host/v1' has a query"),
        (("--teacher-price", "cheap"), "is not IN,OUT"),
        (("--teacher-price", "nan,1"), "is not IN,OUT"),
        (("--teacher-field", "top_p"), "is not KEY=VALUE"),
        (("--teacher-field", "top_p=nine"), "--teacher-field top_p is not valid JSON"),
        (("--teacher", "default", "--teacher-option", "dtyp=bf16"), "--teacher-option dtyp: no such setting"),
        (("--teacher", "default", "--teacher-field", "top_p=0.9"), "--teacher-field top_p is of an endpoint"),
        (("--schema", "nowhere.json"), "cannot read the schema nowhere.json"),
        (("--judge", "default+nowhere"), "'nowhere' is not the directory of an adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_mistakes_are_one_line(command, capsys, flags, told):
    assert await command.run(*flags, "--accept-teacher-terms") == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not command.out.exists()


async def test_keys_and_prices_are_for_whom_they_name(command, capsys, monkeypatch):
    monkeypatch.setenv("THE_KEY", "sk-1")
    command.fake.key = "sk-1"
    host = command.fake.url.partition("//")[2].removesuffix("/v1")
    flags = ("--accept-teacher-terms", "--teacher-key-env", f"{host}=THE_KEY", "--teacher-key-env", "OTHER_KEY")
    assert await command.run(*flags, "--teacher-price", "1,1", "--teacher-price", f"{MODEL}=1e6,0") == 0
    assert "cost 40.0000" in capsys.readouterr().err
    kept = b"".join(path.read_bytes() for path in command.folder.rglob("*") if path.is_file())
    assert b"sk-1" not in kept


async def test_a_key_by_http_to_another_machine_is_warned_of_once(command, capsys, monkeypatch):
    monkeypatch.setenv("THE_KEY", "sk-1")
    flags = ("--accept-teacher-terms", "--teacher-key-env", "THE_KEY", "--teacher-retries", "0")
    elsewhere = ("--teacher", "wise-1@http://127.0.0.1.invalid:1/v1", "--judge", "wise-2@http://127.0.0.1.invalid:1/v1")
    assert await command.run(*flags, *elsewhere) == 2
    told = capsys.readouterr().err
    assert told.count("warning: the key in $THE_KEY and all prompts go to 127.0.0.1.invalid:1 as plain text") == 1
    assert await command.run(*flags, "--teacher", "wise-1@https://127.0.0.1.invalid:1/v1") == 2
    assert await command.run(*flags) == 0
    assert "plain text" not in capsys.readouterr().err


async def test_asks_that_failed_are_exit_code_1(command, capsys):
    command.fake.respond = lambda body, number: (400, b"no", {}) if number == 3 else echo(body)
    assert await command.run("--accept-teacher-terms") == 1
    told = capsys.readouterr().err
    assert "dropped: 1 the teacher failed" in told and "1 asks failed: remove" in told and command.out.exists()


async def test_refusals_are_told_and_no_failure(command, capsys):
    refusal = {"choices": [{"message": {"refusal": "I will not"}, "finish_reason": "stop"}]}
    command.fake.respond = lambda body, number: refusal if number == 3 else echo(body)
    for _ in range(2):
        assert await command.run("--accept-teacher-terms") == 0
        assert "1 prompts were refused, which is kept; --teacher-retry-refused asks again" in capsys.readouterr().err
        command.out.unlink()
    assert await command.run("--teacher-retry-refused") == 0
    assert "refused" not in capsys.readouterr().err and len(command.fake.bodies) == NUM_PROMPTS + 1


async def test_ctrl_c_keeps_answers(command, capsys, monkeypatch):
    shown = answers.show_cost

    def interrupted(bar, usage):
        shown(bar, usage)
        if usage.requests == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(answers, "show_cost", interrupted)
    assert await command.run("--accept-teacher-terms", "--teacher-concurrency", "1") == 130
    assert "stopped: 10 answers are kept; the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert await command.run() == 0
    assert len(command.fake.bodies) <= NUM_PROMPTS + 1
