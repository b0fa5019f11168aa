"""The output directory: what may be written where, who holds it, and that a refused run leaves no trace."""

import os

import msgspec
import pytest

from specserve.errors import UserError
from specserve.training.checkpoint import CHECKPOINT_FILE
from specserve.training.run_config import RunConfig
from specserve.training.run_directory import (
    LOCK_FILE,
    RUN_FILE,
    disk_errors,
    held_directory,
    started_as,
    state_of,
)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new" / "out"


def begin(output, **changes):
    """A run that is interrupted after its first checkpoint."""
    with pytest.raises(KeyboardInterrupt), held_directory(output, resume=False) as directory:
        directory.begin(msgspec.structs.replace(RunConfig(output=str(output)), **changes))
        (output / CHECKPOINT_FILE).write_bytes(b"weights")
        raise KeyboardInterrupt


def test_a_run_leaves_no_lock_behind_when_it_is_finished(output):
    with held_directory(output, resume=False) as directory:
        assert (output / LOCK_FILE).read_text() == str(os.getpid())
        directory.begin(RunConfig(output=str(output)))
        (output / "adapter_model.safetensors").write_bytes(b"")
    assert state_of(output) == "finished" and set(os.listdir(output)) == {RUN_FILE, "adapter_model.safetensors"}


def test_what_is_refused_before_it_begins_leaves_nothing(output):
    with pytest.raises(UserError), held_directory(output, resume=False):
        raise UserError("a bad row")
    assert not output.parent.exists()


def test_a_refused_resume_changes_nothing(output):
    begin(output)
    before = contents(output)
    with pytest.raises(UserError), held_directory(output, resume=True):
        raise UserError("another rate")
    assert contents(output) == before and state_of(output) == "interrupted"


def test_a_second_run_is_refused_with_the_process_that_holds_the_directory(output):
    with held_directory(output, resume=False) as directory:
        directory.begin(RunConfig(output=str(output)))
        for resume in (False, True):
            with pytest.raises(UserError, match=f"not empty|process {os.getpid()}"), held_directory(output, resume):
                pass
        with pytest.raises(UserError, match=f"another run is writing to .*out .process {os.getpid()}."):
            with held_directory(output, resume=True):
                pass


def test_the_lock_ends_with_its_process_however_that_ends(output):
    child = os.fork()
    if child == 0:
        with held_directory(output, resume=False) as directory:
            directory.begin(RunConfig())
            os._exit(9)
    os.waitpid(child, 0)
    assert state_of(output) == "interrupted"
    with held_directory(output, resume=True):
        assert (output / LOCK_FILE).read_text() == str(os.getpid())


def test_somebody_elses_directory_is_never_written_into(output):
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"holds no run of ours \(thesis.tex\)"), held_directory(output, resume):
            pass
    (output / RUN_FILE).write_text("distance: 10 km\n")
    for resume in (False, True):
        with pytest.raises(UserError, match="run.yaml that is no run of ours"), held_directory(output, resume):
            pass
    assert set(os.listdir(output)) == {"thesis.tex", RUN_FILE}


def test_an_output_that_cannot_be_a_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file, which is a file"), held_directory(tmp_path / "file", resume=False):
        pass
    with pytest.raises(UserError, match="cannot write to the output directory.*Not a directory"):
        with held_directory(tmp_path / "file" / "out", resume=False):
            pass
    with pytest.raises(UserError, match="no run in .*leave --resume out"), held_directory(tmp_path / "no", resume=True):
        pass
    with pytest.raises(UserError, match="cannot read the output directory.*File name too long"):
        with held_directory(tmp_path / ("x" * 300), resume=False):
            pass
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_run_is_gone_on_with_and_remembers_how_it_was_started(output):
    begin(output, seed=5)
    with pytest.raises(UserError, match="go on with --resume"), held_directory(output, resume=False):
        pass
    assert started_as(output).seed == 5
    with held_directory(output, resume=True):
        pass


def test_a_disk_that_is_full_at_the_start_leaves_the_old_run_or_nothing(output, monkeypatch):
    def torn(config, path):
        path.write_text("model: ")
        raise OSError(28, "No space left on device")

    for is_resumed in (False, True):
        if is_resumed:
            begin(output)
        before = contents(output)
        with monkeypatch.context() as patch:
            patch.setattr("specserve.training.run_directory.save_resolved", torn)
            with pytest.raises(OSError), held_directory(output, resume=is_resumed) as directory:
                directory.begin(RunConfig(output=str(output)))
        assert contents(output) == before and output.exists() == is_resumed


def test_a_full_disk_is_the_users_to_mend_in_every_librarys_words(tmp_path):
    import safetensors
    from safetensors.torch import save_file

    (tmp_path / CHECKPOINT_FILE).touch()
    with pytest.raises(UserError, match="the disk is full; free some space and go on with --resume"):
        with disk_errors(tmp_path):
            raise OSError(28, "No space left on device")
    with pytest.raises(safetensors.SafetensorError), disk_errors(tmp_path):  # not for want of space
        save_file({}, tmp_path / "no" / "such" / "folder")
    with pytest.raises(UserError, match="too large a file"), disk_errors(tmp_path):
        raise safetensors.SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
