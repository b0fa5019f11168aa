"""Whether asking the draft sources of one kind of sequence pays at all: on, or off with a try now and then.

Owns the hysteresis of k = 0. What drafting gained is judged by what was accepted, not by what was hoped, against the
time that it took, guesses included. Switched off, nothing is asked, so that a useless source costs nothing; a few steps
of probing at growing intervals, and at once when the load has fallen, find out whether that has changed.
"""

from __future__ import annotations

OFF_BELOW, ON_ABOVE = -0.01, 0.01  # tokens gained a verification, which makes at least one
_RATE = 1 / 16
_MIN_SEEN = 8  # steps before the first verdict
_PROBE_STEPS = 4
_FIRST_WAIT, _MAX_WAIT = 16, 512  # steps


class DraftSwitch:
    """One for the sequences that share an adapter and its kinds of sources."""

    def __init__(self) -> None:
        self.is_on = True
        self.gain = 0.0  # running mean, tokens a verification
        self._num_seen = 0
        self._wait, self._left = _FIRST_WAIT, 0  # steps until the next probe
        self._probe: list[float] = []
        self._load = 0  # when it was switched off

    def would_ask(self, num_seqs: int) -> bool:
        """Whether `asks` would say so now."""
        return self.is_on or self._left <= 0 or num_seqs.bit_length() < self._load

    def asks(self, num_seqs: int) -> bool:
        """Whether this step asks for drafts; call it once a step. `num_seqs` decode in it."""
        if self.is_on:
            return True
        if self._left > 0 and num_seqs.bit_length() < self._load:
            self._left, self._wait, self._load = 0, _FIRST_WAIT, num_seqs.bit_length()
        if self._left > 0:
            self._left -= 1
            return False
        return True

    def retry(self) -> None:
        """Ask in the next steps, if it is off."""
        self._left = 0

    def observe(self, gain: float, num_seqs: int) -> None:
        """A step that asked gained so many tokens a verification, net of the time that drafts and their rows took."""
        if self.is_on:
            self._num_seen += 1
            self.gain += max(_RATE, 1 / self._num_seen) * (gain - self.gain)
            if self._num_seen >= _MIN_SEEN and self.gain < OFF_BELOW:
                self.is_on, self._load = False, num_seqs.bit_length()
                self._left, self._probe = self._wait, []
            return
        self._probe.append(gain)
        if len(self._probe) < _PROBE_STEPS:
            return
        self.gain = sum(self._probe) / len(self._probe)
        self._probe = []
        if self.gain > ON_ABOVE:
            self.is_on, self._num_seen, self._wait = True, 0, _FIRST_WAIT
        else:
            self._wait = min(2 * self._wait, _MAX_WAIT)
            self._left, self._load = self._wait, num_seqs.bit_length()
