"""From an adapter's file to where it is served from: values are checked, cast and laid out, layer for layer alike.

Nearly all layers have the same modules with the same ranks. Those are taken together: what torch is asked for does not
grow with the number of layers, which is most of what reading a small adapter costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ..errors import AdapterError
from ..kernels.lora import Empty, LoraPair
from .sizes import layout_bytes
from .slab import Slab, as_in_peft
from .weights_file import StoredTensor, WeightsFile

LayOut = Callable[[LoraPair, Empty], LoraPair]  # a copy of stacked pairs, [N, ...], in memory that the second one gives

_LAYERS = "model.layers."


class StoredPair(NamedTuple):
    """One module's weights in the file, A [R, in] and B [out, R], whose shapes were checked."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    order: tuple[int, ...] = ()  # the rows of B as they are served; none: as they are stored

    @property
    def kind(self) -> tuple[object, ...]:
        return self.a.dtype, self.a.shape, self.b.dtype, self.b.shape, self.order

    def of_rows(self, rows: slice | None, order: tuple[int, ...]) -> StoredPair:
        """The same A with some rows of B, in `order` among themselves."""
        b = self.b
        if rows is not None:
            row_bytes = b.shape[1] * b.dtype.itemsize
            start, end = b.start + rows.start * row_bytes, b.start + rows.stop * row_bytes
            b = StoredTensor(b.dtype, (rows.stop - rows.start, b.shape[1]), start, end)
        return StoredPair(self.a, b, self.scale, order)


def lay_out_pairs(
    adapter: str, file: WeightsFile, pairs: Mapping[str, StoredPair], dtype: torch.dtype, lay_out: LayOut
) -> dict[str, LoraPair]:
    """module -> its weights in `dtype`, all in one slab: those of layers as `lay_out` has them, others as in PEFT.

    Raises `AdapterError` for values that are not finite in `dtype`.
    """
    parts = _alike(pairs)
    sizes = [
        sum(layout_bytes(pairs[names[0]].a.shape, pairs[names[0]].b.shape, dtype.itemsize) for names in part)
        for part in parts
    ]
    slab = Slab(sum(len(part[0]) * size for part, size in zip(parts, sizes, strict=True)))
    found = {}
    for part, size in zip(parts, sizes, strict=True):
        rows = slab.rows(len(part[0]), size)
        for names in part:
            a = _served(adapter, file, [(f"{name} lora_A", pairs[name].a) for name in names], dtype)
            b = _served(adapter, file, [(f"{name} lora_B", pairs[name].b) for name in names], dtype)
            if order := pairs[names[0]].order:
                b = b[:, list(order)]
            is_of_layer = names[0].startswith(_LAYERS)
            there = (lay_out if is_of_layer else as_in_peft)(LoraPair(a, b, 1.0), rows.empty)
            for name, a_of, b_of in zip(names, there.a.unbind(), there.b.unbind(), strict=True):
                found[name] = LoraPair(a_of, b_of, pairs[name].scale)
    return {name: found[name] for name in pairs}


def _alike(pairs: Mapping[str, StoredPair]) -> list[list[list[str]]]:
    """Layers of which all weights are alike, by part: for each of its modules, the names in all those layers."""
    layers: dict[str, list[str]] = {}
    for name in pairs:
        layer = ".".join(name.split(".", 3)[:3]) if name.startswith(_LAYERS) else name
        layers.setdefault(layer, []).append(name)
    parts: dict[tuple[object, ...], list[list[str]]] = {}
    for layer, names in layers.items():
        is_of = tuple((name[len(layer) :], pairs[name].kind) for name in names) if layer != names[0] else (layer,)
        parts.setdefault(is_of, []).append(names)
    return [[list(names) for names in zip(*of_layers, strict=True)] for of_layers in parts.values()]


def _served(
    adapter: str, file: WeightsFile, tensors: list[tuple[str, StoredTensor]], dtype: torch.dtype
) -> torch.Tensor:
    """Tensors of one shape, by what they are, as they are served, [N, ...]; every value is finite."""
    stored = file.together([tensor for _, tensor in tensors])
    cast = stored.to(dtype)
    # A sum is finite only if all is, and takes a tenth of the time; where it is not, it may have overflowed.
    if math.isfinite(float(cast.sum(dtype=torch.float32))) or bool(torch.isfinite(cast).all()):
        return cast
    place, values = next(
        (place, values.double())
        for (place, _), values, served in zip(tensors, stored, cast, strict=True)
        if not bool(torch.isfinite(served).all())
    )
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"adapter {adapter!r}: {place} holds NaN or infinite values")
    short = str(dtype).removeprefix("torch.")
    raise AdapterError(
        f"adapter {adapter!r}: {place} holds {values.abs().max():.3g}, beyond the range of {short} "
        f"({torch.finfo(dtype).max:.3g}), which it would be served in"
    )
