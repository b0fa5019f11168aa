"""The file by which requests find an adapter that they do not name: some of the prompts that it was trained on.

Owns the file's format and its limits, and which text of a conversation is compared. The file is no part of what the
adapter is (adapter_files.py), and untrusted. Invariant: a prompt goes through the same `routed_text` and `excerpt` when
it is written into a profile and when it is a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from .errors import AdapterError, UserError
from .strict_json import decode_json
from .whole_files import replace_file

PROFILE_FILE = "routing.json"
MAX_PROFILE_BYTES = 256 << 10
MAX_PROMPTS = 64
DEFAULT_PROMPTS = 32
HEAD_LEN, TAIL_LEN = 1500, 500  # characters of a text that are compared: instructions stand at its ends
_FORMAT_VERSION = 1
_UNANSWERED = ("system", "developer", "user")


class RoutingProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompts: tuple[str, ...]
    format_version: int = _FORMAT_VERSION


def routed_text(turns: Iterable[tuple[str, str]]) -> str:
    """What is compared of a conversation of (role, text): all that the model was told, nothing that it said."""
    return "\n\n".join(text for role, text in turns if role in _UNANSWERED)


def excerpt(text: str) -> str:
    """What is compared of a text: both its ends, at most `HEAD_LEN + TAIL_LEN` characters."""
    return text if len(text) <= HEAD_LEN + TAIL_LEN else text[:HEAD_LEN] + text[-TAIL_LEN:]


def profile_of(texts: Sequence[str], num_prompts: int = DEFAULT_PROMPTS) -> RoutingProfile:
    """Of all training prompts so many that differ, evenly from first to last, as far as the file may hold them."""
    distinct = list(dict.fromkeys(found for text in texts if (found := excerpt(text).strip())))
    num = min(num_prompts, MAX_PROMPTS, len(distinct))
    chosen = [distinct[idx * len(distinct) // num] for idx in range(num)]
    while chosen and len(_encoded(RoutingProfile(tuple(chosen)))) > MAX_PROFILE_BYTES:
        chosen.pop()
    return RoutingProfile(tuple(chosen))


def write_profile(directory: Path, profile: RoutingProfile) -> None:
    replace_file(directory / PROFILE_FILE, lambda path: path.write_bytes(_encoded(profile)))


def parse_profile(body: bytes, source: str) -> RoutingProfile:
    """The profile in `body`, which is called `source`. Raises `AdapterError`."""
    try:
        profile = msgspec.convert(decode_json(body, source), RoutingProfile)
    except msgspec.ValidationError as error:
        raise AdapterError(f"{source}: {error}") from None
    except UserError as error:  # a request would be at fault
        raise AdapterError(str(error)) from None
    if profile.format_version != _FORMAT_VERSION:
        raise AdapterError(
            f"{source} has format_version {profile.format_version}; {_FORMAT_VERSION} is read: write it anew with "
            "`specserve route profile`"
        )
    if not 1 <= len(profile.prompts) <= MAX_PROMPTS:
        raise AdapterError(f"{source} has {len(profile.prompts)} prompts; 1 to {MAX_PROMPTS} are read")
    return profile


def _encoded(profile: RoutingProfile) -> bytes:
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"
