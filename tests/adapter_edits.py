"""Changes to a PEFT directory on disk: what its configuration says, what its tensors are, how its files are broken."""

import json

import torch
from safetensors.torch import load_file, save_file

from specserve.adapter_files import WEIGHTS_FILE
from specserve.model.config import ModelConfig
from specserve.served_base import ServedBase

CATASTROPHE = "([a-z_.0-9]+)+!"  # as a regular expression it takes for ever on any module's name


def config_of(**changes):
    """A change of adapter_config.json."""
    return lambda path: edit_config(path, **changes)


def tensors_of(change):
    """A change of the tensors, `change` mapping name -> tensor to another such dict."""
    return lambda path: edit_tensors(path, change)


def edit_config(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(path, change):
    tensors = load_file(path / WEIGHTS_FILE)
    save_file(change(tensors), path / WEIGHTS_FILE)


def first(tensors, side):
    return next(name for name in sorted(tensors) if f"lora_{side}" in name)


def drop_b(tensors):
    del tensors[first(tensors, "B")]
    return tensors


def wrong_shape(tensors):
    name = first(tensors, "A")
    tensors[name] = torch.zeros(tensors[name].shape[0], 99)
    return tensors


def poison(value):
    def change(tensors):
        tensors[first(tensors, "A")][0, 0] = value
        return tensors

    return change


def cast(dtype):
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def keep(path, *parts):
    edit_tensors(path, lambda tensors: {k: v for k, v in tensors.items() if any(part in k for part in parts)})


def drop_a(tensors):
    del tensors[first(tensors, "A")]
    return tensors


def scale(factor):
    return lambda tensors: {name: tensor.double() * factor for name, tensor in tensors.items()}


def rename(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def garbage(size):
    return lambda path: (path / WEIGHTS_FILE).write_bytes(size.to_bytes(8, "little") + b"x" * 64)


def truncate(path):
    data = (path / WEIGHTS_FILE).read_bytes()
    (path / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


def overlap(path):
    data = (path / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    new = json.dumps(header).encode()
    (path / WEIGHTS_FILE).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])


def pickled(path):
    (path / WEIGHTS_FILE).unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04")


def base_of(model_dir, lora_dtype=torch.float32):
    return ServedBase.of(model_dir, ModelConfig.from_dir(model_dir), torch.float32, lora_dtype)
