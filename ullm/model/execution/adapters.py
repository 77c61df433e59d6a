"""The LoRA adapters that a rank has loaded, and the rows of a step that each applies to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ullm.errors import ModelError, ModelFileBroken, ModelUnsupported, OutOfMemory, one_line
from ullm.machine import available_memory
from ullm.model.attention.batch import AdapterRows, CausalModel
from ullm.model.execution.sequences import StepPlan
from ullm.model.layers.lora import AdaptableModel, LoraHost
from ullm.model.loading.adapters import REMEDY, read_lora
from ullm.model.memory.kv_pool import mib
from ullm.protocol.messages import Adapter


class AdapterTable:
    """Loads adapters when they are asked for, or when the first sequence needs them.

    So a worker that took another one's place, or woke from a sleep, has every adapter that is needed, without
    having been told of them. An adapter that cannot be loaded fails the sequences that need it, nothing else.

    Args:
        model: the model with its weights.
        device: where it is.
        is_elsewhere: whether another pipeline stage has a layer.
    """

    def __init__(
        self, model: CausalModel, device: torch.device, is_elsewhere: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._model, self._device, self._is_elsewhere = model, device, is_elsewhere
        self._loaded: dict[int, int] = {}
        self._broken: dict[int, str] = {}
        self._users: dict[int, int] = {}
        self._leaving: set[int] = set()

    def load(self, adapter: Adapter) -> str:
        """Load an adapter, unless it is; return why that is not possible, or an empty text."""
        number = adapter.number
        if number in self._broken:
            return self._broken[number]
        if number not in self._loaded:
            if not isinstance(self._model, AdaptableModel):
                return f"{type(self._model).__name__} takes no adapters; {REMEDY}"
            try:
                host = self._model.lora()
            except ModelUnsupported as error:
                return f"{error}; {REMEDY}"
            try:
                self._loaded[number] = load_adapter(adapter, host, self._device, self._is_elsewhere)
            except (ModelError, torch.OutOfMemoryError, MemoryError) as error:
                host.detach(number)
                self._broken[number] = one_line(error)
                return self._broken[number]
        return ""

    def drop(self, number: int) -> None:
        """Drop an adapter, as soon as no sequence uses it."""
        self._leaving.add(number)
        self._broken.pop(number, None)
        self._sweep(number)

    def use(self, adapter: Adapter) -> str:
        """Note that a sequence uses an adapter; as `load`."""
        self._users[adapter.number] = self._users.get(adapter.number, 0) + 1
        return self.load(adapter)

    def leave(self, adapter: Adapter) -> None:
        """Note that a sequence no longer uses an adapter."""
        self._users[adapter.number] -= 1
        if not self._users[adapter.number]:
            del self._users[adapter.number]
            self._sweep(adapter.number)

    def clear(self) -> None:
        """Drop all adapters."""
        for number in list(self._loaded):
            self._detach(number)

    def _detach(self, number: int) -> None:
        if self._loaded.pop(number, None) is not None and isinstance(self._model, AdaptableModel):
            self._model.lora().detach(number)

    def _sweep(self, number: int) -> None:
        if number in self._leaving and number not in self._users:
            self._detach(number)

    def rows(self, plan: StepPlan) -> tuple[AdapterRows, ...]:
        """Return the rows of a step that each adapter applies to; none for an ordinary step."""
        runs: dict[int, list[tuple[int, int]]] = {}
        first = 0
        for (_, state), end in zip(plan.sequences, plan.ends, strict=True):
            adapter = state.new.adapter
            if adapter is not None and adapter.number in self._loaded:
                own = runs.setdefault(adapter.number, [])
                if own and own[-1][1] == first:
                    own[-1] = (own[-1][0], end)
                else:
                    own.append((first, end))
            first = end
        return tuple((number, self._rows(own)) for number, own in runs.items())

    def _rows(self, runs: list[tuple[int, int]]) -> torch.Tensor | slice:
        if len(runs) == 1:
            return slice(*runs[0])
        return torch.cat([torch.arange(*run) for run in runs]).to(self._device)


def load_adapter(
    adapter: Adapter, host: LoraHost, device: torch.device, is_elsewhere: Callable[[str], bool]
) -> int:
    """Load an adapter into a model; return the bytes that it takes on this rank.

    Raises:
        ModelError: one line that names the adapter, and the file and the tensor that cannot be used.
    """
    folder = Path(adapter.path)
    used = 0
    for part in read_lora(folder, adapter.digest):
        place = host.places.get(part.name)
        if place is None:
            if is_elsewhere(f"{part.name}.weight"):
                continue
            raise ModelUnsupported(
                f"{folder}: the adapter is for {part.name!r}, which is no linear layer of this model that "
                f"adapters can be applied to; {REMEDY}, if it is for this model"
            )
        shape = (part.b.shape[0], part.a.shape[1])
        if shape != (place.out_features, place.in_features):
            raise ModelFileBroken(
                folder,
                f"the adapter of {part.name!r} is for a layer of shape {shape}, the model's is of shape "
                f"{(place.out_features, place.in_features)}; it is for another model",
            )
        need = host.nbytes(part.a, part.b)
        if device.type == "cpu" and need > available_memory():
            raise OutOfMemory(f"{folder}: the adapter needs {mib(need)} more memory than there is")
        used += host.attach(adapter.number, part.name, part.a, part.b, part.scale)
    return used
