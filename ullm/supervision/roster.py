"""The children of one supervisor: which there are, which one is meant, which belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ullm.supervision.children import Child
from ullm.supervision.errors import ChildConflict, ChildNotFound, InvalidSpec, TooManyChildren
from ullm.supervision.policy import AutoShutdown, Strategy, affected
from ullm.supervision.spec import ChildSpec, ChildStatus, Flags


class Roster:
    """The records of a supervisor's children, in order of start.

    Args:
        name: name of the supervisor, for error messages.
        flags: how it treats its children.
    """

    def __init__(self, name: str, flags: Flags) -> None:
        self.name = name
        self.flags = flags
        self._children: dict[str, Child] = {}
        self._serial = 0

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children.values())

    def __len__(self) -> int:
        return len(self._children)

    @property
    def dynamic(self) -> bool:
        """Whether children come and go: ids are made unique, and a child that ended is forgotten."""
        return self.flags.strategy is Strategy.DYNAMIC

    def check(self, spec: ChildSpec) -> None:
        """Check a child against the supervisor's options.

        Raises:
            InvalidSpec: it does not fit them.
        """
        if spec.significant and self.flags.auto_shutdown is AutoShutdown.NEVER:
            raise InvalidSpec(
                f"child {spec.child_id!r} is significant, but {self.name!r} has auto_shutdown never"
            )

    def check_all(self, specs: Iterable[ChildSpec]) -> None:
        """Check children that are started together.

        Raises:
            InvalidSpec: one of them does not fit the options, or two have the same id.
        """
        specs = tuple(specs)
        for child_id, number in Counter(spec.child_id for spec in specs).items():
            if number > 1 and not self.dynamic:
                raise InvalidSpec(f"supervisor {self.name!r} has {number} children called {child_id!r}")
        if len(specs) > self.flags.max_children:
            most = f"max_children is {self.flags.max_children:g}"
            raise InvalidSpec(f"supervisor {self.name!r} begins with {len(specs)} children, but {most}")
        for spec in specs:
            self.check(spec)

    def add(self, spec: ChildSpec) -> Child:
        """Add a child, which is not started yet.

        Raises:
            ChildConflict: there is a child of this id.
            TooManyChildren: there are as many as there may be.
        """
        if not self.dynamic and spec.child_id in self._children:
            raise ChildConflict(self.name, spec.child_id, self._children[spec.child_id].status)
        if len(self) >= self.flags.max_children:
            raise TooManyChildren(self.name, self.flags.max_children)
        if self.dynamic:
            self._serial += 1
            spec = replace(spec, child_id=f"{spec.child_id}#{self._serial}")
        child = self._children[spec.child_id] = Child(spec)
        return child

    def get(self, child_id: str) -> Child | None:
        """Return the child of this id, if there is one."""
        return self._children.get(child_id)

    def find(self, child_id: str) -> Child:
        """Return the child of this id.

        Raises:
            ChildNotFound: there is none.
        """
        try:
            return self._children[child_id]
        except KeyError:
            raise ChildNotFound(self.name, child_id) from None

    def find_stopped(self, child_id: str) -> Child:
        """Return the child of this id, which does not run.

        Raises:
            ChildNotFound: there is none.
            ChildConflict: it runs, or is being restarted.
        """
        child = self.find(child_id)
        if child.status is not ChildStatus.STOPPED:
            raise ChildConflict(self.name, child_id, child.status)
        return child

    def forget(self, child: Child) -> None:
        """Remove a child."""
        self._children.pop(child.spec.child_id, None)

    def forget_if_gone_for_good(self, child: Child) -> None:
        """Remove a child that has ended, if nothing will start it again."""
        if child.temporary or self.dynamic:
            self.forget(child)

    def affected_by(self, child: Child) -> list[Child]:
        """Return the children to stop and start again with a failed one, itself included."""
        ids = affected(self.flags.strategy, self._children, child.spec.child_id)
        return [self._children[child_id] for child_id in ids]

    def significant_active(self) -> bool:
        """Return whether a significant child runs or is about to be restarted."""
        return any(child.spec.significant and child.status is not ChildStatus.STOPPED for child in self)
