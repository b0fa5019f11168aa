"""What is installed, looked up among known vulnerabilities, and what could not be looked up: `make audit`.

pip-audit passes over a package that its index does not answer for, and calls an environment without vulnerabilities of
which it has looked up nothing. Here that is a failure. A build of one's own, as torch's for CPUs (2.13.0+cpu), is
looked up as the version that it is a build of.

`python audit_installed.py PYTHON`: run by an environment that has pip-audit, of the environment of the other PYTHON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def installed(python: str) -> list[str]:
    """Requirements of what is installed there beside this project."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [f"{one['name']}=={one['version'].partition('+')[0]}" for one in found if one["name"] != "specserve"]


def verdict(report: dict[str, Any]) -> tuple[int, str]:
    """(exit status, what to say) of pip-audit's report: 0 when all was looked up and nothing found."""
    checked = [one for one in report["dependencies"] if "skip_reason" not in one]
    missed = [one["name"] for one in report["dependencies"] if "skip_reason" in one]
    lines = [
        f"{one['name']} {one['version']}: {vulnerability['id']} {', '.join(vulnerability.get('aliases', []))}; "
        f"fixed in {', '.join(vulnerability['fix_versions']) or 'no version'}"
        for one in checked
        for vulnerability in one["vulns"]
    ]
    lines.append(f"{len(checked)} packages were looked up, {len(lines)} vulnerabilities are known of them.")
    if missed:
        lines.append(f"NOT looked up: {len(missed)} packages, as the index says nothing of them from here: ")
        lines[-1] += ", ".join(missed)
    return int(len(lines) > 1), "\n".join(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join(installed(sys.argv[1])) + "\n")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
        done = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off"], stdout=subprocess.PIPE, text=True
        )
    try:
        report = json.loads(done.stdout)
    except ValueError:
        print(f"pip-audit ended with {done.returncode} and without a report; nothing was looked up", file=sys.stderr)
        return 1
    status, text = verdict(report)
    print(text, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
