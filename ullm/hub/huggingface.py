"""Models from the Hugging Face hub and its cache, without long waits if the hub cannot be reached.

huggingface_hub retries for some 20 seconds per file when a name does not resolve, so one request with a
time limit is made first. Its calls run in a thread of their own: the calling thread stays free to report
progress and can be cancelled, whatever DNS or a proxy does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ullm.errors import ModelError, ModelNotFound, ModelUnsupported, one_line
from ullm.hub.files import (
    HEARTBEAT,
    INDEX,
    SINGLE,
    Progress,
    gguf_part_names,
    is_later_part,
    read_index,
    shards,
)

REACH_TIMEOUT = 4.0
"""Seconds after which a hub that does not answer counts as unreachable."""
METADATA_TIMEOUT = 15.0
_SMALL_FILES = frozenset(
    (
        "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
        "added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model chat_template.jinja "
        f"chat_template.json {INDEX}"
    ).split()
)
T = TypeVar("T")


def cached(repo: str, revision: str | None, *, weights: bool = True) -> Path | None:
    """Return the folder of a hub model if it is complete in the Hugging Face cache; without the network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        if weights:
            shards(folder)
    except ModelError:
        return None
    return folder


def fetch(
    repo: str,
    revision: str | None,
    progress: Progress,
    *,
    refresh: bool = False,
    weights: bool = True,
    code: bool = False,
) -> Path:
    """Return the folder of a hub model, and download the files that are needed if the cache lacks it.

    Args:
        refresh: ask the hub even if the model is in the cache.
        weights: whether to fetch the weights.
        code: whether to fetch the model's Python files.

    Raises:
        ModelNotFound: there is no such repository or revision, it is gated, or the hub cannot be reached.
        ModelUnsupported: the repository has no safetensors files.
    """
    if not refresh and (folder := cached(repo, revision, weights=weights)) is not None:
        return folder
    _check_reachable(repo, revision, progress)
    download = _Download(repo, revision, weights, code)
    return _attempt(repo, revision, download, progress, download.report)


def fetch_gguf(
    repo: str, filename: str, revision: str | None, progress: Progress, *, refresh: bool = False
) -> Path:
    """Return the path of a GGUF file of a hub repository; download it, and the other parts of a split one, if
    the cache lacks one of them.

    Args:
        refresh: ask the hub even if the cache has them.

    Raises:
        ModelNotFound: see `fetch`; or the repository lacks the file, or one of its parts.
        ModelUnsupported: another part than the first is named.
    """
    from huggingface_hub import try_to_load_from_cache

    names = gguf_part_names(filename)
    paths = [try_to_load_from_cache(repo, name, revision=revision) for name in names]
    if not refresh and isinstance(paths[0], str) and all(isinstance(path, str) for path in paths):
        return Path(paths[0])
    _check_reachable(repo, revision, progress)
    download = _Download(repo, revision, True, False, only=names)
    return _attempt(repo, revision, download, progress, download.report) / filename


class _Download:
    """The download of one repository's files in turn; its counters are read by another thread."""

    def __init__(
        self, repo: str, revision: str | None, weights: bool, code: bool, only: list[str] | None = None
    ) -> None:
        self.repo, self.revision = repo, revision
        self._weights, self._code, self._only = weights, code, only
        self._finished = 0
        self._current = 0
        self._total: int | None = None

    def report(self, progress: Progress) -> None:
        """Report the bytes downloaded so far."""
        total = self._total
        done = self._finished + self._current
        progress(f"fetching {self.repo}", done if total is None else min(done, total), total)

    def __call__(self) -> Path:
        from huggingface_hub import HfApi

        info = HfApi().model_info(
            self.repo, revision=self.revision, files_metadata=True, timeout=METADATA_TIMEOUT
        )
        # The cache keeps a branch's snapshot under its commit, so that all files are from one commit.
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        commit = info.sha or self.revision
        small = [name for name in sizes if self._is_small(name)]
        folder = None
        for name in small:
            folder = self._fetch(name, commit, sizes[name])
        large = self._choose_weights(sizes, folder)
        self._finished, self._total = 0, sum(sizes[name] for name in large) or None
        for name in large:
            folder = self._fetch(name, commit, sizes[name])
        if folder is None:
            raise ModelUnsupported(f"{self.repo} has no config.json; it is not a model that ullm can run")
        return folder

    def _is_small(self, name: str) -> bool:
        if self._only is not None:
            return False
        return name in _SMALL_FILES or (self._code and "/" not in name and name.endswith(".py"))

    def _choose_weights(self, sizes: dict[str, int], folder: Path | None) -> list[str]:
        if self._only is not None:
            if missing := [name for name in self._only if name not in sizes]:
                of = f", a part of {self._only[0]}" if len(self._only) > 1 else ""
                raise ModelNotFound(f"{self.repo} has no file {missing[0]}{of}")
            return self._only
        if not self._weights:
            return []
        if INDEX in sizes and folder is not None:
            indexed = set(read_index(folder / INDEX).values())
            if SINGLE in indexed or SINGLE not in sizes:  # as in `uses_index`
                return sorted(indexed)
        if SINGLE in sizes:
            return [SINGLE]
        shard_names = sorted(name for name in sizes if name.endswith(".safetensors") and "/" not in name)
        if not shard_names:
            named = (name for name in sizes if name.endswith(".gguf") and not is_later_part(name))
            ggufs = ", ".join(named)
            hint = f"; name one of its GGUF files, as {self.repo}/FILE: {ggufs}" if ggufs else ""
            raise ModelUnsupported(f"{self.repo} has no .safetensors file{hint}")
        return shard_names

    def _fetch(self, name: str, commit: str | None, size: int) -> Path:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(self.repo, name, revision=commit, tqdm_class=_bar_class(self._advance))
        self._finished, self._current = self._finished + size, 0
        self._point_branch(commit)
        return Path(path).parents[len(PurePosixPath(name).parts) - 1]

    def _point_branch(self, commit: str | None) -> None:
        # A download by commit leaves no ref for the branch, which later look-ups in the cache need.
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        branch = self.revision or "main"
        if commit is None or branch == commit:
            return
        ref = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type="model") / "refs" / branch
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)

    def _advance(self, count: int) -> None:
        self._current = max(self._current, count)


def _bar_class(advance: Callable[[int], None]) -> type:
    """Return a class that huggingface_hub accepts as tqdm's, and that only counts."""

    class Counter:
        def __init__(self, *args: Any, total: int | None = None, initial: int = 0, **kwargs: Any) -> None:
            self.total, self.n = total, initial

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *error: object) -> None:
            return None

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            advance(self.n)

        def _ignore(self, *args: Any, **kwargs: Any) -> None:
            return None

        close = refresh = clear = reset = set_description = set_description_str = _ignore
        set_postfix = set_postfix_str = display = _ignore

    return Counter


def _check_reachable(repo: str, revision: str | None, progress: Progress) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ModelNotFound(
            f"{repo} is not a local folder and not in the Hugging Face cache, and HF_HUB_OFFLINE is set; "
            "unset it, or give a local folder with --model"
        ) from OSError("HF_HUB_OFFLINE is set")

    def request() -> None:
        from huggingface_hub import get_session

        url = f"{constants.ENDPOINT}/{repo}/resolve/{revision or 'main'}/config.json"
        if (status := get_session().head(url, timeout=REACH_TIMEOUT).status_code) >= 500:
            raise OSError(f"HTTP status {status}")

    try:
        _in_thread(request, lambda: progress(f"asking the model hub for {repo}", 0, None), REACH_TIMEOUT + 1)
    except Exception as error:
        raise ModelNotFound(
            f"{repo} is not a local folder and not in the Hugging Face cache, and {constants.ENDPOINT} "
            f"cannot be reached ({one_line(error)}); check the network, or give a folder to --model"
        ) from error


def _attempt(
    repo: str,
    revision: str | None,
    work: Callable[[], T],
    progress: Progress,
    report: Callable[[Progress], None],
) -> T:
    from huggingface_hub import errors

    try:
        return _in_thread(work, lambda: report(progress), None)
    except ModelError:
        raise
    except errors.GatedRepoError as error:
        raise ModelNotFound(f"{repo} is gated: accept its terms on {repo}'s page and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"{repo}: no such folder here and no such public model on the hub; check --model or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"{repo} has no revision {revision!r}; check --revision") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelNotFound(f"{repo} could not be fetched from the hub: {one_line(error)}") from error


def _in_thread(function: Callable[[], T], heartbeat: Callable[[], None], timeout: float | None) -> T:
    """Call ``function`` in a daemon thread and ``heartbeat`` here meanwhile; abandon it on a timeout."""
    outcome: dict[str, Any] = {}

    def body() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=body, name="ullm-hub", daemon=True)
    thread.start()
    waited = 0.0
    while thread.is_alive():
        thread.join(HEARTBEAT)
        waited += HEARTBEAT
        heartbeat()
        if timeout is not None and waited >= timeout and thread.is_alive():
            raise TimeoutError(f"no answer within {timeout:g} s")
    if "error" in outcome:
        raise outcome["error"]
    value: T = outcome["value"]
    return value
