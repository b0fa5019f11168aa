"""What requests and rows ask the database: found by an index, whatever the number of files and batches."""

from __future__ import annotations

from specserve.server.batches.disk import BatchDir
from specserve.server.batches.retention import LEAST_KEPT_S, KeepLimits
from specserve.server.batches.store import BatchStore
from specserve.server.batches.types import Batch, BatchUsage


def test_no_query_of_a_request_or_a_row_reads_a_whole_table(tmp_path):
    now = [0.0]
    store = BatchStore(BatchDir(tmp_path, 1 << 20), lambda: now[0], KeepLimits(max_kept_bytes=0))
    asked: list[str] = []
    store._db.connection.set_trace_callback(asked.append)

    def upload():
        content = store.folder.incoming()
        content.write(b"{}")
        content.finish()
        return store.files.add("me", content, "in.jsonl", 3600)

    file, other = upload(), upload()
    batch = Batch(
        id="batch_1", endpoint="/v1/completions", input_file_id=file.id, completion_window="1h", status="validating",
        created_at=0, expires_at=3600,
    )  # fmt: skip
    opened = store.add_batch("me", batch, 3600)
    store.add_answer(opened, 1, b"{}", False, BatchUsage())
    for after in (None, file.id):
        for purpose in (None, "batch"):
            for newest_first in (True, False):
                assert store.files.page("me", after, 9, newest_first, purpose) is not None
    assert len(store.batches("me", None, 9)) == 1 and store.batches("me", batch.id, 9) == []
    assert store.batch("me", batch.id) and store.cancel("me", batch.id)
    store.end(opened, lambda batch: None, {})
    now[0] += LEAST_KEPT_S
    store.forget_old()
    assert store.batches("me", None, 9) == []
    assert store.files.delete("me", other.id) and len(asked) > 30
    store._db.connection.set_trace_callback(None)
    plans = {
        query: [detail for *_, detail in store._db.execute(f"EXPLAIN QUERY PLAN {query}")]
        for query in {query.strip() for query in asked}
        if query.startswith(("SELECT", "DELETE", "UPDATE"))
    }
    assert len(plans) > 15
    slow = {
        query: plan
        for query, plan in plans.items()
        if any(step.startswith(("SCAN", "USE TEMP B-TREE")) for step in plan)
    }
    assert not slow, slow
    store.close()
