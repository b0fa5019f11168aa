"""What a grid may be: values are YAML, checked by the run's own configuration before anything starts."""

import pytest
from training_fixture import write_rows

from specserve.cli.main import exit_code_of as cli
from specserve.errors import UserError
from specserve.training.sweep.grid import names_of, parse_grid, points_of


def test_values_are_yaml_and_every_combination_is_a_point():
    grid = parse_grid(["lora.r=8,16", "lora.target_modules=all-linear,[q_proj, v_proj]", "optimizer.lr=1e-3"])
    points = points_of(grid)
    assert [point["lora.r"] for point in points] == [8, 8, 16, 16]
    assert points[1]["lora.target_modules"] == ["q_proj", "v_proj"] and points[0]["optimizer.lr"] == 0.001
    assert names_of(points)[1] == "2-r-8_target_modules-q_proj+v_proj_lr-0.001"
    assert len(set(names_of(points))) == 4


RUN = "output: out\ndata: {train: train.jsonl, eval: dev.jsonl}\n"


@pytest.mark.parametrize(
    "grid, run, said",
    [
        ([], RUN, "nothing is swept"),
        (["lora.r="], RUN, "lora.r has no values"),
        (["lora.r"], RUN, "is not KEY=VALUE"),
        (["lora.r=8"], RUN, "the grid has one point"),
        (["lora.r=8,8"], RUN, "value 8 twice"),
        (["lora.r=8", "lora.r=16"], RUN, "stands twice"),
        (["lora.r=[8"], RUN, "are not YAML"),
        (["lora.rank=8,16"], RUN, "unknown key 'lora.rank'"),
        (["lora.r=8,many"], RUN, "lora.r is 'many': Expected `int`"),
        (["lora.r=8,1000"], RUN, "lora.r is 1000"),
        (["lora.target_modules=all-linear,[k_prox]"], RUN, "did you mean 'k_proj'"),
        (["data.eval=a.jsonl,b.jsonl"], RUN, "there is no file a.jsonl"),
        (["eval.rows=8,16"], RUN, "cannot be compared"),
        (["lora.enabled=true,false"], RUN, "cannot be compared"),
        (["embed.temperature=0.05,0.1"], RUN, "--rungs 1"),
        (["lora.r=8,16"], "output: out\ndata: {train: train.jsonl}\n", "data.eval is missing"),
        (["lora.r=8,16"], RUN + "eval: {rows: 0}\n", "eval.rows is 0"),
        (["lora.r=8,16"], "output: out\ndata: {eval: dev.jsonl}\n", "data.train is missing"),
        (["lora.r=8,16"], "data: {train: train.jsonl, eval: dev.jsonl}\n", "output is missing"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(grid, run, said, tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", 2)
    write_rows(tmp_path / "dev.jsonl", 2)
    (tmp_path / "run.yaml").write_text(run)
    before = sorted(tmp_path.iterdir())
    flags = [word for text in grid for word in ("--grid", text)]
    assert cli(["sweep", str(tmp_path / "run.yaml"), "--rungs", "2", *flags]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_grid_that_is_too_large_is_refused():
    with pytest.raises(UserError, match="2000 points, and 1000 is the most"):
        points_of({"seed": list(range(2000))})
