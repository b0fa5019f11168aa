"""The command line: one line per mistake, exit codes, and what each command prints."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_edits import cast, edit_config, edit_tensors, scale
from engine_fixture import make_engine
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file
from tiny_gguf import write_gguf

from specserve import __version__, settings
from specserve.cli import grouped_help
from specserve.cli import main as cli
from specserve.cli.generate import figures, read_prompt, refuse_prompt_as_model
from specserve.config import EngineConfig, ServeConfig
from specserve.errors import AdapterError, UserError
from specserve.messages import Usage


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("SPECSERVE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    from specserve.model.gguf_import import convert_gguf

    folder = tmp_path_factory.mktemp("model")
    out = folder / "tiny"
    out.mkdir()
    convert_gguf(write_gguf(folder / "tiny.gguf"), out, progress=False)
    return out


@pytest.fixture(scope="module")
def adapters_dir(model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_peft_adapter(model_dir, folder / "first", r=4)
    make_peft_adapter(model_dir, folder / "second", r=8, target_modules=["q_proj"], rank_pattern={"0.*q_proj": 2})
    return folder


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.exit_code_of(argv)
    out, err = capsys.readouterr()
    return code, out, err


def captured_serve(monkeypatch) -> list[ServeConfig]:
    """Replaces the server, which a command line alone must not start."""
    import types

    configs: list[ServeConfig] = []
    module = types.ModuleType("specserve.server.run")
    module.serve = configs.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "specserve.server.run", module)
    return configs


@pytest.mark.parametrize("flags, is_ignored", [(["--api-keys-file", "keys.yaml"], True), ([], False)])
def test_a_hangup_is_ignored_before_the_server_is_imported_where_one_asks_for_something(
    capsys, monkeypatch, flags, is_ignored
):
    """The import takes half a second, in which one would end the start."""
    import signal
    import types

    seen = []

    class Module(types.ModuleType):
        @property
        def serve(self):
            seen.append(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
            return lambda config: None

    monkeypatch.setitem(sys.modules, "specserve.server.run", Module("specserve.server.run"))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert run(capsys, "serve", *flags) == (0, "", "")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [is_ignored]


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"specserve, version {__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [[], ["serve"], ["generate"], ["chat"], ["doctor"], ["completion"], ["pull"], ["adapters"], ["bench", "offline"]],
)
def test_help_of_every_command(capsys, command):
    code, out, err = run(capsys, *command, "--help")
    assert code == 0 and "Usage: specserve" in out and err == ""


def test_help_lists_every_command_in_one_section_with_its_whole_first_sentence(capsys):
    listed = [name for names in grouped_help.SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(cli.cli.commands)
    code, out, _ = run(capsys, "--help")
    words = " ".join(out.split())
    assert code == 0 and "Make rows to train on: prompts Write prompts that a model itself takes for a user" in words
    assert "..." not in out.split("Serve and ask:")[1]


@pytest.mark.parametrize("command", [(), ("adapters",), ("bench",)], ids=" ".join)
def test_a_name_that_wants_a_command_alone_shows_its_commands_line_by_line(capsys, command):
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "") and err == run(capsys, *command, "--help")[1]


def test_help_shows_every_setting_with_its_description_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run(capsys, "serve", "--help")
    words = " ".join(out.split())
    for setting in settings.settings_of(ServeConfig):
        assert setting.flag in words
        assert setting.description[1:] in words
    assert "[default: 30.0]" in words and "--no-prefix-caching" in words and "SPECSERVE_KV_CACHE_GIB" in words


def test_help_never_shows_a_key(capsys, monkeypatch):
    monkeypatch.setenv("SPECSERVE_API_KEY", "s3cret")
    _, out, _ = run(capsys, "serve", "--help")
    assert "--api-key" in out and "s3cret" not in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from specserve.cli.main import exit_code_of; exit_code_of(['serve', '--help']); "
        "sys.exit(', '.join({'torch', 'transformers', 'triton', 'gguf', 'yaml', 'aiohttp'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_old_name_of_a_flag_works_and_is_not_shown(capsys, monkeypatch):
    configs = captured_serve(monkeypatch)
    assert run(capsys, "serve", "--compile", "off")[0] == 0
    assert configs[0].kernels == "torch"
    code, _, err = run(capsys, "serve", "--compile", "off", "--kernels", "torch")
    assert code == 2 and "kernels is given twice" in err
    assert "--compile" not in run(capsys, "serve", "--help")[1]


def test_serve_gets_flags_variables_and_file(capsys, monkeypatch, tmp_path):
    configs = captured_serve(monkeypatch)
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nmax_num_seqs: 2\nspeculation: off\n")
    monkeypatch.setenv("SPECSERVE_MAX_NUM_SEQS", "3")
    argv = [
        "serve",
        "some/model",
        "--config",
        str(file),
        "--port",
        "9",
        "--no-prefix-caching",
        "--allowed-hosts",
        "a,b",
    ]
    assert run(capsys, *argv)[0] == 0
    (config,) = configs
    expected = ServeConfig(
        model="some/model",
        port=9,
        max_num_seqs=3,
        speculation="off",
        prefix_caching=False,
        allowed_hosts=("a", "b"),
    )
    assert config == expected


def test_serve_without_anything_is_the_defaults(capsys, monkeypatch):
    configs = captured_serve(monkeypatch)
    assert run(capsys, "serve")[0] == 0
    assert configs == [ServeConfig()]


@pytest.mark.parametrize(
    "argv,part",
    [
        (["serve", "--port", "70000"], "port: '70000' from --port is not a whole number from 0 to 65535"),
        (["serve", "--prt", "1"], "Did you mean '--port'?"),
        (["serv"], "Did you mean 'serve'?"),
        (["serve", "a", "--model", "b"], "give the model once"),
        (["serve", "--config", "/none.yaml"], "cannot read the configuration file /none.yaml"),
        (["generate", "-p", "x", "--prompt-file", "y"], "give the prompt once"),
        (["generate", "-p", ""], "the prompt is empty"),
        (["generate", "Write it's name"], "give the prompt with -p: specserve generate -p 'Write it'"),
        (["generate", "-p", "x", "--max-tokens", "0"], "--max-tokens"),
        (["pull", "/none/such"], "there is no directory /none/such"),
        (["adapters", "list", "/none"], "there is no directory /none"),
        (["adapters", "inspect", "/none"], "there is no directory /none"),
        (["bench", "offline", "--batch-sizes", "1,x"], "--batch-sizes '1,x' is not a list"),
        (["bench", "offline", "--batch-sizes", "65"], "from 1 to 64"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, argv, part):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err


def test_one_word_at_a_terminal_is_no_hub_id_and_a_piped_prompt_leaves_it_one():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with pytest.raises(UserError, match="'hello' stands in the place of MODEL.*-p hello"):
        refuse_prompt_as_model("hello", Terminal())
    for model, stdin in (("", Terminal()), ("owner/name", Terminal()), ("gpt2", io.StringIO()), ("x.gguf", Terminal())):
        refuse_prompt_as_model(model, stdin)


def test_a_cache_beyond_the_memory_is_refused_by_name(capsys, model_dir):
    code, _, err = run(capsys, "generate", str(model_dir), "-p", "x", "--kv-cache-gib", "99999", "--kernels", "torch")
    assert code == 2 and "kv_cache_gib=99999 is more than the memory of the device" in err and err.count("\n") == 1


def test_a_bug_of_ours_is_one_line_unless_debugging(capsys, monkeypatch):
    def broken(config):
        raise ZeroDivisionError("oops")

    captured_serve(monkeypatch)
    monkeypatch.setattr(sys.modules["specserve.server.run"], "serve", broken)
    code, _, err = run(capsys, "serve")
    assert code == 1 and err.count("\n") == 1 and "internal error" in err and "ZeroDivisionError: oops" in err
    with pytest.raises(ZeroDivisionError):
        cli.exit_code_of(["serve", "--debug"])
    monkeypatch.setenv("SPECSERVE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.exit_code_of(["serve"])


def test_interrupting_is_quiet(capsys, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    captured_serve(monkeypatch)
    monkeypatch.setattr(sys.modules["specserve.server.run"], "serve", interrupted)
    code, out, err = run(capsys, "serve")
    assert (code, out, err.strip()) == (130, "", "")


def test_pull_prints_the_directory(capsys, model_dir):
    assert run(capsys, "pull", str(model_dir)) == (0, f"{model_dir}\n", "")


def test_prompt_comes_from_flag_file_or_stdin(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("from file")
    assert read_prompt("from flag", None, io.StringIO("unread")) == "from flag"
    assert read_prompt(None, file, io.StringIO("unread")) == "from file"
    assert read_prompt(None, None, io.StringIO("from stdin")) == "from stdin"
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read_prompt(None, missing, io.StringIO(""))


def test_figures_count_tokens_a_step():
    usage = Usage(12, 60, 0, 20, 50, 40, 0, 0)
    assert figures(usage, 2.0) == "60 tokens in 2.00 s, 30.0 tokens/s, 3.00 tokens a step; prompt 12 tokens"


def test_adapters_list_names_every_folder(capsys, adapters_dir):
    code, out, _ = run(capsys, "adapters", "list", str(adapters_dir))
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == ["name", "first", "second"]
    assert lines[1].split()[1] == "4" and lines[2].split()[1] == "2-8" and lines[2].endswith("q_proj")


def test_adapters_list_of_an_empty_folder_is_fine(capsys, tmp_path):
    (tmp_path / "README.md").write_text("not an adapter")
    code, out, err = run(capsys, "adapters", "list", str(tmp_path))
    assert (code, out) == (0, "") and "no adapters" in err


def test_adapters_list_names_the_broken_ones(capsys, tmp_path):
    (tmp_path / "broken").mkdir()
    code, out, _ = run(capsys, "adapters", "list", str(tmp_path))
    assert code == 1 and "broken  problem: " in out and "a PEFT LoRA directory is expected" in out


def test_adapters_inspect_shows_what_it_is(capsys, model_dir, adapters_dir):
    code, out, _ = run(capsys, "adapters", "inspect", str(adapters_dir / "first"), "--model", str(model_dir))
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert (rows["rank"], rows["alpha"], rows["layers"], rows["pairs"]) == ("4", "16", "2", "14 (A, B)")
    assert rows["modules"] == "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert rows["checked"] == "as the server does"


def test_adapters_inspect_finds_problems_only_the_model_shows(capsys, model_dir, adapters_dir):
    argv = ["adapters", "inspect", str(adapters_dir / "second"), "--max-lora-rank", "4"]
    assert run(capsys, *argv)[0] == 0
    code, out, _ = run(capsys, *argv, "--model", str(model_dir))
    assert code == 1 and "problem" in out and "rank 8" in out


def trained_copy(path, model_dir):
    weight = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"].float()
    weight[7] += 5e-3
    edit_tensors(path, lambda tensors: tensors | {"base_model.model.model.embed_tokens.weight": weight})


UNSERVED = {
    "trained copy": (trained_copy, "differs from the base model's"),
    "narrower": (lambda path, model_dir: edit_config(path, target_modules=["q_proj"]), "leaves it out"),
    "values": (lambda path, model_dir: edit_tensors(path, scale(1e40)), r"beyond the range of (bfloat16|float32)"),
    "alpha": (lambda path, model_dir: edit_config(path, lora_alpha=1e300), r"beyond the range of (bfloat16|float32)"),
    "pattern": (lambda path, model_dir: edit_config(path, alpha_pattern="q_proj"), "alpha_pattern is 'q_proj'"),
    "int8": (lambda path, model_dir: edit_tensors(path, cast(torch.int8)), "int8"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_adapters_inspect_says_what_the_server_says(capsys, model_dir, adapters_dir, engine, tmp_path, name):
    spoil, part = UNSERVED[name]
    path = shutil.copytree(adapters_dir / "first", tmp_path / "unserved")
    spoil(path, model_dir)
    with pytest.raises(AdapterError, match=part) as caught:
        engine.load_adapter("unserved", path)
    code, out, _ = run(capsys, "adapters", "inspect", str(path), "--model", str(model_dir))
    assert code == 1 and str(caught.value) in out


@pytest.fixture(scope="module")
def engine(model_dir):
    return make_engine(model_dir, dtype="auto")


PLAIN, WEIGHTS = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8}', "adapter_model.safetensors"


@pytest.mark.parametrize(
    "files,part",
    [
        ({"adapter_config.json": "{", WEIGHTS: ""}, "not valid JSON"),
        ({"adapter_config.json": "[]", WEIGHTS: ""}, "holds list, not an object"),
        ({"adapter_config.json": '{"peft_type": "IA3"}', WEIGHTS: ""}, "peft_type is 'IA3'"),
        ({"adapter_config.json": PLAIN, "adapter_model.bin": ""}, "pickles"),
        ({"adapter_config.json": PLAIN, WEIGHTS: "x"}, "not readable"),
        ({WEIGHTS: "x"}, "a PEFT LoRA directory is expected"),
    ],
)
def test_adapters_inspect_names_what_is_wrong(capsys, tmp_path, files, part):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, out, _ = run(capsys, "adapters", "inspect", str(tmp_path))
    assert code == 1 and part in out


def generated(capsys, model_dir: Path, *argv: str) -> str:
    flags = ["--dtype", "fp32", "--kv-cache-gib", "0.01", "--max-tokens", "12", "--ignore-eos"]
    code, out, err = run(capsys, "generate", str(model_dir), *flags, *argv)
    assert code == 0, err
    assert "12 tokens in" in err and "tokens a step" in err
    return out


def test_generate_is_the_same_with_and_without_drafts(capsys, model_dir):
    prompt = ["--raw", "-p", "hello hello hello hello"]
    out = generated(capsys, model_dir, *prompt)
    assert len(out) > 1 and out.endswith("\n")
    assert generated(capsys, model_dir, *prompt, "--speculation", "off") == out


def test_generate_shades_each_token_by_what_drafted_it(capsys, model_dir):
    prompt = ("-p", "a b c a b c a b c a b c", "--raw", "--ignore-eos")
    plain = generated(capsys, model_dir, *prompt)
    assert generated(capsys, model_dir, *prompt, "--trace") == plain  # no terminal
    shaded = generated(capsys, model_dir, *prompt, "--trace", "--color", "always")
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else c for c in plain)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shaded) == shown.replace("\x7f", "\u2421")
    code, _, err = run(capsys, "generate", str(model_dir), "-p", "x", "--rejected")
    assert code == 2 and "--trace" in err


def test_generate_uses_the_chat_template_unless_told_not_to(capsys, model_dir):
    chat = generated(capsys, model_dir, "-p", "hello")
    assert chat == generated(capsys, model_dir, "--raw", "-p", "<|im_start|>hello<|im_end|>")
    assert chat != generated(capsys, model_dir, "--raw", "-p", "hello")


def test_generate_with_an_adapter_changes_the_output(capsys, model_dir, adapters_dir):
    prompt = ["--raw", "-p", "hello"]
    base = generated(capsys, model_dir, *prompt)
    assert generated(capsys, model_dir, *prompt, "--adapter", str(adapters_dir / "first")) != base


def test_bench_offline_ends_in_a_json_line(capsys, model_dir):
    import json

    flags = ["--dtype", "fp32", "--kv-cache-gib", "0.01", "--max-tokens", "8", "--rounds", "1", "--batch-sizes", "1,2"]
    code, out, err = run(capsys, "bench", "offline", str(model_dir), *flags)
    assert code == 0, err
    results = json.loads(out.splitlines()[-1])["results"]
    assert [(row["batch"], row["drafts"]) for row in results] == [(1, "off"), (1, "auto"), (2, "off"), (2, "auto")]
    assert all(row["tokens_per_s"] > 0 for row in results)


def test_bench_offline_profiles_steps_by_phase(capsys, model_dir, adapters_dir, tmp_path):
    import json

    flags = ["--dtype", "fp32", "--kv-cache-gib", "0.01", "--max-tokens", "8", "--rounds", "1", "--batch-sizes", "2"]
    flags += ["--adapters-dir", str(adapters_dir), "--profile", str(tmp_path / "trace.json")]
    code, out, err = run(capsys, "bench", "offline", str(model_dir), *flags)
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["adapters"] > 0
    for drafts in ("off", "auto"):
        profile = summary["profiles"][f"batch 2, drafts {drafts}"]
        assert {"gate_up", "attention", "lm_head", "sample", "propose drafts"} <= set(profile["ms_per_step"])
        assert profile["steps"] > 1 and 0 < profile["model_share"] < 1
        events = json.loads((tmp_path / f"trace-2-{drafts}.json").read_text())["traceEvents"]
        assert sum(event["name"] == "sample" for event in events) == profile["steps"]
    code, _, err = run(capsys, "bench", "offline", str(model_dir), *flags[:-4], "--adapters-dir", str(tmp_path))
    assert code == 2 and "holds no folder with an adapter_config.json" in err


def test_engine_commands_know_exactly_the_engine_settings():
    for command in (cli.generate, cli.bench.commands["offline"]):
        names = {parameter.name for parameter in command.params}
        assert set(EngineConfig.__struct_fields__) <= names and "port" not in names
