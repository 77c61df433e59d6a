"""The documentation is true where that can be checked: made parts, links, options, series, manifests."""

from __future__ import annotations

import ast
import configparser
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.docs import command_line, errors, http_api, metrics
from tests.docs.pages import DOCS, ROOT, made_pages, pages
from ullm.cli.flags import engine_options, sampling_options, server_options
from ullm.protocol import exit_codes

PACKAGE = ROOT / "ullm"
PAGES = pages()
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
MIGRATION = DOCS / "how-to" / "migrating-from-vllm.md"
"""The page with the other program's options."""
FOREIGN_OPTIONS = frozenset(
    {"--check", "--help", "--json", "--no-install-recommends", "--unix-socket", "--index-url", "--quiet"}
    | {"--no-cache-dir", "--extra-index-url", "--create-home", "--uid", "--now", "--version"}
    | {
        "--memory",
        "--cpus",
        "--build-arg",
        "--no-",
        "--use-threading",
        "--timeout-graceful-shutdown",
        "--preload",
    }
)
"""Options of other programs, and those that every command has."""
RUN_BY = {
    "README.md": "tests/e2e/test_readme.py",
    "docs/explanation/supervision.md": "tests/supervision/test_docs.py",
    "docs/how-to/anthropic.md": "tests/e2e/test_docs_programs.py",
    "docs/how-to/embedding.md": "tests/e2e/test_docs_programs.py",
    "docs/how-to/embeddings.md": "tests/e2e/test_docs_programs.py",
    "docs/how-to/fault-injection.md": "tests/testing/test_plugin.py",
    "docs/how-to/lora.md": "the weights of Qwen3-0.6B and an adapter cannot be had in tests",
    "docs/how-to/property-tests.md": "tests/testing/test_plugin.py",
    "docs/how-to/stored-answers.md": "tests/e2e/test_docs_programs.py",
    "docs/how-to/structured-outputs.md": "tests/e2e/test_docs_programs.py",
    "docs/how-to/supervising.md": "tests/e2e/test_docs_programs.py",
    "docs/how-to/tools.md": "tests/e2e/test_docs_programs.py",
    "docs/tutorial/first-server.md": "tests/e2e/test_docs_tutorial.py",
}
"""What runs the Python programs of a page, or why nothing does."""
READERS: dict[str, Callable[[str], object]] = {
    "python": lambda text: compile(text, "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT),
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    "ini": lambda text: configparser.ConfigParser(strict=False, interpolation=None).read_string(text),
}
"""What reads a block of a language."""
BENCHMARK = re.compile(r"tests\.benchmarks \w+[^\n]*(?:\\\n[^\n]*)*")


def name(page: Path) -> str:
    """Return a page's path below the repository, for ids of tests."""
    return page.relative_to(ROOT).as_posix()


def slugs(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(made_pages()), ids=name)
def test_made_parts_are_up_to_date(page: Path) -> None:
    assert page.read_text("utf-8") == made_pages()[page], "run: python -m tests.docs"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in (link or image for link, image in LINK.findall(FENCE.sub("", page.read_text("utf-8")))):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in slugs(linked.read_text("utf-8"))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != DOCS], ids=name)
def test_every_page_is_in_the_index(page: Path) -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    assert page.parent == ROOT or f"({page.relative_to(DOCS).as_posix()})" in index


@pytest.mark.parametrize("page", [page for page in PAGES if page != MIGRATION], ids=name)
def test_options_exist(page: Path) -> None:
    text = BENCHMARK.sub("", page.read_text("utf-8"))
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", text))
    for _, block in FENCE.findall(text):
        for command in re.findall(r"\bullm (?:serve|chat|generate|bench|chaos|pull|doctor)[^\n]*", block):
            named |= set(re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", command))
    assert named - known_options() - FOREIGN_OPTIONS == set()


def known_options() -> set[str]:
    """Return every option of every command, with other names and negative forms."""
    found: set[str] = set()
    for _, command in command_line.all_commands():
        for argument in command.assemble_argument_collection():
            found |= {*argument.names, *argument.negatives}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_what_they_say(page: Path) -> None:
    wrong = []
    for language, block in FENCE.findall(page.read_text("utf-8")):
        try:
            READERS.get(language, lambda text: None)(block)
        except (SyntaxError, ValueError, yaml.YAMLError, configparser.Error) as error:
            wrong.append((language, block[:60], str(error)))
    assert wrong == []


def test_programs_are_run() -> None:
    """By one of these, or it is said why not."""
    pages = {name(page) for page in PAGES if "```python\n" in page.read_text("utf-8")}
    assert pages == RUN_BY.keys()
    for page, test in RUN_BY.items():
        file = ROOT / test
        assert " " in test or page.rsplit("/", 1)[-1].removesuffix(".md") in file.read_text("utf-8"), page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_environment_variables_exist(page: Path) -> None:
    options = [*engine_options(), *server_options(), *sampling_options({})]
    named = {f"ULLM_{option.name.upper()}" for option in options}
    known = named | {"ULLM_CACHE", "ULLM_CONFIG", "ULLM_NAME", "ULLM_ENGINE_KEY"}
    assert set(re.findall(r"\bULLM_[A-Z_]*[A-Z]\b", page.read_text("utf-8"))) - known == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_series_exist(page: Path) -> None:
    known = metrics.series_names()
    fixtures = {"ullm_engine", "ullm_clock", "ullm_server", "ullm_faults", "ullm_no_leaks"}
    fixtures |= {"ullm_scripted_model", "ullm_tiny_model", "ullm_module_server", "ullm_session_server"}
    named = set(re.findall(r"(?<![\w.])ullm_[a-z0-9_]*[a-z0-9]", page.read_text("utf-8")))
    bare = {re.sub("_(bucket|sum|count)$", "", each) for each in named}
    assert {
        each for each in named | bare if each in named - known and each in bare - known
    } - fixtures == set()


def test_every_field_is_explained() -> None:
    missing = [
        f"{struct.__name__}.{field}"
        for struct in (*http_api.OTHER_SCHEMAS.values(), *http_api.ANSWERS)
        for field, _, meaning in http_api.fields(struct)
        if not meaning
    ]
    assert missing == []


def test_notes_are_about_fields_that_exist() -> None:
    structs = (*http_api.OTHER_SCHEMAS.values(), *http_api.ANSWERS)
    fields = {(struct.__name__, field) for struct in structs for field in struct.__struct_fields__}
    fields |= {("", field) for _, field in fields}
    assert set(http_api.NOTES) - fields == set()


def test_every_error_has_a_cause_and_a_remedy() -> None:
    page = (DOCS / "reference" / "errors.md").read_text("utf-8")
    sections = dict(re.findall(r"(?ms)^### (\w+)\n(.*?)(?=^###? |\Z)", page))
    assert {error.__name__ for error in errors.classes() if error.__name__ != "Shutdown"} == set(sections)
    assert [error for error, text in sections.items() if "**Remedy:**" not in text] == []


def test_every_folder_is_in_the_architecture() -> None:
    page = (DOCS / "explanation" / "architecture.md").read_text("utf-8")
    folders = {path.parent.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")} - {"ullm"}
    assert {folder for folder in folders if f"| `{folder}/` |" not in page} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


def test_nothing_installs_the_other_project() -> None:
    """``ullm`` on the package index is another project."""
    wrong = re.compile(r"pip install (?:-\S+ )*'?ullm(?:\[|'|\s|$)|\bullm\[")
    files = [*PAGES, *PACKAGE.rglob("*.py")]
    assert [name(file) for file in files if wrong.search(file.read_text("utf-8"))] == []


def test_pages_that_the_code_names_exist() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    named = {
        (name(file), page)
        for file in files
        for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", file.read_text("utf-8"))
    }
    assert {(file, page) for file, page in named if not (ROOT / page).exists()} == set()


def test_manifests_can_be_read() -> None:
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text("utf-8")):
            if language == "yaml":
                assert all(isinstance(each, dict) for each in yaml.safe_load_all(block))


def test_the_unit_leaves_time_to_stop() -> None:
    unit = block_of(DOCS / "how-to" / "systemd.md", "ini")
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(unit)
    timeout = re.findall(r"ULLM_SHUTDOWN_TIMEOUT=(\d+)", unit)
    assert int(parser["Service"]["TimeoutStopSec"]) >= int(timeout[0]) + 6


def test_the_pod_leaves_time_to_stop() -> None:
    deployment = next(yaml.safe_load_all(block_of(DOCS / "how-to" / "kubernetes.md", "yaml")))
    pod = deployment["spec"]["template"]["spec"]
    variables = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] >= int(variables["ULLM_SHUTDOWN_TIMEOUT"]) + 6
    assert pod["containers"][0]["livenessProbe"]["httpGet"]["path"] == "/live"
    assert pod["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/ready"


def block_of(page: Path, language: str) -> str:
    """Return the first block of a language in a page."""
    return next(text for kind, text in FENCE.findall(page.read_text("utf-8")) if kind == language)


def test_every_exit_code_is_explained() -> None:
    page = (DOCS / "reference" / "exit-status.md").read_text("utf-8")
    codes = {value for constant, value in vars(exit_codes).items() if constant.startswith("EXIT_")}
    shown = set(re.findall(r"(?m)^\| (\d+)", page))
    assert shown == {str(code) for code in codes}


def test_the_glossary_is_in_order() -> None:
    page = (DOCS / "reference" / "glossary.md").read_text("utf-8")
    words = [word.lower() for word in re.findall(r"(?m)^\*\*(.*?)\*\* –", page)]
    assert words == sorted(words)
    needed = "canary, drain, fleet, incarnation, standby worker, suspect, token for token, epoch, poisoned"
    assert [word for word in needed.split(", ") if not any(word in entry for entry in words)] == []
