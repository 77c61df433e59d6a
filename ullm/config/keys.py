"""The keys of the API: such as a client can send, and the file that they are read from."""

from __future__ import annotations

from ullm.errors import ConfigError, ResourceUnavailable


def check_key(option_name: str, key: str | None) -> None:
    """Refuse a key that no client could send, without showing it.

    Raises:
        ConfigError: it is one; names the option.
    """
    if key == "":
        raise ConfigError(f"{option_name} is empty; leave it out, or give a key")
    if key is not None and not (key == key.strip() and key.isprintable()):
        raise ConfigError(
            f"{option_name}: the key begins or ends with white space, or has control characters, and no "
            "header can carry that; remove them"
        )


def keys_in(path: str) -> tuple[str, ...]:
    """Return the keys of a file, one per line, without blank lines and comments.

    Raises:
        ResourceUnavailable: it cannot be read, or has none.
        ConfigError: a key that no client could send.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise ResourceUnavailable(f"--api-key-file {path}: {error.strerror or error}") from None
    except ValueError:  # the text of the error would show bytes of keys
        raise ResourceUnavailable(f"--api-key-file {path}: not UTF-8 text; write one key per line") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ResourceUnavailable(
            f"--api-key-file {path}: no keys; write one per line, or leave the option out"
        )
    for key in keys:
        check_key(f"--api-key-file {path}", key)
    return keys
