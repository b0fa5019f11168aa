"""An audit passes when everything was looked up and nothing was found, and says what was not."""

from __future__ import annotations

import sys

from audit_installed import installed, verdict

GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1"]}]}
MISSED = {"name": "missed", "skip_reason": "Dependency not found on PyPI and could not be audited: missed (3.0)"}


def test_nothing_that_was_not_looked_up_passes():
    assert verdict({"dependencies": [GOOD]}) == (0, "1 packages were looked up, 0 vulnerabilities are known of them.")
    status, text = verdict({"dependencies": [GOOD, MISSED]})
    assert status == 1 and text.endswith(
        "NOT looked up: 1 packages, as the index says nothing of them from here: missed"
    )
    status, text = verdict({"dependencies": [BAD, GOOD]})
    assert status == 1 and text.splitlines() == [
        "bad 2.0: PYSEC-1 CVE-1; fixed in 2.1",
        "2 packages were looked up, 1 vulnerabilities are known of them.",
    ]
    assert verdict({"dependencies": [MISSED]})[1].startswith("0 packages were looked up")


def test_builds_of_ones_own_are_looked_up_as_what_they_are_builds_of():
    found = dict(line.split("==") for line in installed(sys.executable))
    assert "torch" in found and "+" not in found["torch"] and "specserve" not in found
