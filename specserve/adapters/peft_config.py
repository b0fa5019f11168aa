"""An adapter's adapter_config.json: every field that we read is checked, every other one is known, or harmless.

Owns what a configuration may say. What we cannot serve exactly is refused with one sentence that names field and value:
DoRA, trained biases, fully trained modules but a score head, initialisations that change the base, switches of PEFT
versions to come. Which modules it selects is matched by PEFT's rules (`peft_matching.py`), in a process of its own
where regular expressions are involved: one of them can take for ever, and holds the interpreter's lock while it does.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..adapter_files import CONFIG_FILE
from ..errors import AdapterError
from . import peft_matching
from .config_json import decode_object, refuse, shown
from .pooling_config import SCORED, SEQ_CLS, PoolingConfig

# For all regular expressions of an adapter: of a processor, and of the clock on a machine that is too busy for that.
MATCHING_CPU_S, MATCHING_TIMEOUT_S = 1.0, 30.0

_REFUSED_FEATURES = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "trainable_token_indices": "trainable token embeddings",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron parallel layers",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "auto_map": "remote code",
}
# A score head is saved so; PEFT names both of what transformers' classes may call it.
_SCORE_MODULES = frozenset(("score", "classifier"))
# What says nothing of the arithmetic once the adapter is trained; the first two are of PEFT's first versions.
_IGNORED = {"enable_lora", "merge_weights", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
            "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size",
            "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}  # fmt: skip
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EMPTY_INITS = ("gaussian", "eva", "mica")  # A B = 0 before training
_INITS = (*_EMPTY_INITS, "orthogonal")


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and 0 < float(value) < math.inf
    except OverflowError:  # an integer of more than 308 digits
        return False


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and _is_names(value)


def _is_indices(value: Any) -> bool:
    return _is_index(value) or (isinstance(value, list) and all(map(_is_index, value)))


RANK, NUMBER = "a whole number above 0", "a finite number above 0"
# field -> (what its value must be, in words; what a missing one is). Of the fields with None, null says the same.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "use_rslora": (lambda value: isinstance(value, bool), "true or false", None),
    "ensure_weight_tying": (lambda value: isinstance(value, bool), "true or false", None),
    "target_modules": (_is_names, "a list of module names, a regular expression or null", None),
    "exclude_modules": (_is_names, "a list of module names, a regular expression or null", None),
    "layers_to_transform": (_is_indices, "a list of layer numbers, one number or null", None),
    "layers_pattern": (_is_names, "a list of regular expressions, one of them or null", None),
    "init_lora_weights": (lambda value: isinstance(value, bool | str | None), "true, false, a name or null", True),
    "task_type": (lambda value: isinstance(value, str), "a name of PEFT's or null", None),
    "modules_to_save": (_is_list_of_names, "a list of module names or null", None),
    "bias": (lambda value: value == "none", "'none' (trained biases are not served)", "none"),
    "r": (_is_rank, RANK, ...),
    "lora_alpha": (_is_number, NUMBER, ...),
}
_PATTERNS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank_pattern": (_is_rank, RANK),
    "alpha_pattern": (_is_number, NUMBER),
}


@dataclass(frozen=True, slots=True)
class ModuleLora:
    """What a configuration says of one module."""

    rank: int
    alpha: float
    use_rslora: bool

    @property
    def scale(self) -> float:
        """What A B x is multiplied by; of use once the rank is known to be that of the weights."""
        return self.alpha / math.sqrt(self.rank) if self.use_rslora else self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A checked configuration. `raw` holds the fields as PEFT has them, None where they are missing."""

    name: str
    raw: dict[str, Any]

    @property
    def task_type(self) -> str | None:
        """What PEFT's model was for."""
        return self.raw["task_type"]

    @property
    def is_empty_untrained(self) -> bool:
        """Whether a module without weights in the file changes nothing, rather than being random in PEFT."""
        init = self.raw["init_lora_weights"]
        return init is True or (isinstance(init, str) and init.lower() in _EMPTY_INITS)

    def is_tied(self, ties_embedding: bool) -> bool:
        """Whether lm_head and embedding of a model have one LoRA."""
        return bool(self.raw["ensure_weight_tying"]) and ties_embedding

    def resolve(self, modules: list[str], ties_embedding: bool) -> dict[str, ModuleLora | str]:
        """What is said of each module of a base model; a string is the field that leaves the module out."""
        layers, pattern = self.raw["layers_to_transform"], self.raw["layers_pattern"]
        fields = {
            **{key: self.raw[key] for key in ("r", "lora_alpha", "target_modules", "exclude_modules")},
            **{key: self.raw[key] or {} for key in _PATTERNS},
            "layers_to_transform": [layers] if isinstance(layers, int) else layers,
            "layers_pattern": [pattern] if isinstance(pattern, str) and pattern else pattern or [],
            "is_tied": self.is_tied(ties_embedding),
        }
        if peft_matching.is_plain(fields):
            found = peft_matching.resolve(fields, modules)
        else:
            found = _resolve_apart(self.name, fields, modules)
        return {module: self._module(module, said) for module, said in found.items()}

    def _module(self, module: str, said: dict[str, Any]) -> ModuleLora | str:
        if "field" in said:
            return str(said["field"])
        return ModuleLora(said["rank"], said["alpha"], bool(self.raw["use_rslora"]))


def parse_config(name: str, data: bytes, pooling: PoolingConfig | None = None) -> LoraConfig:
    """Check the adapter_config.json of adapter `name`, which may have a `pooling` file. Raises `AdapterError`."""
    raw = decode_config(name, data)
    if raw.get("peft_type") != "LORA":
        hint = "; it looks like MLX's, which has another layout: convert it" if "lora_parameters" in raw else ""
        refuse(name, f"peft_type is {shown(raw.get('peft_type'))}; only 'LORA' is served{hint}")
    for key, feature in _REFUSED_FEATURES.items():
        if raw.get(key):
            refuse(name, f"{key} is set: {feature} is not supported; retrain without it")
    fields = {}
    for key, (check, wanted, default) in _FIELDS.items():
        value = raw.get(key, default)
        if value is ...:
            refuse(name, f"{CONFIG_FILE} has no {key}; {wanted} is expected")
        if not (value is None and default is None) and not check(value):
            refuse(name, f"{key} is {shown(value)}; {wanted} is expected")
        fields[key] = value
    for key, (check, wanted) in _PATTERNS.items():
        value = fields[key] = raw.get(key)
        if value is not None and not isinstance(value, dict):
            refuse(name, f"{key} is {shown(value)}; an object of module patterns or null is expected")
        for pattern, entry in (value or {}).items():
            if not check(entry):
                refuse(name, f"{key}[{shown(pattern)}] is {shown(entry)}; {wanted} is expected")
    _check_init(name, fields["init_lora_weights"])
    _check_layers(name, fields)
    has_score = fields["task_type"] == SEQ_CLS if pooling is None else pooling.adapter_type in SCORED
    if fields["modules_to_save"] and not (has_score and _SCORE_MODULES.issuperset(fields["modules_to_save"])):
        refuse(
            name,
            f"modules_to_save is {shown(fields['modules_to_save'])}: of fully trained modules the score head of a "
            "SEQ_CLS adapter is served, and no other; retrain without it",
        )
    for key in raw.keys() - _FIELDS.keys() - _PATTERNS.keys() - _REFUSED_FEATURES.keys() - _IGNORED - {"peft_type"}:
        # PEFT switches what changes the arithmetic on by true, a list or an object; off is false, null or empty.
        if raw[key] is True or (isinstance(raw[key], list | dict) and raw[key]):
            refuse(
                name,
                f"{shown(key)} is {shown(raw[key])}, which is not known here and may change what the adapter computes; "
                f"remove it from {CONFIG_FILE} if it does not",
            )
    return LoraConfig(name, fields)


def decode_config(name: str, data: bytes) -> dict[str, Any]:
    """The object in adapter_config.json, whatever it says."""
    return decode_object(name, CONFIG_FILE, data, "an object with a peft_type")


def _check_init(name: str, init: Any) -> None:
    if not isinstance(init, str):
        return
    if init.lower().startswith(_REFUSED_INITS):
        refuse(
            name,
            f"init_lora_weights is {shown(init)}, which changes the base weights; convert it to a plain LoRA with "
            "save_pretrained(path_initial_model_for_weight_conversion=...) and init_lora_weights=true",
        )
    if init.lower() not in _INITS:
        refuse(name, f"init_lora_weights is {shown(init)}; true, false, {', '.join(_INITS)} are known here")


def _check_layers(name: str, fields: dict[str, Any]) -> None:
    """PEFT refuses these as well."""
    if isinstance(fields["target_modules"], str):
        for key in ("layers_to_transform", "layers_pattern"):
            if fields[key] is not None:
                refuse(name, f"{key} is set, but target_modules is a string, which selects layers by itself")
    if fields["layers_pattern"] and fields["layers_to_transform"] is None:
        refuse(name, "layers_pattern is set, but layers_to_transform is not; give both or none")


def _resolve_apart(name: str, fields: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """`peft_matching.resolve` in a process that is ended after its time."""
    command = [sys.executable, "-I", "-S", str(peft_matching.__file__)]
    request = json.dumps({"fields": fields, "modules": modules, "cpu_s": MATCHING_CPU_S}).encode()
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=MATCHING_TIMEOUT_S, check=False)
        out, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired:
        raise AdapterError(
            f"adapter {name!r}: this machine is too busy to match its regular expressions: no answer in "
            f"{MATCHING_TIMEOUT_S:g} s; try again",
            status=503,
        ) from None
    except OSError as error:
        refuse(name, f"no process could be started to match its regular expressions: {error.strerror}; try again")
    lines = [json.loads(line) for line in out.splitlines() if line.endswith(b"}")]
    last = lines[-1] if lines else {}
    if "result" in last:
        return last["result"]
    at = next((line for line in reversed(lines) if "field" in line), {"field": "a pattern", "pattern": ""})
    where = f"{at['field']} {shown(at['pattern'])}"
    if "error" in last:
        refuse(name, f"{where} is not a regular expression: {last['error']}")
    if code == -signal.SIGVTALRM:
        limit = f"{MATCHING_CPU_S:g} s"
        refuse(name, f"{where}: matching it against the model's modules takes more than {limit}; simplify it")
    refuse(name, f"{where}: matching it ended its process (code {code}); simplify it")
