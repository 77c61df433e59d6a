"""Plans of faults: the values, and the language that they are written in."""

from __future__ import annotations

import re
import sys
from typing import Any, Literal, get_args

import msgspec
from msgspec.structs import replace

from ullm.errors import ConfigError
from ullm.protocol.messages import FromWorker, ToWorker

WORKER_ACTIONS = ("crash", "exit", "raise", "oom", "hang", "slow", "stop")
"""Actions that a worker carries out on itself just before it handles a message."""

FRAME_ACTIONS = ("drop", "duplicate", "delay", "corrupt")
"""Actions on a message on its way."""

ACTOR_ACTIONS = ("raise", "slow", "hang", "block")
"""Actions on an actor; ``block`` blocks its whole thread, and so everything else in it."""

POINTS: dict[str, tuple[str, ...]] = {
    "worker.start": WORKER_ACTIONS,
    "worker.prepare": WORKER_ACTIONS,
    "worker.step": WORKER_ACTIONS,
    "worker.ping": WORKER_ACTIONS,
    "worker.sleep": WORKER_ACTIONS,
    "worker.wake": WORKER_ACTIONS,
    "worker.stop": WORKER_ACTIONS,
    "frame.to_worker": FRAME_ACTIONS,
    "frame.from_worker": FRAME_ACTIONS,
    "scheduler.step": ACTOR_ACTIONS,
    "router.tokens": ACTOR_ACTIONS,
    "tokenizer.encode": ACTOR_ACTIONS,
    "engine.reload": ACTOR_ACTIONS,
}
"""Point → actions that are possible there."""

DEFAULT_SECONDS = {"slow": 1.0, "delay": 1.0}
"""Default duration of actions in seconds; other actions that last have no end by default."""

ALWAYS = "always"
"""The value of ``times`` for no limit."""
_FATAL = ("crash", "exit", "raise", "oom", "stop")
_LASTING = ("slow", "delay", "hang", "block")
_PART_PATTERN = re.compile(r"(?P<point>[^:@]+):(?P<action>[^@]+)(?:@(?P<options>.*))?", re.DOTALL)
_MESSAGES = frozenset(kind.__name__ for kind in (*get_args(ToWorker), *get_args(FromWorker)))


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One fault of a plan.

    Args:
        point: one of `POINTS`.
        action: one of the actions that are possible there.
        nth: first hit of the point at which it may happen, counted from when the plan is armed.
        times: how often it happens at most; default: once, or ``always`` where ``probability`` is below 1.
        probability: probability that it happens at a hit.
        seconds: duration of ``slow`` and ``delay`` (default 1), ``hang`` and ``block`` (default: no end).
        seed: seed of its random numbers; default: the plan's.
        replica, rank, epoch: count only hits of this replica, this rank, this incarnation of the workers.
        message: count only frames of this type, such as ``StepResult``.

    Raises:
        ConfigError: it can never happen; says why.
    """

    point: str
    action: str
    nth: int = 1
    times: int | Literal["always"] | None = None
    probability: float = 1.0
    seconds: float | None = None
    seed: int | None = None
    replica: int | None = None
    rank: int | None = None
    epoch: int | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ConfigError(f"no point {self.point!r}; there are {', '.join(POINTS)}")
        if self.action not in POINTS[self.point]:
            possible = ", ".join(POINTS[self.point])
            raise ConfigError(f"no action {self.action!r} at {self.point}; there are {possible}")
        if self.nth < 1 or (isinstance(self.times, int) and self.times < 1):
            raise ConfigError("nth and times must be at least 1")
        if not 0 < self.probability <= 1:
            raise ConfigError(f"probability must be above 0 and at most 1, got {self.probability:g}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ConfigError(f"seconds must be above 0 and finite, got {self.seconds:g}")
        if self.seconds is not None and self.action not in _LASTING:
            raise ConfigError(f"{self.action} takes no seconds; only {', '.join(_LASTING)} do")
        self._check_filters()

    def _check_filters(self) -> None:
        filters = [name for name in ("replica", "rank", "epoch") if getattr(self, name) is not None]
        if filters and POINTS[self.point] is ACTOR_ACTIONS:
            raise ConfigError(
                f"{self.point} concerns no single worker, so it cannot be filtered by {filters[0]}"
            )
        if self.message is not None and POINTS[self.point] is not FRAME_ACTIONS:
            raise ConfigError(f"only frames can be filtered by message, not {self.point}")
        if self.message is not None and self.message not in _MESSAGES:
            raise ConfigError(f"no message {self.message!r}; there are {', '.join(sorted(_MESSAGES))}")

    def __str__(self) -> str:
        values = msgspec.to_builtins(self)
        options = ",".join(f"{key}={values[key]}" for key in values if key not in ("point", "action"))
        return f"{self.point}:{self.action}" + (f"@{options}" if options else "")

    @property
    def limit(self) -> float:
        """How often it happens at most."""
        if self.times is None:
            return 1 if self.probability == 1 else float("inf")
        return float("inf") if self.times == ALWAYS else float(self.times)

    @property
    def duration(self) -> float:
        """Seconds that it lasts; 0: without end, or the action has no duration."""
        return self.seconds or DEFAULT_SECONDS.get(self.action, 0.0)

    @property
    def fatal(self) -> bool:
        """Whether a worker does nothing else after it."""
        return self.action in _FATAL or (self.action == "hang" and not self.duration)

    def check_transport(self, transport: str) -> None:
        """Raise `ConfigError` if this kind of workers cannot carry it out."""
        if self.action == "stop" and transport == "thread":
            raise ConfigError("a thread cannot be stopped by SIGSTOP; use hang, or --transport process")
        if self.action == "stop" and transport == "process" and sys.platform == "win32":
            raise ConfigError("Windows has no SIGSTOP; use hang")


MAX_PLAN = 20_000
"""Maximum length of a plan in characters."""


class FaultPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Faults, and the seed of their random numbers; its `str` can be parsed again."""

    faults: tuple[Fault, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        return "; ".join([*map(str, self.faults), *([f"seed={self.seed}"] if self.seed else [])])

    def __add__(self, other: FaultPlan) -> FaultPlan:
        """Return the faults of both plans; each one keeps its seed."""
        return FaultPlan(
            tuple(
                fault if fault.seed is not None or not plan.seed else replace(fault, seed=plan.seed)
                for plan in (self, other)
                for fault in plan.faults
            )
        )

    @staticmethod
    def parse(text: str) -> FaultPlan:
        """Parse a plan: parts ``point:action@option=value,…``, separated by semicolons, or JSON.

        JSON is a list of faults, or an object ``{"faults": […], "seed": 7}``.

        Raises:
            ConfigError: says in one line which part is wrong, and why.
        """
        if len(text) > MAX_PLAN:
            raise ConfigError(f"--faults: a plan of {len(text)} characters; at most {MAX_PLAN}")
        if text.lstrip().startswith(("[", "{")):
            return _parse_json(text)
        faults: list[Fault] = []
        seed = 0
        for part in filter(None, map(str.strip, re.split(r"[;\n]", text))):
            if part.startswith("seed="):
                seed = _convert(part, {"seed": part[5:].strip()}, _Seed, strict=False).seed
            else:
                faults.append(_parse_part(part))
        return FaultPlan(tuple(faults), seed)


class _Seed(msgspec.Struct):
    seed: int


def _parse_json(text: str) -> FaultPlan:
    try:
        content = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"--faults: not JSON that could be a plan: {error}") from None
    values = content if isinstance(content, dict) else {"faults": content}
    faults = values.get("faults", [])
    if isinstance(faults, list):
        for fault in faults:  # one by one, to name the one that is wrong
            _convert(msgspec.json.encode(fault).decode(), fault, Fault)
    plan: FaultPlan = _convert("the plan", values, FaultPlan)
    return plan


def _parse_part(part: str) -> Fault:
    match = _PART_PATTERN.fullmatch(part)
    if match is None:
        raise ConfigError(f"--faults: {part!r}: not of the form point:action@option=value,…")
    values: dict[str, Any] = {name: match[name].strip() for name in ("point", "action")}
    for option in filter(None, map(str.strip, (match["options"] or "").split(","))):
        name, equals, value = (side.strip() for side in option.partition("="))
        if not equals or name in values or name not in Fault.__struct_fields__:
            raise ConfigError(f"--faults: {part!r}: {option!r} is not an option, or is given twice")
        values[name] = value
    fault: Fault = _convert(part, values, Fault, strict=False)
    return fault


def _convert(part: str, values: object, kind: type[Any], *, strict: bool = True) -> Any:
    try:
        return msgspec.convert(values, kind, strict=strict)
    except msgspec.ValidationError as error:
        detail = str(error).replace(" - at `$`", "").replace(" - at `$.", ", in `")
        raise ConfigError(f"--faults: {part!r}: {detail}") from None
