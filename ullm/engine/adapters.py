"""The LoRA adapters that are served, each as a model of its own name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import trio

from ullm.errors import AdapterUnusable, InvalidParameter, ModelError, ModelUnknown, ResourceUnavailable
from ullm.hub.adapters import find_adapter
from ullm.protocol.messages import Adapter


class Adapters:
    """The adapters that requests may name. What workers hold of them is theirs to know."""

    def __init__(self) -> None:
        self._by_name: dict[str, Adapter] = {}
        self._made = 0

    def __iter__(self) -> Iterator[Adapter]:
        return iter(list(self._by_name.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def find(self, name: str | None) -> Adapter | None:
        """Return the adapter of a request; None for a request without one.

        Raises:
            ModelUnknown: there is none of that name.
        """
        if name is None:
            return None
        if name not in self._by_name:
            raise ModelUnknown(name, ", ".join(map(repr, self._by_name)) or "no adapters")
        return self._by_name[name]

    async def read(self, name: str, path: str) -> Adapter:
        """Find an adapter's files, and give it a number; it is not served yet.

        Raises:
            AdapterUnusable: the files are not there, or cannot be used.
        """
        try:
            folder, digest = await trio.to_thread.run_sync(find_adapter, path)
        except ModelError as error:
            raise AdapterUnusable(f"adapter {name!r}: {error}") from error
        self._made += 1
        return Adapter(name, str(folder), digest, self._made)

    async def read_all(self, paths: dict[str, str]) -> list[Adapter]:
        """Find the files of the adapters that an engine starts with.

        Raises:
            ConfigError: some are not there, or cannot be used.
        """
        try:
            return [await self.read(name, path) for name, path in paths.items()]
        except AdapterUnusable as error:
            raise ResourceUnavailable(f"--lora: {error}") from error

    def replace_all(self, adapters: Iterable[Adapter]) -> None:
        """Serve these adapters only, as an engine in another process says."""
        self._by_name = {adapter.name: adapter for adapter in adapters}

    def put(self, adapter: Adapter) -> None:
        """Serve an adapter, in place of one of the same name; requests in flight keep that one."""
        self._by_name[adapter.name] = adapter

    def remove(self, name: str) -> None:
        """Serve an adapter no more; requests in flight keep it."""
        del self._by_name[name]

    def check_new(self, name: str, model_names: tuple[str, ...], *, replace: bool) -> None:
        """Check that an adapter of this name can be added.

        Raises:
            InvalidParameter: the name is taken.
        """
        if not name or "," in name or "=" in name:
            raise InvalidParameter(
                f"lora_name {name!r} must have a character, and no comma and no '='", "lora_name"
            )
        if name in model_names:
            raise InvalidParameter(f"lora_name {name!r} is a name of the model itself", "lora_name")
        if name in self._by_name and not replace:
            raise InvalidParameter(
                f"lora_name {name!r} is loaded already; unload it first, or load it with load_inplace",
                "lora_name",
            )
