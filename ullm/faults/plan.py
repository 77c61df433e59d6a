"""Plans of faults: the values, and the language that they are written in."""

from __future__ import annotations

import re
import sys
from typing import Any, Literal, get_args

import msgspec
from msgspec.structs import replace

from ullm.errors import ConfigError, ResourceUnavailable
from ullm.faults.points import (
    FRAME_ACTIONS,
    OF_REQUESTS,
    OF_TOKENS,
    POINTS,
    actions_at,
    is_own,
)
from ullm.protocol.messages import FromWorker, ToWorker

DEFAULT_SECONDS = {"slow": 1.0, "delay": 1.0}
"""Default duration of actions in seconds; other actions that last have no end by default."""

ALWAYS = "always"
"""The value of ``times`` for no limit."""
_FATAL = ("crash", "exit", "raise", "oom", "stop")
_LASTING = ("slow", "delay", "hang", "block", "jump")
_ENDING = ("raise", "disk_full", "drop", "corrupt", "refuse", "reset", "half", "end", "error")
REFUSALS = (429, 500, 502, 503)
"""Statuses that ``refuse`` may answer with; the last one is the default."""
_PART_PATTERN = re.compile(r"(?P<point>[^:@]+):(?P<action>[^@]+)(?:@(?P<options>.*))?", re.DOTALL)
_MESSAGES = frozenset(kind.__name__ for kind in (*get_args(ToWorker), *get_args(FromWorker)))


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One fault of a plan.

    Args:
        point: one of `POINTS`, or a point of another program.
        action: one of the actions that are possible there.
        nth: first hit of the point at which it may happen, counted from when the plan is armed. Of several
            faults that end what is at the point, one happens at a hit, after those that only take time; the
            next one waits for the next hit.
        times: how often it happens at most; default: once, or ``always`` where ``probability`` is below 1.
        probability: probability that it happens at a hit.
        seconds: duration of ``slow`` and ``delay`` (default 1), ``hang`` and ``block`` (default: no end);
            how far ``jump`` moves the clock.
        seed: seed of its random numbers; default: the plan's.
        replica, rank, epoch: count only hits of this replica, this rank, this incarnation of the workers.
        message: count only frames of this type, such as ``StepResult``.
        request: count only hits that concern this request; what follows its id after a dash does not matter.
        token: count only hits that concern this token of a request, counted from 1; at ``http.chunk``, this
            piece of an answer.
        status: status of the answer of ``refuse``.
        retry_after: seconds that this answer has in its header Retry-After.

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
    request: str | None = None
    token: int | None = None
    status: int | None = None
    retry_after: int | None = None

    def __post_init__(self) -> None:
        if not actions_at(self.point):
            raise ConfigError(f"no point {self.point!r}; there are {', '.join(POINTS)}")
        if self.action not in actions_at(self.point):
            possible = ", ".join(actions_at(self.point))
            raise ConfigError(f"no action {self.action!r} at {self.point}; there are {possible}")
        if self.nth < 1 or (isinstance(self.times, int) and self.times < 1):
            raise ConfigError("nth and times must be at least 1")
        if not 0 < self.probability <= 1:
            raise ConfigError(f"probability must be above 0 and at most 1, got {self.probability:g}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ConfigError(f"seconds must be above 0 and finite, got {self.seconds:g}")
        if self.seconds is not None and self.action not in _LASTING:
            raise ConfigError(f"{self.action} takes no seconds; only {', '.join(_LASTING)} do")
        if self.action == "jump" and self.seconds is None:
            raise ConfigError("jump needs seconds: how far the clock moves")
        self._check_filters()
        self._check_refusal()

    def _check_filters(self) -> None:
        filters = [name for name in ("replica", "rank", "epoch") if getattr(self, name) is not None]
        if filters and (self.is_own or not self.of_worker):
            raise ConfigError(
                f"{self.point} concerns no single worker, so it cannot be filtered by {filters[0]}"
            )
        if self.message is not None and actions_at(self.point) is not FRAME_ACTIONS:
            raise ConfigError(f"only frames can be filtered by message, not {self.point}")
        if self.message is not None and self.message not in _MESSAGES:
            raise ConfigError(f"no message {self.message!r}; there are {', '.join(sorted(_MESSAGES))}")
        for name, points in (("request", OF_REQUESTS), ("token", OF_TOKENS)):
            if getattr(self, name) is not None and not self.is_own and self.point not in points:
                raise ConfigError(f"{self.point} cannot be filtered by {name}; only {', '.join(points)} can")
        if self.token is not None and self.token < 1:
            raise ConfigError("token must be at least 1")

    def _check_refusal(self) -> None:
        if self.action != "refuse":
            for name in ("status", "retry_after"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{self.action} takes no {name}; only refuse does")
        elif self.status is not None and self.status not in REFUSALS:
            raise ConfigError(f"status must be one of {', '.join(map(str, REFUSALS))}, got {self.status}")
        elif self.retry_after is not None and self.retry_after < 0:
            raise ConfigError(f"retry_after must be at least 0, got {self.retry_after}")

    def __str__(self) -> str:
        defaults = dict(zip(self.__struct_fields__[2:], self.__struct_defaults__, strict=True))
        values = {name: getattr(self, name) for name in defaults}
        options = ",".join(f"{name}={value}" for name, value in values.items() if value != defaults[name])
        return f"{self.point}:{self.action}" + (f"@{options}" if options else "")

    @property
    def is_own(self) -> bool:
        """Whether its point is another program's."""
        return is_own(self.point)

    @property
    def of_worker(self) -> bool:
        """Whether its point concerns a single worker."""
        return self.point.startswith(("worker.", "frame."))

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

    @property
    def ends(self) -> bool:
        """Whether nothing else can happen at its hit after it: who was there, or what was sent, is gone."""
        return self.fatal or self.action in _ENDING

    def concerns(self, request: str) -> bool:
        """Return whether it is meant for this request; the server adds to an id, after a dash."""
        return self.request in (None, request) or request.startswith(f"{self.request}-")

    def check_transport(self, transport: str) -> None:
        """Raise `ConfigError` if this kind of workers cannot carry it out."""
        if self.action == "stop" and transport == "thread":
            raise ConfigError("a thread cannot be stopped by SIGSTOP; use hang, or --transport process")
        if self.action == "stop" and transport == "process" and sys.platform == "win32":
            raise ResourceUnavailable("Windows has no SIGSTOP; use hang")


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
