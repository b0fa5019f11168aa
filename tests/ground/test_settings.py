"""Settings: precedence, types, limits, and messages that say what is wrong and where it was said."""

from pathlib import Path

import pytest
import torch
from places import EXAMPLES

from specserve.compute.device_choice import adapter_budgets, full_device, kv_cache_gib, with_defaults
from specserve.config import EngineConfig, ServeConfig
from specserve.errors import UserError
from specserve.settings import load, read_file, settings_of


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def error_of(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flag_wins_over_environment_over_file_over_default(tmp_path):
    file = write(tmp_path, "port: 1\nmax_num_seqs: 2\nblock_size: 4\n")
    env = {"SPECSERVE_PORT": "11", "SPECSERVE_MAX_NUM_SEQS": "12"}
    config = load(ServeConfig, {"port": "21"}, env, file)
    assert (config.port, config.max_num_seqs, config.block_size, config.max_waiting) == (21, 12, 4, 1024)


def test_nothing_given_is_the_defaults():
    assert load(ServeConfig, {}, {}) == ServeConfig()
    assert load(ServeConfig, {"port": None, "allowed_hosts": ()}, {"SPECSERVE_PORT": ""}) == ServeConfig()


def test_config_file_may_come_from_the_environment(tmp_path):
    file = write(tmp_path, "port: 1\n")
    assert load(ServeConfig, {}, {"SPECSERVE_CONFIG": str(file)}).port == 1


def test_every_field_has_a_flag_a_variable_and_a_description():
    settings = settings_of(ServeConfig)
    assert [s.name for s in settings] == list(ServeConfig.__struct_fields__)
    assert all(s.description for s in settings)
    kv = next(s for s in settings if s.name == "kv_cache_gib")
    assert (kv.flag, kv.env, kv.default) == ("--kv-cache-gib", "SPECSERVE_KV_CACHE_GIB", None)


def test_sizes_that_nobody_set_follow_the_device():
    cpu, cuda = (with_defaults(EngineConfig(max_prefill_rows=7), torch.device(kind)) for kind in ("cpu", "cuda"))
    assert (cpu.max_num_seqs, cpu.max_batched_tokens, cpu.max_prefill_rows) == (64, 512, 7)
    assert (cuda.max_num_seqs, cuda.max_batched_tokens, cuda.max_prefill_rows) == (256, 2048, 7)
    assert kv_cache_gib(cpu, torch.device("cpu")) == 2.0
    assert kv_cache_gib(EngineConfig(kv_cache_gib=0.5), torch.device("cuda")) == 0.5


def test_the_kv_cache_on_a_gpu_leaves_what_steps_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 24 << 30))
    device, config = torch.device("cuda"), EngineConfig(max_batched_tokens=2048)
    assert kv_cache_gib(config, device, 2 << 30) == pytest.approx(0.8 * 4)
    with pytest.raises(UserError, match=r"leaves 6.0 GiB .* max_batched_tokens=2048 rows may take 7.0; lower it"):
        kv_cache_gib(config, device, 7 << 30)
    assert kv_cache_gib(EngineConfig(kv_cache_gib=3.0), device, 7 << 30) == 3.0  # who says so tries
    budgets = adapter_budgets(config, device, 5 << 30)
    assert budgets.step_bytes == (1 << 30) // 2  # half of what is left


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_a_gpu_whose_memory_is_full_is_told_from_other_errors(error):
    full = full_device(error, EngineConfig(kv_cache_gib=2.5))
    assert full is not None and "lower kv_cache_gib (--kv-cache-gib, now 2.5)" in str(full)
    assert full_device(RuntimeError("no kernel image"), EngineConfig()) is None


def test_choices_keep_the_order_they_are_written_in():
    log_level = next(s for s in settings_of(ServeConfig) if s.name == "log_level")
    assert log_level.choices == ("debug", "info", "warning", "error")


@pytest.mark.parametrize("text,expected", [("true", True), ("0", False), ("False", False)])
def test_booleans_from_the_environment(text, expected):
    assert load(EngineConfig, {}, {"SPECSERVE_PREFIX_CACHING": text}).prefix_caching is expected


def test_switches_come_as_booleans():
    assert load(EngineConfig, {"prefix_caching": False}, {"SPECSERVE_PREFIX_CACHING": "true"}).prefix_caching is False


def test_lists_come_from_repeated_flags_commas_and_yaml(tmp_path):
    assert load(ServeConfig, {"allowed_hosts": ("a", "b,c")}, {}).allowed_hosts == ("a", "b", "c")
    assert load(ServeConfig, {}, {"SPECSERVE_ALLOWED_HOSTS": "a, b"}).allowed_hosts == ("a", "b")
    assert load(ServeConfig, {}, {}, write(tmp_path, "allowed_hosts: [a, b]")).allowed_hosts == ("a", "b")


def test_text_that_looks_like_a_number_stays_text():
    config = load(ServeConfig, {"api_key": "123", "model": "null"}, {})
    assert (config.api_key, config.model) == ("123", "null")


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"port": "99999"}, "port: '99999' from --port is not a whole number from 0 to 65535"),
        ({"port": "x"}, "port: 'x' from --port is not a whole number from 0 to 65535"),
        ({"kv_cache_gib": "-1"}, "kv_cache_gib: '-1' from --kv-cache-gib is not a number more than 0"),
        ({"kv_cache_gib": "nan"}, "kv_cache_gib: 'nan' from --kv-cache-gib is not a number more than 0"),
        ({"kv_cache_gib": "inf"}, "kv_cache_gib: 'inf' from --kv-cache-gib is not a number more than 0"),
        ({"device": "tpu"}, "device: 'tpu' from --device is not one of auto, cpu, cuda"),
        ({"num_threads": "0"}, "num_threads: '0' from --num-threads is not a whole number at least 1"),
        ({"max_model_len": "0"}, "max_model_len: '0' from --max-model-len is not a whole number at least 1"),
        ({"api_key": ""}, "api_key: '' from --api-key is not text of at least 1 character"),  # "Bearer " would be it
        ({"adapters_dir": ""}, "adapters_dir: '' from --adapters-dir is not text of at least 1 character"),
        ({"adapter_roots": ""}, "adapter_roots: '' from --adapter-roots is not a list of texts"),  # it means anywhere
        ({"adapter_roots": ["/a", 5]}, "adapter_roots: ['/a', 5] from --adapter-roots is not a list of texts"),
        ({"adapter_roots": 5}, "adapter_roots: 5 from --adapter-roots is not a list of texts"),  # of a RayService
        ({"max_waiting": "1.5"}, "max_waiting: '1.5' from --max-waiting is not a whole number at least 0"),
    ],
)
def test_a_wrong_flag_names_key_value_limit_and_flag(flags, message):
    assert error_of(load, ServeConfig, flags, {}) == message


def test_a_wrong_variable_names_the_variable():
    message = error_of(load, ServeConfig, {}, {"SPECSERVE_PREFIX_CACHING": "perhaps"})
    assert message == "prefix_caching: 'perhaps' from SPECSERVE_PREFIX_CACHING is not true or false"


def test_a_wrong_file_value_names_the_file(tmp_path):
    file = write(tmp_path, "port: '8000'\n")
    assert error_of(read_file, file) == f"port: '8000' from {file} is not a whole number from 0 to 65535"


def test_an_unknown_key_names_the_nearest_known_one(tmp_path):
    assert "did you mean 'kv_cache_gib'?" in error_of(read_file, write(tmp_path, "kv-cache-gb: 3\n"))
    assert "--help" in error_of(read_file, write(tmp_path, "zzz: 3\n"))


def test_off_is_text_in_yaml(tmp_path):
    assert load(EngineConfig, {}, {}, write(tmp_path, "speculation: off\n")).speculation == "off"
    assert load(EngineConfig, {}, {}, write(tmp_path, "prefix_caching: false\n")).prefix_caching is False


def test_null_in_yaml_is_none_only_where_none_is_a_value(tmp_path):
    assert load(ServeConfig, {}, {}, write(tmp_path, "api_key: null\n")).api_key is None
    assert "whole number" in error_of(read_file, write(tmp_path, "port: null\n"))


def test_one_file_serves_commands_that_know_fewer_settings(tmp_path):
    assert load(EngineConfig, {}, {}, write(tmp_path, "port: 1\nblock_size: 4\n")).block_size == 4


@pytest.mark.parametrize(
    "text,part",
    [
        ("port: 1\nport: 2\n", "line 2 is not valid YAML: key 'port' stands twice"),
        ("port: [1\n", "is not valid YAML"),
        ("- port\n", "must hold `key: value` lines"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, part):
    assert part in error_of(read_file, write(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path):
    assert "No such file" in error_of(read_file, tmp_path / "none.yaml")


def test_an_empty_file_sets_nothing(tmp_path):
    assert read_file(write(tmp_path, "# nothing\n")) == {}


def test_secrets_appear_in_no_message(tmp_path):
    assert "s3cret" not in error_of(read_file, write(tmp_path, "api_key: [s3cret]\n"))


def test_the_example_file_is_valid_and_shows_only_defaults():
    """What the example sets is commented with the default, so it must not drift from the code."""
    example = EXAMPLES / "config.yaml"
    values = read_file(example)
    assert values.pop("adapters_dir") == "examples/adapters"
    defaults = ServeConfig()
    assert values and all(getattr(defaults, key) == value for key, value in values.items())


OLD_VALUES = [("auto", "auto"), ("on", "native"), ("off", "torch"), ("triton", "triton")]


@pytest.mark.parametrize("old,now", OLD_VALUES)
def test_an_old_name_holds_with_its_old_values_and_says_the_new_ones_once(old, now, tmp_path, caplog):
    file = write(tmp_path, f"compile: {old}\n")
    for given, instead in (
        (({"compile": old}, {}), f"--compile {old} is now called --kernels {now};"),
        (({}, {"SPECSERVE_COMPILE": old}), f"SPECSERVE_COMPILE={old} is now called SPECSERVE_KERNELS={now};"),
        (({}, {}, file), f"compile: {old} in {file} is now called kernels: {now} in {file};"),
    ):
        caplog.clear()
        assert load(EngineConfig, *given).kernels == now
        assert [instead in record.message for record in caplog.records] == [True]


def test_an_old_name_keeps_the_order_of_flag_variable_and_file(tmp_path, caplog):
    file = write(tmp_path, "compile: on\n")
    assert load(EngineConfig, {"compile": "off"}, {"SPECSERVE_COMPILE": "triton"}, file).kernels == "torch"
    assert len(caplog.records) == 1


def test_an_old_name_beside_the_new_one_is_refused_wherever_they_stand(tmp_path):
    file = write(tmp_path, "compile: off\n")
    assert error_of(load, EngineConfig, {"kernels": "auto", "compile": "off"}, {}) == (
        "kernels is given twice, as --kernels auto and under its old name as --compile off; leave that out"
    )
    message = error_of(load, EngineConfig, {}, {"SPECSERVE_KERNELS": "torch"}, file)
    assert "as SPECSERVE_KERNELS=torch and" in message and f"as compile: off in {file};" in message


def test_an_old_name_does_not_take_new_values():
    message = error_of(load, EngineConfig, {"compile": "native"}, {})
    assert message == "compile: 'native' from --compile is not one of auto, on, off, triton"
