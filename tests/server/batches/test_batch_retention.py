"""Who may have how much: bytes and files of an owner, and what goes by itself when there is too much of all."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from waiting import until

from specserve.server.batches.disk import BatchDir
from specserve.server.batches.retention import LEAST_KEPT_S, KeepLimits
from specserve.server.batches.room import DiskFullError, QuotaError
from specserve.server.batches.rows import BatchTooLargeError
from specserve.server.batches.store import BatchStore
from specserve.server.batches.types import Batch, BatchUsage
from specserve.server.batches.upload import UploadReader


class Kept:
    """A store whose limits are small."""

    def __init__(self, path, max_bytes=1000, max_owner_bytes=None, **limits):
        self.now = 0.0
        folder = BatchDir(path, max_bytes, max_owner_bytes)
        self.store = BatchStore(folder, lambda: self.now, KeepLimits(**limits))
        self.room = folder.room

    def upload(self, num_bytes=100, owner="me"):
        content = self.store.folder.incoming(owner)
        try:
            content.write(b"x" * num_bytes)
            content.finish()
            return self.store.files.add(owner, content, "in.jsonl", 3600).id
        finally:
            content.close()

    def batch(self, file_id, owner="me"):
        self.now += 1
        batch = Batch(
            id=f"batch_{self.now}", endpoint="/v1/completions", input_file_id=file_id, completion_window="1h",
            status="in_progress", created_at=0, expires_at=3600,
        )  # fmt: skip
        return self.store.add_batch(owner, batch, 3600)

    def end(self, opened, num_bytes=100):
        """With an output of so many bytes."""
        self.now += 1
        if num_bytes:
            self.store.add_answer(opened, 1, b"x" * num_bytes, False, BatchUsage())
        output = self.store.folder.incoming()
        self.store.write_output(opened.number, False, output)
        output.finish()
        self.store.end(opened, lambda batch: None, {"output_file_id": output})
        output.close()
        return output.id

    def files(self, owner="me"):
        return {file.id for file in self.store.files.page(owner, None, 99, True, None)}


@pytest.fixture
def kept(tmp_path):
    made = []

    def make(**limits):
        for before in made:
            before.store.close()
        made.append(Kept(tmp_path, **limits))
        return made[-1]

    yield make
    made[-1].store.close()


def test_an_owner_may_have_so_many_bytes_and_leaves_others_theirs(kept):
    made = kept(max_owner_bytes=400)
    first, opened = made.upload(), made.batch(made.upload())
    made.store.add_answer(opened, 1, b"x" * 150, False, BatchUsage())
    with pytest.raises(QuotaError, match=r"350 of 400 bytes \(--batch-key-gib\), and 100 more .* DELETE /v1/files/ID"):
        made.upload()
    with pytest.raises(QuotaError):
        made.store.add_answer(opened, 2, b"x" * 51, False, BatchUsage())
    made.upload(owner="you")
    assert made.room.num_bytes_of("me") == 350 and made.room.num_bytes == 450
    made = kept(max_owner_bytes=400)  # another process counts the same
    assert (made.room.num_bytes_of("me"), made.room.num_bytes_of("you"), made.room.num_bytes) == (350, 100, 450)
    made.end(opened, 0)  # an end needs no room: what it writes takes the place of the answers
    assert made.room.num_bytes_of("me") == 350
    made.store.files.delete("me", first)
    made.upload()


def test_files_of_an_owner_are_counted_with_those_that_its_batches_will_leave(kept):
    made = kept(max_own_files=5)
    file = made.upload()
    opened = [made.batch(file), made.batch(file)]
    with pytest.raises(QuotaError, match=r"1 files and 2 batches .* 5 files \(--batch-key-files\)") as refused:
        made.batch(file)
    assert refused.value.status == 403
    with pytest.raises(QuotaError):
        made.upload()
    outputs = [made.end(one) for one in opened]
    made.upload()
    made.upload()
    with pytest.raises(QuotaError):
        made.upload()
    made.store.files.delete("me", outputs[0])
    made.upload(owner="you")
    made.upload()


def test_of_batches_that_have_ended_the_newest_are_known_and_files_of_all_stay(kept):
    made = kept(max_own_files=9)
    file, yours = made.upload(), made.batch(made.upload(owner="you"), "you")
    made.end(yours)
    outputs = set()
    for _ in range(12):
        outputs.add(made.end(made.batch(file)))
        if len(outputs) > 3:
            made.store.files.delete("me", outputs.pop())
    assert len(made.store.batches("me", None, 99)) == 9 and made.store.batch("you", yours.batch.id)
    assert made.files() == {file, *outputs}


def test_where_too_much_is_kept_the_batches_that_ended_first_go_and_no_file_that_is_read(kept):
    made = kept(max_kept_bytes=650)
    shared, alone = made.upload(), made.upload()
    first, second = made.batch(shared), made.batch(alone)
    of_second, of_first = made.end(second), made.end(first)
    running = made.batch(shared)
    made.upload()
    made.upload(50)
    made.now += LEAST_KEPT_S
    assert made.room.num_bytes == 550 and len(made.files()) == 6
    made.store.add_answer(running, 1, b"x" * 150, False, BatchUsage())
    made.store.add_answer(running, 2, b"x", False, BatchUsage())  # the second to end was the first to begin
    assert made.store.batch("me", second.batch.id) is None and made.store.batch("me", first.batch.id)
    assert not {alone, of_second} & made.files() and {shared, of_first} <= made.files()
    made.upload(200)
    assert made.store.batch("me", first.batch.id) is None and of_first not in made.files()
    assert shared in made.files() and made.room.num_bytes == 601
    assert not made.store.folder.file(of_first).exists()
    made.upload(200)  # nothing that may go is left
    assert made.room.num_bytes == 801
    with pytest.raises(DiskFullError):
        made.upload(200)


def test_a_batch_that_has_just_ended_stays_for_its_owner_however_little_may_be_kept(kept):
    made = kept(max_kept_bytes=50)
    opened = made.batch(made.upload())
    output = made.end(opened)
    made.upload()
    made.now += LEAST_KEPT_S - 1
    made.store.forget_old()
    assert made.store.batch("me", opened.batch.id) and output in made.files()
    made.now += 1
    made.store.forget_old()
    assert made.store.batch("me", opened.batch.id) is None and len(made.files()) == 1


@pytest.mark.parametrize(("limits", "flag"), [({}, "disk"), ({"max_bytes": 2000, "max_owner_bytes": 550}, "key")])
def test_answers_that_could_never_be_written_at_the_end_are_refused_and_what_fits_ends(kept, limits, flag):
    made = kept(**limits)
    opened = made.batch(made.upload())
    made.store.add_answer(opened, 1, b"x" * 400, False, BatchUsage())
    made = kept(**limits)  # another process counts the same
    with pytest.raises(BatchTooLargeError, match=rf"100 bytes of rows and 500 of answers .* --batch-{flag}-gib allows"):
        made.store.add_answer(opened, 2, b"x" * 100, False, BatchUsage())
    made.store.add_answer(opened, 2, b"x" * 50, False, BatchUsage())
    made.end(opened, 0)
    assert made.room.num_bytes == 550


async def test_a_client_that_leaves_while_its_upload_is_written_is_charged_nothing(kept, monkeypatch):
    made, counted, go_on = kept(max_owner_bytes=400), threading.Event(), threading.Event()
    count = made.room.count

    def held(num_bytes, owner):
        count(num_bytes, owner)
        counted.set()
        assert go_on.wait(20)

    async def read_chunk(size):
        return b"x" * 100

    async def upload():
        with ExitStack() as stack:
            incoming = lambda: made.store.folder.incoming("me")  # noqa: E731
            await UploadReader(None, incoming, 1000, 10.0, stack)._file(SimpleNamespace(read_chunk=read_chunk))

    monkeypatch.setattr("specserve.server.batches.upload.CHUNK_BYTES", 25)
    monkeypatch.setattr(made.room, "count", held)
    uploading = asyncio.ensure_future(upload())
    await until(counted.is_set)
    monkeypatch.undo()
    uploading.cancel()
    await asyncio.sleep(0.01)
    go_on.set()
    await asyncio.wait([uploading])
    await until(lambda: not made.room.num_bytes)
    assert uploading.cancelled() and not made.room.num_bytes_of("me")
    assert not list((made.store.folder.path / "incoming").iterdir())
