"""Certificates for connections between hosts, each of an authority of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class LinkFiles:
    """A certificate, its key, and the authority that has signed it."""

    certificate: Path
    key: Path
    authority: Path

    def options(self, authority: Path | None = None) -> dict[str, str]:
        """Return the fields of a configuration.

        Args:
            authority: whose certificates are accepted; default: those of this one's own.
        """
        return {
            "link_certfile": str(self.certificate),
            "link_keyfile": str(self.key),
            "link_ca_file": str(authority or self.authority),
        }

    def flags(self, authority: Path | None = None) -> list[str]:
        """Return the same for a command line."""
        fields = self.options(authority).items()
        return [word for name, path in fields for word in ("--" + name.replace("_", "-"), path)]


def make_link_files(folder: Path, name: str = "127.0.0.1") -> LinkFiles:
    """Make an authority and a certificate for a name or an address, in a folder of their own."""
    folder.mkdir()
    authority = trustme.CA()
    certificate = authority.issue_cert(name)
    certificate.private_key_pem.write_to_path(folder / "key")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate")
    authority.cert_pem.write_to_path(folder / "authority")
    return LinkFiles(folder / "certificate", folder / "key", folder / "authority")
