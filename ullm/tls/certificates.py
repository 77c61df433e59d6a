"""Certificates and keys in PEM files, read with errors that name the option that is at fault."""

from __future__ import annotations

import ssl

from ullm.errors import ResourceUnavailable


class _EncryptedKey(Exception):
    """The key wants a password; OpenSSL would ask for it on the terminal."""


def load_certificate(context: ssl.SSLContext, certificate: str, key: str, option: str) -> None:
    """Have a context show a certificate.

    Args:
        option: how the options that name the two files begin, as ``--ssl`` of ``--ssl-certfile``.

    Raises:
        ResourceUnavailable: a file that is missing, cannot be read, or does not belong to the other.
    """
    check_readable(f"{option}-certfile", certificate)
    check_readable(f"{option}-keyfile", key)
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except _EncryptedKey:
        raise ResourceUnavailable(
            f"{option}-keyfile {key}: the key is encrypted; give one without a password, readable only by "
            "the server's user"
        ) from None
    except ssl.SSLError as error:
        raise ResourceUnavailable(_cause(error, certificate, key, option)) from None


def load_authorities(context: ssl.SSLContext, authorities: str, option: str) -> None:
    """Have a context accept certificates that one of these authorities has signed.

    Raises:
        ResourceUnavailable: the file cannot be read, or has no certificate.
    """
    check_readable(option, authorities)
    try:
        context.load_verify_locations(authorities)
    except ssl.SSLError:
        raise ResourceUnavailable(f"{option} {authorities}: no certificate in PEM format") from None


def check_readable(option: str, path: str) -> None:
    """Return if a file can be read.

    Raises:
        ResourceUnavailable: it cannot.
    """
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ResourceUnavailable(f"{option} {path}: {error.strerror or error}") from None


def _refuse_password() -> str:
    raise _EncryptedKey


def _cause(error: ssl.SSLError, certificate: str, key: str, option: str) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{option}-keyfile {key} does not belong to {option}-certfile {certificate}"
    try:
        ssl.create_default_context().load_verify_locations(certificate)
    except ssl.SSLError:
        return f"{option}-certfile {certificate}: no certificate in PEM format"
    return (
        f"{option}-keyfile {key}: no private key in PEM format that fits {option}-certfile ({error.reason})"
    )
