"""specserve serves many task LoRAs of one base model and speeds them up by exact speculation.

The names of the Python API are found on first use: `import specserve` itself imports nothing.
"""

from typing import TYPE_CHECKING

from .lazy_names import lazy_names

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm.llm",
    "AsyncLLM": "llm.async_llm",
    "SamplingParams": "llm.params",
    "StructuredOutputsParams": "llm.params",
    "LoRARequest": "llm.params",
    "RequestOutput": "llm.outputs",
    "CompletionOutput": "llm.outputs",
    "Logprob": "llm.outputs",
    "PoolingOutput": "llm.pooled",
    "UserError": "errors",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "LoRARequest",
    "Logprob",
    "PoolingOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "UserError",
    "__version__",
]

if TYPE_CHECKING:
    from .errors import UserError
    from .llm.async_llm import AsyncLLM
    from .llm.llm import LLM
    from .llm.outputs import CompletionOutput, Logprob, RequestOutput
    from .llm.params import LoRARequest, SamplingParams, StructuredOutputsParams
    from .llm.pooled import PoolingOutput

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
