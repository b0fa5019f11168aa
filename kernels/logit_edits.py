"""Penalties, bias and forbidden ends of rows of logits, at the few tokens that they name, and back again.

Semantics, for row r with the entries first..end of its sequence, each a token t of its own, with x = logits[r, t] and n
the entry's count and how often t is among the drafts before the row (which makes of UNSEEN the number of these):
    n >= 0:             x = x / repetition if x > 0 else x * repetition
    n > 0:              x = x - (frequency * n + presence)
    always:             x = x + bias
    ends, forbidden:    x = -inf
all in fp32, each operation rounded: as `specserve.compute.sampler` edits a row. What stood there is kept, and put back
once tokens are drawn, since log-probabilities are the model's. A sequence's rows share its entries: what the drafts
before a row change is found by comparing tokens. Rows without entries are not touched, and no row reads another's.
"""

from __future__ import annotations

import numpy as np
import torch

UNSEEN = -1  # count of a token that stands neither in the prompt nor in the output; 0: in the prompt alone
# Records as kernels read them, all fields of 4 bytes.
ENTRY = np.dtype([("token", "i4"), ("count", "i4"), ("bias", "f4"), ("ends", "i4")])
ROW = np.dtype(
    [
        ("first", "i4"),
        ("end", "i4"),  # behind its last entry
        ("num_drafts", "i4"),  # before it
        ("token", "i4"),  # the last of these
        ("saved", "i4"),  # where what stood at its entries is kept
        ("forbids_ends", "i4"),
        ("presence", "f4"),
        ("frequency", "f4"),
        ("repetition", "f4"),
    ]
)
ROW_INTS, ENTRY_INTS = ROW.itemsize // 4, ENTRY.itemsize // 4
_BLOCK = 512
_NUM_SPLITS = 4  # programs of a row


def edit_logits_reference(logits: torch.Tensor, rows: np.ndarray, entries: np.ndarray) -> torch.Tensor:
    """The definition: logits [R, V] float32 of `rows` [R] ROW with `entries` [E] ENTRY."""
    edited = logits.cpu().numpy().copy()
    for idx, row in enumerate(rows):
        drafts = rows["token"][idx + 1 - row["num_drafts"] : idx + 1].tolist()
        for entry in entries[row["first"] : row["end"]]:
            x, num = edited[idx, entry["token"]], drafts.count(entry["token"])
            num = max(entry["count"], 0) + num if num else entry["count"]
            if num >= 0:
                x = x / row["repetition"] if x > 0 else x * row["repetition"]
            if num > 0:
                x = x - (row["frequency"] * np.float32(num) + row["presence"])
            x = x + entry["bias"]
            edited[idx, entry["token"]] = -np.inf if entry["ends"] and row["forbids_ends"] else x
    return torch.from_numpy(edited)


def edit_logits_(logits: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor, saved: torch.Tensor) -> None:
    """Edit logits [R, V] float32 in place; `rows` and `entries` are ROW and ENTRY records as int32 [n * fields].

    `saved` float32 has a place for each entry of each row. One launch whose grid follows from R alone.
    """
    from .logit_edits_triton import edit_rows

    assert logits.dtype == saved.dtype == torch.float32 and rows.dtype == entries.dtype == torch.int32
    num_rows, vocab_size = logits.shape
    edit_rows[(num_rows, _NUM_SPLITS)](
        logits, saved, rows, entries, vocab_size, logits.stride(0), ROW_INTS=ROW_INTS, ENTRY_INTS=ENTRY_INTS,
        BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip


def restore_logits_(logits: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor, saved: torch.Tensor) -> None:
    """Put back what `edit_logits_` found there, with the same arguments."""
    from .logit_edits_triton import restore_rows

    num_rows, vocab_size = logits.shape
    restore_rows[(num_rows, _NUM_SPLITS)](
        logits, saved, rows, entries, vocab_size, logits.stride(0), ROW_INTS=ROW_INTS, ENTRY_INTS=ENTRY_INTS,
        BLOCK=_BLOCK,
    )  # fmt: skip
