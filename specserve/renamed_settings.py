"""Settings that had another name in the version before: its flag, variable and YAML key hold for one version more.

The old name takes the values that it had. Whoever uses it is told, once, what to write instead; giving both names is an
error, whatever wins among flag, variable and file, as they may contradict each other.
"""

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from .errors import UserError

if TYPE_CHECKING:
    from .settings import Setting

logger = logging.getLogger(__name__)


class OldName(NamedTuple):
    name: str
    values: dict[str, str]  # as they were called -> as they are called


OLD_NAMES = {"kernels": OldName("compile", {"auto": "auto", "on": "native", "off": "torch", "triton": "triton"})}


class Given(NamedTuple):
    """What somebody set, and where."""

    setting: "Setting"
    value: Any
    origin: str  # the setting's flag or variable, or the path of a file

    @property
    def written(self) -> str:
        """As it stands there: "--kernels torch"."""
        if self.origin == self.setting.flag:
            return f"{self.origin} {self.value}"
        if self.origin == self.setting.env:
            return f"{self.origin}={self.value}"
        return f"{self.setting.name}: {self.value} in {self.origin}"

    def under(self, setting: "Setting", value: Any) -> "Given":
        """The same under another setting's name."""
        origins = {self.setting.flag: setting.flag, self.setting.env: setting.env}
        return Given(setting, value, origins.get(self.origin, self.origin))


def old_setting(setting: "Setting") -> "Setting | None":
    """`setting` as it was, under its old name; None if it had none."""
    old = OLD_NAMES.get(setting.name)
    if old is None:
        return None
    choices = tuple(old.values)
    return msgspec.structs.replace(
        setting, name=old.name, description=f"now {setting.flag}", choices=choices, annotation=Literal[choices]
    )


def translated(setting: "Setting", new: Given | None, old: Given | None) -> Given | None:
    """What is given for `setting` under both of its names. Raises `UserError` if that is twice something."""
    if old is None:
        return new
    if new is not None:
        raise UserError(
            f"{setting.name} is given twice, as {new.written} and under its old name as {old.written}; leave that out",
            param=setting.name,
        )
    now = old.under(setting, OLD_NAMES[setting.name].values[old.value])
    logger.warning("%s is now called %s; the next version does not know the old name", old.written, now.written)
    return now
