"""Do adapters that pool keep up, and are they any good?

Speed: vectors of texts of one length under several LoRAs in one batch, against transformers + peft with the same
adapters, in turns, with the largest difference between the two, and of each from fp32 for that text. The wanted ratio
is 2. `--quality search` instead: the search adapter against the base model without it and BM25 on held-out rows, all
searching the same documents (recall, MRR; needs rank-bm25). `--quality tags`: debtags as one classification pass
against the adapter that writes them as JSON with drafts (F1 over the same labels, texts a second, in turns; the wanted
ratio is 20).

    python -m bench.pooling [--batch 32] [--tokens 128] [--rounds 5] [--dtype bf16|fp32]
    python -m bench.pooling --quality search|tags [--adapter DIR] [--data DIR] [--rows 300] [--corpus-rows 300]
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
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

from . import common, options
from .peers.random_adapters import NUM_ADAPTERS, adapter_folders
from .pooling_quality import measure_search, measure_tags
from .tasks import EXAMPLES, BaseModel, demo_adapter

WANTED = 2.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    folders = adapter_folders(base.path)
    threads = torch.get_num_threads()
    config = EngineConfig(model=str(base.path), dtype=dtype, max_num_seqs=batch, max_model_len=tokens + 1,
                          num_threads=threads, max_waiting=batch)  # fmt: skip
    engine, peft = Engine(config, base.path), Peft(base.path, folders, dtype)
    with tempfile.TemporaryDirectory() as folder:
        hashes = [engine.load_adapter(path.name, path).content_hash for path in embedders(folders, Path(folder))]
    rng = random.Random(0)
    rates: dict[str, list[float]] = {"specserve": [], "transformers": []}
    most, worst = 0.0, None
    for number in range(-1, rounds):  # the first warms up
        texts = [(i % NUM_ADAPTERS, [rng.randrange(1000, 40000) for _ in range(tokens)]) for i in range(batch)]
        vectors = {}
        for name in list(rates)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            if name == "specserve":
                named = [(hashes[adapter], ids) for adapter, ids in texts]
                vectors[name] = pooled_values(engine, named, PoolingParams("embed"))
            else:
                vectors[name] = peft.pool(texts)
            if number >= 0:
                rates[name].append(batch / (time.perf_counter() - start))
        apart = np.abs(vectors["specserve"] - vectors["transformers"]).max(axis=1)
        if apart.max() > most:
            most, idx = float(apart.max()), int(apart.argmax())
            worst = texts[idx], {name: found[idx] for name, found in vectors.items()}
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    differences = {"each_other": most}
    if dtype != "fp32" and worst is not None:
        exact = Peft(base.path, folders, "fp32").pool([worst[0]])[0]
        differences |= {f"{name}_from_fp32": float(np.abs(exact - found).max()) for name, found in worst[1].items()}
    return {
        "batch": batch,
        "tokens": tokens,
        "adapters": NUM_ADAPTERS,
        "dtype": dtype,
        "threads": threads,
        "texts_per_s": {name: common.spread(values) for name, values in rates.items()},
        "ratio": common.spread(ratios),
        "wanted": WANTED,
        "largest_difference": differences,
    }


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--quality", type=click.Choice(["search", "tags"]), help="What an adapter is worth, instead of speed.")
@options.at_least(1, "--batch", 32, "Texts at a time.")
@options.at_least(1, "--tokens", 128, "Of each text.")
@options.rounds(5)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@options.at_least(1, "--rows", 300, "Held-out rows, at most.")
@click.option("--adapter", type=options.ADAPTER, help="Of --quality; default: the demo of that name.")
@click.option("--data", type=options.ADAPTER, help="Folder of rows; default: examples/data.")
@options.at_least(0, "--corpus-rows", 300, "Training rows whose documents are searched, too.")
@options.save("pooling")
def main(
    model: str, quality: str | None, batch: int, tokens: int, rounds: int, dtype: str, rows: int, adapter: Path | None,
    data: Path | None, corpus_rows: int, save: bool,
) -> None:  # fmt: skip
    run = common.start("pooling", "torch", "transformers", "peft")
    base = BaseModel.load(model)
    common.print_floor(base.path)
    data = data or EXAMPLES / "data"
    if quality is None:
        figures = measure_speed(base, batch, tokens, rounds, dtype)
        click.echo(f"ratio {figures['ratio']}, largest difference {figures['largest_difference']}")
    elif quality == "search":
        figures = measure_search(base, adapter or demo_adapter("search"), data, rows, corpus_rows)
    else:
        figures = measure_tags(base, adapter or demo_adapter("tags"), data, rows, rounds)
    run.finish({"asked": quality or "speed", "model": base.name, **figures}, save)


if __name__ == "__main__":
    main()
