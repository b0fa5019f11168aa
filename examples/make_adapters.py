"""Write PEFT LoRA adapters with random weights, to try many adapters at once before any is trained.

Each differs a little from the base model and from the others: enough to see in the output that requests with different
adapters share a batch, too little to make it nonsense. Equal arguments give equal files.

    python examples/make_adapters.py --out examples/adapters --num 8 --rank 16
"""

from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from specserve.model.shapes import LINEARS
from specserve.model.store import DEFAULT_MODEL, resolve_model


@click.command(help=__doc__.partition("\n")[0])
@click.option("--model", default="", help="Base model: directory or hub id; default: specserve's default model.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the folders go.")
@click.option("--num", type=click.IntRange(1), default=8, show_default=True, help="How many adapters.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True)
@click.option("--modules", default=",".join(LINEARS), show_default=True, help="Linear layers that get LoRA.")
@click.option("--std", type=float, default=0.02, show_default=True, help="Standard deviation of B.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(model: str, out: Path, num: int, rank: int, modules: str, std: float, seed: int) -> None:
    base = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=torch.bfloat16)
    base.name_or_path = model or f"HuggingFaceTB/{DEFAULT_MODEL.name}"  # PEFT writes it down
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=modules.split(","))
    peft_model = get_peft_model(base, config)
    matrices = {name: weight for name, weight in peft_model.named_parameters() if "lora_" in name}
    for i in range(num):
        generator = torch.Generator().manual_seed(seed + i)
        for name, weight in sorted(matrices.items()):
            # PEFT starts with B = 0, which changes nothing; A keeps its usual scale of 1 / sqrt(columns).
            scale = std if "lora_B" in name else weight.shape[1] ** -0.5
            weight.data.copy_(scale * torch.randn(weight.shape, generator=generator))
        folder = out / f"random-{i}"
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty model card
        click.echo(folder)


if __name__ == "__main__":
    main()
