"""What an adapter that is held is worth: how often it is asked for, and what it costs to read again, for its room.

Owns the counts of uses, also of adapters that have left, so that one that comes back is not taken for a new one. No
torch, no clock: time is the number of uses. Invariant: of any two adapters the more valuable one stays so until one of
them is used.
"""

from __future__ import annotations

import math
from collections import OrderedDict

# Uses of any adapters after which a use counts half. `python -m bench.adapter_reuse`: for 1,000 adapters by Zipf's law,
# 32 places keep 0.51 of the uses in memory; the best choice in hindsight 0.54, least recently used 0.38. A half-life of
# 2,048 learns too slowly where popularity moves (0.38 instead of 0.44), one of 128 forgets too much (0.49).
HALF_LIFE_USES = 512
MAX_REMEMBERED = 16_384  # adapters, held or not
MIN_LOAD_S = 0.05  # a load that took less is not told from others: what else ran then decides


class ReuseScores:
    """Expected reuse x cost / size, the ratio of GreedyDual-Size-Frequency (Cherkasova 1998, HPL-98-69).

    Differs in how frequency ages: GDSF forgets a count with its entry and inflates new ones; here counts decay with
    each use, as in LRFU (Lee et al. 2001), and outlive the entry.
    """

    def __init__(self, half_life_uses: int = HALF_LIFE_USES) -> None:
        self._half_life_uses = half_life_uses
        # log2 of the uses, each doubled every half-life, so that later ones count more and none has to be aged.
        self._log_weights: OrderedDict[str, float] = OrderedDict()  # last used last
        self._now = 0  # uses of all adapters so far

    def use(self, key: str) -> None:
        self._now += 1
        before = self._log_weights.pop(key, -math.inf)
        self._log_weights[key] = _log2_sum(before, self._now / self._half_life_uses)
        if len(self._log_weights) > MAX_REMEMBERED:
            self._log_weights.popitem(last=False)

    def value(self, key: str, load_s: float, share: float) -> float:
        """log2 of what holding `key` is worth: `load_s` to read it again, `share` of the room that it takes."""
        # One that was never used counts as if half a use had been at the start: the first to go.
        reuse = self._log_weights.get(key, -1.0)
        return reuse + math.log2(max(load_s, MIN_LOAD_S) / share)


def _log2_sum(a: float, b: float) -> float:
    """log2(2**a + 2**b)"""
    high, low = max(a, b), min(a, b)
    return high + math.log2(1.0 + 2.0 ** (low - high)) if low > -math.inf else high
