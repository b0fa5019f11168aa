"""What `bench.pooling` measures of speed: vectors of texts of one length, in turns with a peer's.

All pool the mean of the last layer's hidden states, of length 1. transformers + peft runs in this process with its
mixed-adapter batches; vLLM's CPU build in an environment and a process of its own (bench.peers), which stands still
while it is not asked.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch

from specserve.adapter_files import POOLING_FILE
from specserve.adapters.pooling_config import PoolingConfig
from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.pooling_messages import PoolingParams
from specserve.training.pooling.served import pooled_values

from . import common
from .peers import vllm_cpu
from .peers.random_adapters import NUM_ADAPTERS, RANK, adapter_folders
from .peers.worker import Worker
from .tasks import BaseModel

WANTED = {"transformers": 2.0, "vllm": 1.0}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KV_CACHE_GIB = 1
START_TIMEOUT_S = 1200.0
Text = tuple[int | None, list[int]]  # which adapter, token ids


class Ours:
    """The engine with the adapters of `folders` as ones that embed."""

    def __init__(self, base: BaseModel, folders: Sequence[str], dtype: str, batch: int, tokens: int, threads: int):
        config = EngineConfig(model=str(base.path), dtype=dtype, max_num_seqs=batch, max_model_len=tokens + 1,
                              num_threads=threads, max_waiting=batch)  # fmt: skip
        self._engine = Engine(config, base.path)
        with tempfile.TemporaryDirectory() as folder:
            copies = embedders(folders, Path(folder))
            self._hashes = [self._engine.load_adapter(path.name, path).content_hash for path in copies]

    def pool(self, texts: Sequence[Text]) -> np.ndarray:
        named = [(None if adapter is None else self._hashes[adapter], ids) for adapter, ids in texts]
        return pooled_values(self._engine, named, PoolingParams("embed", pooling="mean", normalize=True))


class Vllm:
    """vLLM's pooling runner, with the adapters of `folders` or, if there are none, without LoRA."""

    def __init__(self, base: BaseModel, python: str, folders: Sequence[str], dtype: str, tokens: int):
        settings = {
            "model_dir": str(base.path),
            "dtype": dtype,
            "quantization": "none",
            "adapters": list(folders),
            "rank": RANK,
            "max_model_len": tokens + 1,
        }
        env = vllm_cpu.environment(python, KV_CACHE_GIB)
        env["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = "1800"  # on busy cores its 300 have ended a step with LoRAs
        self._worker = Worker("vllm_pooling", python, settings, env, START_TIMEOUT_S)
        self.info, self.close = self._worker.info, self._worker.close

    def pool(self, texts: Sequence[Text]) -> np.ndarray:
        asked = {"prompts": [ids for _, ids in texts], "adapters": [adapter for adapter, _ in texts]}
        return np.array(self._worker.measure(asked)["vectors"], dtype=np.float32)


class Peft:
    """transformers with peft's batches of mixed adapters; vectors are means, of length 1."""

    def __init__(self, model_dir: Path, adapters: Sequence[str], dtype: str):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPES[dtype])
        model: Any = PeftModel.from_pretrained(base, adapters[0], adapter_name="0", autocast_adapter_dtype=False)
        for idx, path in enumerate(adapters[1:], 1):
            model.load_adapter(path, adapter_name=str(idx), autocast_adapter_dtype=False)
        self._model = model.eval()

    @torch.inference_mode()
    def pool(self, texts: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
        """Texts of one length, so that nothing is padded."""
        names = [str(adapter) for adapter, _ in texts]
        ids = torch.tensor([list(ids) for _, ids in texts])
        out = self._model(input_ids=ids, adapter_names=names, output_hidden_states=True, logits_to_keep=1)
        return torch.nn.functional.normalize(out.hidden_states[-1].float().mean(dim=1), dim=-1).numpy()


def embedders(folders: Sequence[str], out: Path) -> list[Path]:
    """The same adapters as ones that embed."""
    content = msgspec.json.encode(PoolingConfig(adapter_type="embed", pooling="mean"))
    made = []
    for folder in map(Path, folders):
        made.append(Path(shutil.copytree(folder, out / folder.name)))
        (made[-1] / POOLING_FILE).write_bytes(content)
    return made


def measure_speed(base: BaseModel, batch: int, tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Against transformers + peft, and how far the vectors of both are from fp32's."""
    folders = adapter_folders(base.path)
    threads = torch.get_num_threads()
    ours, peft = Ours(base, folders, dtype, batch, tokens, threads), Peft(base.path, folders, dtype)
    most, worst = 0.0, None

    def compare(texts: Sequence[Text], vectors: dict[str, np.ndarray]) -> None:
        nonlocal most, worst
        apart = np.abs(vectors["specserve"] - vectors["transformers"]).max(axis=1)
        if apart.max() > most:
            most, idx = float(apart.max()), int(apart.argmax())
            worst = texts[idx], {name: found[idx] for name, found in vectors.items()}

    pools = {"specserve": ours.pool, "transformers": peft.pool}
    figures = _in_turns(pools, _mixed(batch, tokens), rounds, WANTED["transformers"], compare)
    differences = {"each_other": most}
    if dtype != "fp32" and worst is not None:
        exact = Peft(base.path, folders, "fp32").pool([worst[0]])[0]
        differences |= {f"{name}_from_fp32": float(np.abs(exact - found).max()) for name, found in worst[1].items()}
    return {**_settings(batch, tokens, dtype, threads), **figures, "largest_difference": differences}


def measure_vllm(base: BaseModel, python: str, batch: int, tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Against vLLM without LoRA, and with mixed LoRAs if its pooling runner takes them; both on all cores."""
    folders = adapter_folders(base.path)
    threads = common.num_cores()
    ours = Ours(base, folders, dtype, batch, tokens, threads)
    cases: dict[str, Any] = {}
    for name, given, texts in (("no_lora", [], _plain), ("mixed_lora", folders, _mixed)):
        with contextlib.ExitStack() as stack:
            vllm = Vllm(base, python, given, dtype, tokens)
            stack.callback(vllm.close)
            apart: list[float] = []

            def compare(_: Sequence[Text], vectors: dict[str, np.ndarray], apart: list[float] = apart) -> None:
                apart.append(float(np.abs(vectors["specserve"] - vectors["vllm"]).max()))

            pools = {"specserve": ours.pool, "vllm": vllm.pool}
            figures = _in_turns(pools, texts(batch, tokens), rounds, WANTED["vllm"], compare)
            cases[name] = {**figures, "largest_difference": max(apart), "vllm": vllm.info}
            click.echo(f"{name}: ratio {figures['ratio']}, largest difference {max(apart)}")
    return {**_settings(batch, tokens, dtype, threads), **cases}


def _mixed(batch: int, tokens: int) -> Callable[[random.Random], list[Text]]:
    return lambda rng: [(i % NUM_ADAPTERS, _words(rng, tokens)) for i in range(batch)]


def _plain(batch: int, tokens: int) -> Callable[[random.Random], list[Text]]:
    return lambda rng: [(None, _words(rng, tokens)) for _ in range(batch)]


def _words(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(1000, 40000) for _ in range(tokens)]


def _in_turns(
    pools: dict[str, Callable[[Sequence[Text]], np.ndarray]],
    texts_of: Callable[[random.Random], list[Text]],
    rounds: int,
    wanted: float,
    compare: Callable[[Sequence[Text], dict[str, np.ndarray]], None],
) -> dict[str, Any]:
    """Texts a second of two, each the first in every second round; the ratio is the first's to the second's."""
    rng = random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in pools}
    for number in range(-1, rounds):  # the first warms up
        texts = texts_of(rng)
        vectors = {}
        for name in list(pools)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            vectors[name] = pools[name](texts)
            if number >= 0:
                rates[name].append(len(texts) / (time.perf_counter() - start))
        compare(texts, vectors)
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    return {
        "texts_per_s": {name: common.spread(values) for name, values in rates.items()},
        "ratio": common.spread(ratios),
        "wanted": wanted,
    }


def _settings(batch: int, tokens: int, dtype: str, threads: int) -> dict[str, Any]:
    return {"batch": batch, "tokens": tokens, "adapters": NUM_ADAPTERS, "dtype": dtype, "threads": threads}
