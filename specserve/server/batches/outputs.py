"""What a batch leaves at its end: files of its answers, in the order of its rows, and a line for each without one.

Owns which file a line goes to. Written beside the answers, which stay until the store knows of the files.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal

from .disk import Incoming
from .rows import InputLostError, read_rows, unanswered_line
from .store import BatchStore, OpenBatch
from .types import RowError

End = Literal["completed", "expired", "cancelled", "failed"]
_UNANSWERED = {
    "expired": RowError("batch_expired", "the completion window ended before the row was answered"),
    "cancelled": RowError("batch_cancelled", "the batch was cancelled before the row was answered"),
}


class Outputs:
    """`has_errors_apart`: rows that failed have a file of their own."""

    def __init__(self, store: BatchStore, max_row_bytes: int, has_errors_apart: bool):
        self._store, self._max_row_bytes = store, max_row_bytes
        self._kinds: dict[str, bool | None] = (
            {"output_file_id": False, "error_file_id": True} if has_errors_apart else {"output_file_id": None}
        )

    def write(self, opened: OpenBatch, end: End, stack: ExitStack) -> tuple[dict[str, Incoming], InputLostError | None]:
        """Files by the names of the batch's fields, in their places until `stack` is closed, none of them empty; and
        why rows without an answer could not be named. On any thread."""
        outputs, lost = {}, None
        for name, is_failure in self._kinds.items():
            incoming = self._store.folder.incoming()
            stack.callback(incoming.close)
            self._store.write_output(opened.number, is_failure, incoming)
            if is_failure and (error := _UNANSWERED.get(end)) is not None:
                try:
                    self._write_unanswered(opened, error, incoming)
                except InputLostError as found:
                    lost = found
            if incoming.num_bytes:
                incoming.finish()
                outputs[name] = incoming
        return outputs, lost

    def _write_unanswered(self, opened: OpenBatch, error: RowError, incoming: Incoming) -> None:
        answered = self._store.answered_lines(opened.number)
        for row in read_rows(self._store.folder.file(opened.batch.input_file_id), self._max_row_bytes):
            if row.line not in answered:
                incoming.write(unanswered_line(row.custom_id, error))
