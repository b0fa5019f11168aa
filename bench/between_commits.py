"""Did a change make anything slower? One bench on two commits in turn, and the ratio of their tokens a second.

Each side is a worktree in a temporary directory and is measured by its own copy of the bench, in fresh processes that
take turns, in an order that turns from round to round: a machine that slows down slows both. Compared is every number
that the bench's JSON line calls tokens_per_s, or as --of says (`ms` of bench.cpu_steps). `ratio` is new's speed over
old's, by the medians, of times as of rates; beside it stand the ratios within the rounds from lowest to highest, and
what is noise: how far old's own rounds lie apart. A number counts as slower or
faster only if it was so in every one of at least four rounds; equal commits look so in one number of eight by luck, in
one of 128 at eight rounds. The last line, over all numbers, is the one to trust: their geometric mean in each round.
`--new .` is the working tree, files that git does not know included.

    python -m bench.between_commits --old COMMIT [--new COMMIT] [--rounds 4] [-- bench.lookahead ARGUMENT ...]
    python -m bench.between_commits --old COMMIT --of ms -- bench.cpu_steps --rows 1,8 --contexts 330
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from . import common

WORKING_TREE = "."
LEAST_ROUNDS = 4
WANTED = "*tokens_per_s*"  # the names of what is compared
TIMES = ("s", "ms", "us")  # units of what is better if it is less
DEFAULT = (
    "bench.lookahead", "examples/adapters/debtags", "--data", "examples/data/debtags.dev.jsonl", "--rounds", "1",
    "--rows", "8", "--batch", "1,8", "--max-tokens", "64",
)  # fmt: skip


def git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.UsageError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(repository: Path, name: str) -> str:
    """The commit that `name` means; that of the working tree is made for it and belongs to no branch."""
    if name == WORKING_TREE:
        identity = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")  # git wants one, whoever measures
        return git(repository, *identity, "stash", "create") or git(repository, "rev-parse", "HEAD")
    return git(repository, "rev-parse", "--verify", f"{name}^{{commit}}")


@contextlib.contextmanager
def checked_out(repository: Path, name: str) -> Iterator[Path]:
    """A worktree of `name` that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="between-commits-") as folder:
        tree = Path(folder) / "tree"
        git(repository, "worktree", "add", "--detach", str(tree), commit_of(repository, name))
        try:
            if name == WORKING_TREE:
                for file in git(repository, "ls-files", "--others", "--exclude-standard", "-z").split("\0"):
                    if file:
                        (tree / file).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(repository / file, tree / file, follow_symlinks=False)
            yield tree
        finally:
            git(repository, "worktree", "remove", "--force", str(tree))


def run(tree: Path, python: str, *arguments: str) -> str:
    """What python prints in `tree`. Nothing but PYTHONPATH tells it where the package is, as paths differ by commit."""
    env = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([python, *arguments], cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments)} failed in {tree}:\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout


def check_package(tree: Path, python: str) -> None:
    """A package that is installed beside must not be the one that is measured."""
    found = run(tree, python, "-c", "import specserve; print(specserve.__path__[0])").strip()
    if Path(found).resolve().parent != tree.resolve():
        raise click.ClickException(f"{python} imports specserve from {found}, not from {tree}")


def numbers_of(record: Mapping[str, Any], wanted: str = WANTED) -> dict[str, float]:
    """By name, every number in or under a field whose name matches `wanted`; of a spread, its median."""
    numbers: dict[str, float] = {}

    def visit(value: Any, path: tuple[str, ...], is_wanted: bool) -> None:
        if isinstance(value, Mapping):
            if is_wanted and "median" in value:
                value = {"": value["median"]}
            for key, inner in value.items():
                visit(inner, (*path, key) if key else path, is_wanted or fnmatch.fnmatchcase(key, wanted))
        elif isinstance(value, list) and not is_wanted:
            for idx, item in enumerate(value):
                visit(item, (*path, _name_of(item, idx)), is_wanted)
        elif is_wanted and isinstance(value, int | float) and value > 0:
            numbers["/".join(path)] = float(value)

    visit(record, (), False)
    return numbers


def is_time(name: str) -> bool:
    """Whether a field of `name` or under it is a time: its last word is a unit of time, and no rate's."""
    words = [field.split("_") for field in name.split("/")]
    return any(own[-1] in TIMES and "per" not in own for own in words)


def _name_of(item: Any, idx: int) -> str:
    """An item of a list by its own words and whole numbers, such as a case and its batch."""
    values = item.values() if isinstance(item, Mapping) else ()
    return " ".join(str(value) for value in values if isinstance(value, str | int)) or str(idx)


def measure(tree: Path, python: str, bench: tuple[str, ...], wanted: str) -> dict[str, float]:
    lines = [line for line in run(tree, python, "-m", *bench).splitlines() if line.startswith('{"bench"')]
    numbers = numbers_of(json.loads(lines[-1]), wanted) if lines else {}
    if not numbers:
        raise click.ClickException(
            f"{bench[0]} gave no JSON line with {wanted}; a commit's bench may print it only without --no-save"
        )
    return numbers


def take_turns(
    trees: dict[str, Path], python: str, bench: tuple[str, ...], rounds: int, wanted: str
) -> dict[str, list[dict[str, float]]]:
    """By side, the numbers of each round."""
    for tree in trees.values():
        check_package(tree, python)
    rounds_of: dict[str, list[dict[str, float]]] = {side: [] for side in trees}
    for round_idx in range(rounds):
        for side in list(trees)[:: 1 if round_idx % 2 == 0 else -1]:
            rounds_of[side].append(measure(trees[side], python, bench, wanted))
        click.echo(f"round {round_idx + 1} of {rounds} done")
    return rounds_of


def speed_over(old: float, new: float, name: str) -> float:
    return old / new if is_time(name) else new / old


def compare(old: list[float], new: list[float], name: str) -> dict[str, Any]:
    """One number's rounds on both sides."""
    ratios = [speed_over(a, b, name) for a, b in zip(old, new, strict=True)]
    return {
        "ratio": round(speed_over(statistics.median(old), statistics.median(new), name), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "old": common.spread(old),
        "new": common.spread(new),
        "old_max_over_min": round(max(old) / min(old), 3),
        "verdict": verdict(ratios),
    }


def verdict(ratios: list[float]) -> str:
    if len(ratios) < LEAST_ROUNDS:
        return "too few rounds"
    return "slower" if max(ratios) < 1 else "faster" if min(ratios) > 1 else "noise"


@click.command(help=__doc__.partition("\n")[0])
@click.option("--old", required=True, help="A commit.")
@click.option("--new", default="HEAD", show_default=True, help="A commit, or `.` for the working tree.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True)
@click.option("--of", "wanted", default=WANTED, show_default=True, help="Names of fields to compare, as a pattern.")
@click.option("--python", default=sys.executable, help="The interpreter of both sides; default: this one.")
@click.argument("bench", nargs=-1, type=click.UNPROCESSED)
def main(old: str, new: str, rounds: int, wanted: str, python: str, bench: tuple[str, ...]) -> None:
    """BENCH: a bench and its arguments, after `--`; paths among them are each side's own."""
    bench = bench or DEFAULT
    machine = common.hardware()
    click.echo(common.hardware_line(machine))
    with contextlib.ExitStack() as stack:
        names = {"old": old, "new": new}
        trees = {side: stack.enter_context(checked_out(common.ROOT, name)) for side, name in names.items()}
        commits = {side: git(tree, "rev-parse", "--short", "HEAD") for side, tree in trees.items()}
        click.echo(f"limit: a ratio of 1; old is {commits['old']} ({old}), new is {commits['new']} ({new})")
        rounds_of = take_turns(trees, python, bench, rounds, wanted)
    measured = [found for own in rounds_of.values() for found in own]
    numbers = [name for name in measured[0] if all(name in found for found in measured)]
    if not numbers:
        raise click.ClickException("the two commits' benches give no number of the same name; compare with another")
    figures = {}
    for name in numbers:
        old_rounds, new_rounds = ([found[name] for found in rounds_of[side]] for side in ("old", "new"))
        figures[name] = compare(old_rounds, new_rounds, name)
        low, high = figures[name]["ratio_min_max"]
        click.echo(
            f"{name}: new/old {figures[name]['ratio']:.3f} ({low:.3f} to {high:.3f}), {figures[name]['verdict']}; "
            f"{figures[name]['old']['median']:.2f} and {figures[name]['new']['median']:.2f}; "
            f"old's rounds {figures[name]['old_max_over_min']:.2f}x apart"
        )
    means = [
        statistics.geometric_mean(speed_over(old_found[name], new_found[name], name) for name in numbers)
        for old_found, new_found in zip(rounds_of["old"], rounds_of["new"], strict=True)
    ]
    overall = {"ratio": common.spread(means), "verdict": verdict(means)}
    click.echo(f"over all {len(numbers)} numbers: {overall}")
    record = {**commits, "hardware": machine, "command": list(bench), "of": wanted, "rounds": rounds, "all": overall}
    common.report("between_commits", record | {"figures": figures}, save=False)


if __name__ == "__main__":
    main()
