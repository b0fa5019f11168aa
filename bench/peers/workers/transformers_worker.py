"""transformers' generate, with peft's mixed-adapter batches where there are adapters; left padding, default cache.

The model without adapters is a plain one: peft's wrappers cost time even for rows that use no adapter.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from worker_io import Measure, Recorder, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Clock(StoppingCriteria):
    """Notes when each step's tokens came, up to each sequence's end; never stops anything."""

    def __init__(self, recorder: Recorder, num_requests: int, eos: set[int]):
        self.recorder, self.num_requests, self.eos = recorder, num_requests, eos
        self.ended: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = [(idx, token) for idx, token in enumerate(input_ids[:, -1].tolist()) if idx not in self.ended]
        self.recorder.add_step((idx, [token]) for idx, token in new)
        self.ended |= {idx for idx, token in new if token in self.eos}
        return torch.zeros(self.num_requests, dtype=torch.bool)


def load(settings: dict[str, Any]) -> tuple[dict[str, Any], Measure]:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(settings["num_threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model_dir"])
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model_dir"], dtype=DTYPES[settings["dtype"]])
    for i, path in enumerate(settings["adapters"]):
        if i == 0:
            # Adapters in the model's dtype: peft's default, fp32, would cast at every layer.
            model = PeftModel.from_pretrained(model, path, adapter_name="lora-0", autocast_adapter_dtype=False)
        else:
            model.load_adapter(path, adapter_name=f"lora-{i}", autocast_adapter_dtype=False)
    model.eval()
    ends = model.generation_config.eos_token_id
    eos = set(ends if isinstance(ends, list) else [ends])
    model.generation_config.eos_token_id = None  # nothing stops before num_tokens unless a request asks for it
    model.generation_config.pad_token_id = tokenizer.pad_token_id or 0

    @torch.inference_mode()
    def measure(request: dict[str, Any]) -> dict[str, Any]:
        prompts = request["prompts"]
        recorder = Recorder(len(prompts), request["ignore_eos"])
        longest = max(map(len, prompts))
        pad = model.generation_config.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        extra = {}
        if settings["adapters"]:
            names = ["__base__" if adapter is None else f"lora-{adapter}" for adapter in request["adapters"]]
            extra["adapter_names"] = names
        if not request["ignore_eos"]:
            extra["eos_token_id"] = sorted(eos)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=request["num_tokens"],
            do_sample=False,
            stopping_criteria=StoppingCriteriaList(
                [Clock(recorder, len(prompts), set() if request["ignore_eos"] else eos)]
            ),
            **extra,
        )
        tokenizer.batch_decode(output[:, longest:])  # the other peers give text, too
        return recorder.result()

    info = {
        "version": transformers.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__,
        "dtype": settings["dtype"],
        "threads": torch.get_num_threads(),
    }
    return info, measure


if __name__ == "__main__":
    serve(load)
