"""The names of children: one register for each whole tree, so that a child is found without passing it on."""

from __future__ import annotations

from contextvars import Context, ContextVar, copy_context
from typing import Any

from ullm.supervision.errors import NameNotFound, NameTaken


class Names:
    """The named children of one tree that are up, with their values."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[object, Any]] = {}

    def register(self, name: str, holder: object, value: Any) -> None:
        """Give a name to a child that is ready.

        Raises:
            NameTaken: another one has it.
        """
        if name in self._values:
            raise NameTaken(name)
        self._values[name] = (holder, value)

    def release(self, name: str, holder: object) -> None:
        """Take the name from a child that has ended, if it had it."""
        if self._values.get(name, (None,))[0] is holder:
            del self._values[name]

    def find(self, name: str) -> Any:
        """Return the value of the child of this name.

        Raises:
            NameNotFound: none is up.
        """
        try:
            return self._values[name][1]
        except KeyError:
            raise NameNotFound(name) from None


_names: ContextVar[Names | None] = ContextVar("names", default=None)


def tree_names() -> Names:
    """Return the register of the tree that the current task belongs to; a new one outside of any."""
    return _names.get() or Names()


def context_with(names: Names) -> Context:
    """Return a copy of the current context in which ``names`` is the register."""
    context = copy_context()
    context.run(_names.set, names)
    return context


def whereis(name: str) -> Any:
    """Return what the child of this name in the caller's tree passed to ``task_status.started``.

    For tasks within a tree; outside, such as in the body of `open_supervisor`, use `Supervisor.whereis`.

    Raises:
        NameNotFound: no child of this name is up.
    """
    return tree_names().find(name)
