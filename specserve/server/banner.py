"""What `specserve serve` says when it is ready: what is served and where, and how fast the machine is without drafts.

Owns the lines, few enough to stay on the screen. They are for people; programs ask /ready and /v1/stats.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from ..config import ServeConfig
from ..log_lines import one_line
from ..messages import EngineInfo
from .access.keys import needs_key
from .access.network import is_loopback

MAX_NAMES = 8
_ANYWHERE = ("0.0.0.0", "[::]")


def banner(
    url: str, config: ServeConfig, model: str, info: EngineInfo, adapters: Sequence[str], has_colour: bool = False
) -> str:
    """The lines, for a server at `url` that asks for the keys of `config`."""
    dtype = info.dtype.removeprefix("torch.")
    lines = {"model": f"{model}, {_quantized(config, dtype)} on {info.device}, {info.max_model_len} tokens of context"}
    if info.kernels:
        lines["kernels"] = f"{info.kernels}, exact" if info.is_exact else info.kernels
    rates = ", ".join(f"{rate:.3g} with {_counted(num)}" for num, rate in info.undrafted_rates)
    if rates:
        lines["speed"] = f"tokens/s without drafts: {rates}"
    if config.adapters_dir is not None or adapters:
        more = f" and {len(adapters) - MAX_NAMES} more" if len(adapters) > MAX_NAMES else ""
        lines["adapters"] = (", ".join(adapters[:MAX_NAMES]) or f"none yet in {config.adapters_dir}") + more
    here = _from_here(url)
    lines["page"] = f"{here}/"
    lines["API"] = f"{here}/v1"
    if needs_key(config):
        lines["access"] = "with a key"
    elif not is_loopback(config.host):
        lines["access"] = f"open to everybody who reaches {config.host}; --api-key asks for a key"
    head = f"specserve {__version__} is ready at {url}"
    if has_colour:
        head = f"\x1b[1m{head}\x1b[0m"
    return "\n".join([head, *(_line(name, text, has_colour) for name, text in lines.items())])


def _line(name: str, text: str, has_colour: bool) -> str:
    label = f"{name:<9}"
    return f"  {f'{chr(27)}[36m{label}{chr(27)}[0m' if has_colour else label} {one_line(text)}"


def _quantized(config: ServeConfig, dtype: str) -> str:
    return dtype if config.quantization == "none" else f"{config.quantization} ({dtype})"


def _counted(num: int) -> str:
    return "one sequence" if num == 1 else f"{num} at a time"


def _from_here(url: str) -> str:
    """The same as this machine's browser takes it."""
    for anywhere in _ANYWHERE:
        url = url.replace(f"//{anywhere}:", "//localhost:")
    return url
