"""What `LLM` is to the program around it: light to import, without guards, gone with it, interruptible; its options."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import specserve
from specserve import LLM, UserError
from specserve.errors import EngineDeadError, ModelError
from specserve.llm.options import config_of

PROGRAM = """
import faulthandler, os, signal, sys, threading
from specserve import LLM, SamplingParams

llm = LLM({model!r}, dtype="fp32", kv_cache_gib=0.02, num_threads=1)
long = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)
print(llm.engine_info.pid)
print("torch" in sys.modules)

begun = threading.Event()
threading.Thread(target=lambda: (begun.wait(), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
try:
    for output in llm.generate_stream("The", long):
        begun.set()
except KeyboardInterrupt:
    print("interrupted")

def interrupt():
    while not llm.stats().requests.running:
        pass
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    llm.generate(["The"] * 50, long)
except KeyboardInterrupt:
    print("interrupted")

def status_of_fork(close):
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(60, exit=True)
        if close:  # what it has a copy of
            llm.close()
        sys.exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

print(status_of_fork(close=False), status_of_fork(close=True))
print(len(llm.generate("The", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
"""


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_program_needs_no_guard_is_interrupted_and_leaves_nothing_and_forks_leave_it_its_engine(model_dir, tmp_path):
    """The last statement has no `close`, and there is no `if __name__`. Forks end."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(model=str(model_dir)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    pid, imported, *rest = done.stdout.split()
    assert (done.returncode, imported, rest) == (0, "False", ["interrupted", "interrupted", "7", "7", "3"]), done.stderr
    assert done.stderr == ""
    deadline = time.monotonic() + 30
    while is_alive(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


INTERRUPTED = """
import glob, os, signal, threading
from specserve import LLM

def interrupt():
    while not (pids := [pid for file in glob.glob("/proc/self/task/*/children") for pid in open(file).read().split()]):
        pass
    print(*pids, flush=True)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    LLM({model!r}, dtype="fp32", kv_cache_gib=0.02, num_threads=1)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_start_that_is_interrupted_leaves_no_engine_and_says_nothing_more(model_dir, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(INTERRUPTED.format(model=str(model_dir)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    pid, word = done.stdout.split()
    assert (done.returncode, word, done.stderr) == (0, "interrupted", "")
    assert not is_alive(int(pid))


def test_importing_the_package_imports_nothing_of_it():
    code = (
        "import sys; before = set(sys.modules); import specserve; dir(specserve); "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - {'specserve'}; "
        "assert not new & {'torch', 'transformers', 'aiohttp', 'msgspec', 'numpy', 'asyncio'}, new; "
        "assert [name for name in sys.modules if name.startswith('specserve.')] == ['specserve.lazy_names']; "
        "specserve.SamplingParams(n=2); specserve.UserError; specserve.LLM; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_there():
    assert all(getattr(specserve, name) is not None for name in specserve.__all__)
    assert set(specserve.__all__) <= set(dir(specserve))
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        specserve.LMM  # noqa: B018


def test_a_copy_of_the_process_is_refused(llm, monkeypatch):
    """A fork has neither the thread nor the socket."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(EngineDeadError, match="another one here"):
        llm.generate("x")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache_gb": 2}, "no option 'kv_cache_gb'; did you mean 'kv_cache_gib'?"),
        ({"tensor_parallel_size": 2}, "no option 'tensor_parallel_size'; known are"),
        ({"port": 8000}, "no option 'port'"),
        ({"block_size": 0}, "block_size: 0 from LLM(...) is not a whole number from 1 to 256"),
        ({"dtype": "float32"}, "dtype: 'float32' from LLM(...) is not one of auto, fp32"),
        ({"adapters_dir": "/nowhere"}, "'/nowhere' is not a directory"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(UserError) as raised:
        LLM(**options)
    assert words in str(raised.value)


def test_a_model_that_cannot_be_served_is_an_error_with_a_name(tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        LLM(tmp_path)


def test_options_are_the_settings_and_the_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("SPECSERVE_MAX_NUM_SEQS", "3")
    config = config_of(Path("/model"), {"adapter_roots": ["/a", Path("/b")], "kv_cache_gib": 1, "revision": None})
    assert (config.model, config.adapter_roots, config.kv_cache_gib) == ("/model", ("/a", "/b"), 1.0)
    assert config.max_num_seqs is None and config.max_waiting_tokens > 1 << 30
