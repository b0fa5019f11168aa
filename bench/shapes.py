"""Sizes of published models, and of one that is tiny: what benches without a model's weights take theirs from."""

from __future__ import annotations

from dataclasses import dataclass

from specserve.compute.decoder_weights import GROUPS
from specserve.model.config import ModelConfig
from specserve.model.rope import RopeConfig
from specserve.model.shapes import module_shapes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a Llama."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    def config(self) -> ModelConfig:
        return ModelConfig(
            architecture="LlamaForCausalLM",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            activation="silu",
            tie_word_embeddings=self.tied,
            qkv_bias=False,
            o_bias=False,
            mlp_bias=False,
            qk_norm=(),
            qk_norm_whole=False,
            qk_norm_turned=False,
            norm_offset=0.0,
            pre_norms=("input_layernorm", "post_attention_layernorm"),
            post_norms=(),
            embed_scale=1.0,
            embed_scale_is_rounded=False,
            attention_scale=self.head_dim**-0.5,
            logits_divisor=1.0,
            attention_softcap=None,
            final_softcap=None,
            windows=(None,) * self.num_layers,
            sees_images=False,
            joined=(),
            rotary_dim=self.head_dim,
            turns_neighbours=False,
            rope_keys=("full_attention",) * self.num_layers,
            query_growth=None,
            ropes={"full_attention": RopeConfig("default", 500_000.0, self.head_dim)},
        )

    def fused_linears(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """(in, out of each module) of a layer's fused linears: qkv, o, gate_up, down."""
        shapes = module_shapes(self.config())
        return {
            name: (shapes[modules[0]][0], tuple(shapes[module][1] for module in modules))
            for name, modules in GROUPS.items()
        }


LLAMA8B = ModelShape("llama8b", 4096, 14336, 32, 32, 8, 128, 128256, tied=False)
LLAMA3B = ModelShape("3b", 3072, 8192, 28, 24, 8, 128, 128256, tied=True)
LLAMA1B = ModelShape("1b", 2048, 8192, 16, 32, 8, 64, 128256, tied=True)
SMOLLM2 = ModelShape("smollm2", 576, 1536, 30, 9, 3, 64, 49152, tied=True)
TINY = ModelShape("tiny", 64, 96, 2, 4, 2, 16, 320, tied=True)
