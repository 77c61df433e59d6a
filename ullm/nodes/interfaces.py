"""The interface by which ranks on several hosts reach each other."""

from __future__ import annotations

from ullm.errors import ResourceUnavailable
from ullm.system.interfaces import interface_of


def interface_for_ranks(address: str) -> str:
    """Return the name of the interface that has an IPv4 address.

    Raises:
        ConfigError: none of this host has it, or this is not Linux.
    """
    name = interface_of(address)
    if name is None:
        raise ResourceUnavailable(
            f"{address} is the IPv4 address of no interface of this host; ranks on several hosts need one, "
            "and Linux"
        )
    return name
