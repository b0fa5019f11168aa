"""`specserve doctor`: each thing that can be missing is found, with its fix, and decides the exit status."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib import metadata

import pytest
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model

from specserve.cli import doctor_machine, doctor_serving
from specserve.cli import main as cli
from specserve.cli.doctor import Finding, examined, shown
from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.kernels import native, native_build
from specserve.kernels.native_build import NativeError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("doctor") / "tiny")


@pytest.fixture(scope="module")
def adapters_dir(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    make_peft_adapter(model_dir, root / "good", r=2)
    return root


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SPECSERVE_")]:
        monkeypatch.delenv(name)


def found(check, **settings):
    """Findings by name; those of one name are the last of them."""
    config = ServeConfig(**{"port": 0, **settings})
    return {finding.name: finding for finding in examined("check", check, config)}


def test_a_machine_that_lacks_nothing(capsys, model_dir, adapters_dir):
    flags = [str(model_dir), "--adapters-dir", str(adapters_dir), "--port", "0", "--kv-cache-gib", "0.1"]
    assert cli.exit_code_of(["doctor", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    by_name = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] and by_name["adapters"]["found"].endswith(": good")
    assert {"python", "torch", "cpu", "gpu", "clock", "model", "memory", "port"} <= set(by_name)
    assert all(finding["fix"] for finding in report["findings"] if finding["status"] != "ok")


def test_what_is_missing_is_a_line_and_exit_code_1(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Mamba"]}')
    assert cli.exit_code_of(["doctor", str(tmp_path), "--port", "0"]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("missing")]
    assert line.split()[1] == "model" and "Mamba" in line and out.endswith("1 missing\n")


def test_a_wrong_setting_is_the_users_to_fix(capsys):
    assert cli.exit_code_of(["doctor", "--port", "70000"]) == 2
    assert "port: '70000'" in capsys.readouterr().err


def test_versions_that_do_not_fit(monkeypatch):
    version = metadata.version
    needs = [
        "torch>=2.11",
        "transformers>=5",
        "msgspec>=0.20",
        "click>=8",
        'pytest; extra == "test"',
        "nowhere-at-all>=1",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    old = {"torch": "2.2.0", "msgspec": "0.1"}
    monkeypatch.setattr(metadata, "version", lambda name: old.get(name) or version(name))
    by_name = found(doctor_machine.python_and_packages)
    assert by_name["torch"].status == "missing" and "2.2.0, where >=2.11 is needed" in by_name["torch"].found
    assert by_name["torch"].fix == "pip install 'torch>=2.11'" and by_name["transformers"].status == "ok"
    assert by_name["packages"].found == "msgspec: 0.1, where >=0.20 is needed; nowhere-at-all: not installed"
    assert by_name["packages"].fix == "pip install 'msgspec>=0.20' 'nowhere-at-all>=1'"
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    python = found(doctor_machine.python_and_packages)["python"]
    assert (python.status, python.found) == ("missing", "3.9.1") and "3.11" in python.fix


@pytest.mark.parametrize(("settings", "status"), [({}, "warning"), ({"kernels": "native"}, "missing"),
    ({"quantization": "int8"}, "missing"), ({"kernels": "generic"}, "missing")])  # fmt: skip
def test_no_compiler_matters_where_native_kernels_are_needed(monkeypatch, settings, status):
    def none():
        raise NativeError("no C++ compiler was found")

    monkeypatch.setattr(native_build, "find_compiler", none)
    compiler = found(doctor_machine.native_kernels, **settings)["compiler"]
    assert compiler.status == status and "apt install g++" in compiler.fix


def test_kernels_that_do_not_build(monkeypatch):
    def fails(level=None):
        raise NativeError("g++ failed")

    monkeypatch.setattr(native, "load_library", fails)
    assert found(doctor_machine.native_kernels)["kernels"].status == "warning"
    assert found(doctor_machine.native_kernels, kernels="native")["kernels"].status == "missing"


def test_threads_beyond_the_cores(monkeypatch):
    assert found(doctor_machine.cpu, num_threads=1)["cpu"].status == "ok"
    assert "--num-threads" in found(doctor_machine.cpu, num_threads=100_000)["cpu"].fix


def test_a_quantization_that_the_device_has_not():
    assert not found(doctor_machine.quantization)
    assert found(doctor_machine.quantization, quantization="int8", device="cpu")["quantization"].status == "ok"
    fp8 = found(doctor_machine.quantization, quantization="fp8", device="cpu")["quantization"]
    assert fp8.status == "missing" and "fp8 is for CUDA; on a CPU set it to int8 or int4" in fp8.found


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor_machine, "_first_line", lambda *command: "GPU X, 80 GiB, 570.1")
    assert found(doctor_machine.gpu)["gpu"].status == "warning"
    gpu = found(doctor_machine.gpu, device="cuda")["gpu"]
    assert gpu.status == "missing" and "torch cannot use it" in gpu.found
    monkeypatch.setattr(doctor_machine, "_first_line", lambda *command: "")
    assert found(doctor_machine.gpu, device="cuda")["gpu"].fix == "--device auto or cpu"


def test_pages_handles_and_the_clock(monkeypatch, tmp_path):
    pages = tmp_path / "enabled"
    monkeypatch.setattr(doctor_machine, "_TRANSPARENT", pages)
    assert found(doctor_machine.pages)["huge pages"].status == "ok"
    pages.write_text("always madvise [never]\n")
    assert found(doctor_machine.pages)["huge pages"].status == "warning"
    monkeypatch.setattr("resource.getrlimit", lambda which: (64, 256))
    assert "256 at most" in found(doctor_machine.handles)["file handles"].found
    monkeypatch.setattr("time.time", lambda: 1000.0)
    clock = found(doctor_machine.clock)["clock"]
    assert clock.status == "warning" and clock.found.startswith("1970-01-01")


def test_caches_that_cannot_be_written_or_are_full(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    log = str(tmp_path / "file" / "log")
    by_name = found(doctor_machine.caches, history_dir=str(tmp_path / "history"), serving_log=log)
    assert by_name["cache: served"].status == "missing"
    assert by_name["cache: models"].status == "missing" and "XDG_CACHE_HOME" in by_name["cache: models"].fix
    assert by_name["cache: history"].status == "ok" and not (tmp_path / "history").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 5))
    assert found(doctor_machine.caches, history_dir=str(tmp_path))["cache: history"].status == "warning"


@pytest.mark.parametrize("file", [".", "specserve", "specserve/native"])
def test_a_file_where_a_cache_is_to_be_is_named_and_all_checks_are_made(monkeypatch, capsys, model_dir, tmp_path, file):
    path = tmp_path / "cache" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "load_library", native.load_library.__wrapped__)  # which this process may have loaded
    assert cli.exit_code_of(["doctor", str(model_dir), "--port", "0", "--json"]) == 1
    by_name = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    for name in ("kernels", "drafts"):
        assert by_name[name]["status"] == "warning" and "XDG_CACHE_HOME" in by_name[name]["fix"]
    folder = by_name["cache: native code"[:14]]
    assert folder["status"] == "missing" and folder["found"].startswith(f"{path} is a file")
    assert {"gpu", "clock", "model", "memory", "port"} <= set(by_name)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/x"), KeyError("y")])
def test_a_check_that_fails_is_a_line_with_a_fix(error):
    def fails(config):
        raise error

    (finding,) = examined("x", fails, ServeConfig())
    assert finding.status == "missing" and "cannot be looked at" in finding.found and finding.fix


def test_a_model_that_is_elsewhere_is_only_told_of(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finding = found(doctor_serving.model)["model"]
    assert (finding.status, finding.fix) == ("warning", "specserve pull")
    finding = found(doctor_serving.model, model="nobody/never-heard-of-it")["model"]
    assert (finding.status, finding.fix) == ("warning", "specserve pull nobody/never-heard-of-it")


def test_a_model_without_weights_or_memory(monkeypatch, model_dir, tmp_path):
    shutil.copy(model_dir / "config.json", tmp_path)
    assert "no *.safetensors" in found(doctor_serving.model, model=str(tmp_path))["check"].found
    monkeypatch.setattr("specserve.memory.available_bytes", lambda: 1 << 30)
    by_name = found(doctor_serving.model, model=str(model_dir), device="cpu")
    assert by_name["model"].status == "ok" and by_name["memory"].status == "warning"
    monkeypatch.setattr("specserve.memory.available_bytes", lambda: 1000)
    assert found(doctor_serving.model, model=str(model_dir), device="cpu")["memory"].status == "missing"


def test_adapters_that_cannot_be_served(model_dir, adapters_dir, tmp_path):
    root = shutil.copytree(adapters_dir, tmp_path / "adapters")
    shutil.copytree(root / "good", root / "torn")
    (root / "torn" / "adapter_model.safetensors").write_bytes(b"x")
    findings = list(doctor_serving.adapters(ServeConfig(model=str(model_dir), adapters_dir=str(root))))
    assert [(finding.status, finding.name) for finding in findings] == [("missing", "adapters"), ("ok", "adapters")]
    assert "torn" in findings[0].found and findings[0].fix.startswith("specserve adapters inspect")
    low = found(doctor_serving.adapters, model=str(model_dir), adapters_dir=str(adapters_dir), max_lora_rank=1)
    assert low["adapters"].status == "missing" and "rank" in low["adapters"].found  # as the server reads it
    assert "is not a directory" in found(doctor_serving.adapters, adapters_dir="/nowhere")["check"].found


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = found(doctor_serving.port, port=taken.getsockname()[1])["check"]
    assert finding.status == "missing" and "choose another --port" in finding.found


def test_keys_and_certificates(tmp_path):
    by_name = found(doctor_serving.keys, host="0.0.0.0")
    assert by_name["keys"].status == "warning" and "--api-key" in by_name["keys"].fix
    assert found(doctor_serving.tls, host="0.0.0.0", api_key="k")["tls"].status == "warning"
    for check in (doctor_serving.keys, doctor_serving.tls):
        assert found(check) == found(check, host="127.0.0.2", api_key="k") == {}


def test_a_bad_certificate_and_a_bad_file_of_keys_are_two_lines(capsys, model_dir, tmp_path):
    flags = ["--api-keys-file", str(tmp_path / "keys.yaml"), "--tls-certfile", str(tmp_path / "no.pem")]
    assert cli.exit_code_of(["doctor", str(model_dir), "--port", "0", "--json", *flags]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    missing = {finding["name"]: finding["found"] for finding in findings if finding["status"] == "missing"}
    assert "keys.yaml" in missing["keys"] and "tls_certfile" in missing["tls"]


def test_a_finding_is_one_line_whatever_is_in_it():
    line = shown(Finding("adapters", "missing", "a\nb\x1b[2J", "fix"), has_colour=False)
    assert line == "missing  adapters        a\\nb\\x1b[2J -> fix"
    assert shown(Finding("x", "ok", "y"), has_colour=True).startswith("\x1b[32mok     \x1b[0m")

    def raises(config):
        yield Finding("x", "ok", "y")
        raise UserError("no")

    assert [finding.status for finding in examined("x", raises, ServeConfig())] == ["ok", "missing"]


def test_completion_scripts_are_accepted_by_their_shells(tmp_path):
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run(
            [sys.executable, "-m", "specserve.cli", "completion", shell], capture_output=True, text=True, check=True
        )
        assert "_SPECSERVE_COMPLETE" in done.stdout and done.stderr == ""
        if shutil.which(shell):
            script = tmp_path / shell
            script.write_text(done.stdout)
            assert subprocess.run([shell, "-n", script]).returncode == 0


def test_completion_knows_commands_flags_and_choices():
    def completed(*words):
        env = {**os.environ, "_SPECSERVE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words),
               "COMP_CWORD": str(len(words) - 1)}  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "specserve.cli"], env=env, capture_output=True, text=True)
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert {"serve", "chat", "doctor", "completion"} <= set(completed("specserve", ""))
    assert "--kv-cache-gib" in completed("specserve", "serve", "--kv")
    assert completed("specserve", "serve", "--dtype", "b") == ["bf16"]
