"""The sampler on CUDA: kernels draw a token from every row, and one small copy brings all of them to the host.

The same function of logits, parameters, masks and random numbers as `Sampler`. Launches are CUDA graphs by padded rows
and by which stages some row needs, penalties and bias among them; all have one scratch, as they run one after the
other.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch

from ...kernels.sampling import SamplingRow, SamplingScratch, SamplingTensors, sample_logits_
from ...schedule.row_group import RowGroup
from ..grammar_masks import MaskMaker
from ..sampler import Drawn, PendingSample, Sampler, edits_logits, uniform, up_to_dead_end
from .buffers import Fence
from .drafts import DeviceDrafts
from .logit_edits import LogitEdits, StepEdits
from .parts import DeviceParts
from .sampled_tokens import SampledTokens

NOTHING_POSSIBLE = 2  # flag of a row of which the mask leaves nothing; 1 is NaN


class DeviceSampler(Sampler):
    """Samples the target's token for every row of every group of the latest step, and has the drafts follow them."""

    def __init__(
        self,
        eos_token_ids: Seq[int],
        masks: MaskMaker,
        parts: DeviceParts,
        drafts: DeviceDrafts,
    ):
        super().__init__(eos_token_ids, masks)
        self.drafts = drafts
        self._logits, self._graphs, self._sampled = parts.logits, parts.graphs, parts.sampled
        self._device = parts.decoder.device
        self._vocab_size = parts.decoder.config.vocab_size
        self._scratch = SamplingScratch.allocate(parts.sampled.num_rows, self._vocab_size, self._device)
        self._edits = LogitEdits(parts.sampled.num_rows, self._eos_token_ids, self._device)
        self._buffers: dict[int, _Buffers] = {}  # by padded rows
        self._host_masks = [_HostMasks(self._vocab_size, self._device) for _ in range(2)]

    def collect(self, pending: PendingSample) -> list[list[int]]:
        kept = super().collect(pending)
        self.drafts.collect(pending.groups, kept)
        return kept

    @torch.inference_mode()
    def _queue(self, logits: torch.Tensor, groups: Seq[RowGroup]) -> Callable[[], Drawn]:
        num_rows, padded = logits.shape[0], self._logits.padded
        size = padded.shape[0]
        buffers, results, scratch = self._buffers.get(size), self._sampled, self._scratch
        if buffers is None:
            buffers = self._buffers[size] = _Buffers(size, self._vocab_size, self._device)
        reason = self._logits.eager_reason
        if reason is not None:
            results = SampledTokens(size, self._device)
            scratch = SamplingScratch.allocate(size, self._vocab_size, self._device)
        special = [group for group in groups if not group.seq.takes_best]
        rows = self._rows(num_rows, special)
        # The device drafts from the tokens that it drew, so they must be final: greedy rows get their masks, too.
        self._host_masks.reverse()
        host_masks = self._host_masks[0]
        masks = self._masks.masks(special, also_greedy=True, room=host_masks.rows) if special else None
        if masks is not None:
            host_masks.upload(buffers.masks, len(masks.rows))
        buffers.upload(rows, masks.rows if masks is not None else [])
        edited = [group for group in special if edits_logits(group.seq)]
        edits = self._edits.upload(size, edited) if edited else None
        draws = any(row.temperature > 0 for row in rows)
        cuts_top_k, cuts_top_p = any(row.top_k for row in rows), any(row.top_p < 1 for row in rows)
        stages = {"draws": draws, "cuts_top_k": draws and cuts_top_k, "cuts_top_p": draws and cuts_top_p}
        self._graphs.launch(
            ("sample", size, edits is not None, *stages.values()),
            lambda: buffers.sample_(results, padded, scratch, edits, **stages),
            reason or (edits.eager_reason if edits is not None else None),
        )
        if reason is None:
            self.drafts.launch(groups)
        copy = results.queue_download()

        def drawn() -> Drawn:
            tokens, flags = results.read(copy, num_rows)
            if not flags.any():
                return Drawn(tokens)
            return Drawn(tokens, (flags == 1).tolist(), (flags == NOTHING_POSSIBLE).tolist())

        return drawn

    def _constrain(self, logits: torch.Tensor, group: RowGroup, sampled: list[int], dead: Seq[int]) -> list[int]:
        return up_to_dead_end(group, sampled, dead)  # every row was drawn under its mask

    def _rows(self, num_rows: int, groups: Seq[RowGroup]) -> list[SamplingRow]:
        """Parameters of every row, none where all are greedy."""
        rows: list[SamplingRow] = []
        for group in groups:
            seq, params = group.seq, group.seq.sampling
            own = range(group.first_row, group.first_row + group.num_rows)
            if group.is_greedy:
                continue
            rows = rows or [SamplingRow()] * num_rows
            for idx, row in enumerate(own):
                drawn = uniform(params.seed, seq.sample_idx, len(seq.tokens) + idx)
                top_k = params.top_k if params.top_k < self._vocab_size else 0
                rows[row] = SamplingRow(params.temperature, top_k, params.top_p, params.min_p, drawn)
        return rows


class _Buffers:
    """Parameters of one number of padded rows."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device):
        is_cuda = device.type == "cuda"
        # Two on the host, which take turns: one is written while the copy of the other still waits for the device.
        self._hosts = [
            (SamplingTensors.allocate(num_rows, vocab_size, 0, "cpu", pin=is_cuda), Fence(device)) for _ in range(2)
        ]
        self._params = SamplingTensors.allocate(num_rows, vocab_size, num_rows, device)
        self._is_plain = False  # what was uploaded last: no row that is drawn or has a mask

    def upload(self, rows: list[SamplingRow], masked: list[int] | None = None) -> None:
        """Rows beyond `rows` are greedy, row masked[idx] has mask idx.

        Where all are greedy and none has a mask, as in the step before, there is nothing to say.
        """
        is_plain = not rows and not masked
        if not (is_plain and self._is_plain):
            self._hosts.reverse()
            host, copied = self._hosts[0]
            copied.wait()
            host.write(rows)
            if masked:
                host.mask_row.numpy()[masked] = np.arange(len(masked), dtype=np.int32)
            self._params.copy_(host)
            copied.record()
        self._is_plain = is_plain

    @property
    def masks(self) -> torch.Tensor:
        return self._params.masks

    def sample_(
        self,
        results: SampledTokens,
        logits: torch.Tensor,
        scratch: SamplingScratch,
        edits: StepEdits | None,
        **stages: bool,
    ) -> None:
        """The launches, for a graph; `logits` are left as they were: log-probabilities are those of the model."""
        num_rows = logits.shape[0]
        tokens, flags = results.tokens[:num_rows], results.flags[:num_rows]
        if edits is not None:
            edits.apply_(logits)
        sample_logits_(tokens, flags, logits, self._params, scratch, **stages)
        if edits is not None:
            edits.undo_(logits)


class _HostMasks:
    """Masks on their way to the device, in memory that is pinned on CUDA and grows to the most rows of a step.

    It is handed out for writing only when its last copy has been made.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self._bits = torch.empty(0, -(-vocab_size // 32), dtype=torch.int32)
        self._copied, self._is_pinned = Fence(device), device.type == "cuda"

    def rows(self, num_rows: int) -> np.ndarray:
        """[num_rows, ceil(V / 32)] int32 of whatever they held."""
        self._copied.wait()  # sync: that copy was queued two steps ago
        if num_rows > self._bits.shape[0]:
            shape = (2 * num_rows, self._bits.shape[1])
            self._bits = torch.empty(shape, dtype=torch.int32, pin_memory=self._is_pinned)
        return self._bits[:num_rows].numpy()

    def upload(self, masks: torch.Tensor, num_rows: int) -> None:
        """Copy the first rows into `masks` on the device, in stream order."""
        masks[:num_rows].copy_(self._bits[:num_rows], non_blocking=True)
        self._copied.record()
