"""`specserve teacher-cache`: what it lists and removes."""

from specserve.cli.main import exit_code_of
from specserve.teachers.answer_cache import AnswerCache
from specserve.teachers.asks import Reply


def test_answers_are_listed_and_removed_by_teacher(tmp_path, capsys):
    def run(*flags):
        code = exit_code_of(["teacher-cache", "--teacher-cache", str(tmp_path), *flags])
        told = capsys.readouterr()
        return code, told.out + told.err

    assert run() == (0, f"no teacher was asked yet: there is no {tmp_path / 'answers.sqlite3'}\n")
    assert not list(tmp_path.iterdir())
    cache = AnswerCache(tmp_path)
    for number, teacher in enumerate(("wise-1", "wise-1", "wise-2")):
        cache.put(str(number), teacher, Reply())
    assert "a teacher is being asked with" in run("--clear")[1]
    cache.close()
    code, told = run()
    assert code == 0 and "2    0.0 MiB  last used 20" in told and told.count("wise-") == 2
    assert run("--teacher", "wise-1")[0] == 2
    code, told = run("--clear", "--teacher", "wise-3")
    assert code == 2 and "nothing is kept of 'wise-3'" in told
    assert run("--clear", "--unused-days", "1")[1].startswith("0 answers are removed\n")
    code, told = run("--clear", "--teacher", "wise-1")
    assert code == 0 and told.startswith("2 answers are removed\n") and "wise-1" not in told and "wise-2" in told
