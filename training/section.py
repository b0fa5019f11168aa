"""What every section of a run file is: a struct that cannot be changed and knows all of its fields."""

from __future__ import annotations

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass
