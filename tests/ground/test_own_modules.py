"""Processes of this package run nothing that lies in the directory in which they are started."""

import re
import subprocess

from places import ROOT

from specserve.own_modules import module_command


def test_modules_in_the_working_directory_are_not_run(tmp_path):
    for name in ("random.py", "grp.py", "struct.py", "specserve.py", "msgspec.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)")
    subprocess.run([*module_command("specserve.text.template_worker")], cwd=tmp_path, input=b"", capture_output=True)
    done = subprocess.run([*module_command("random")], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_every_process_of_ours_is_started_so():
    found = {
        path.relative_to(ROOT / "specserve").as_posix()
        for path in (ROOT / "specserve").rglob("*.py")
        if re.search(r'sys\.executable, "-[mc]"', path.read_text())
    }
    assert found == set()
