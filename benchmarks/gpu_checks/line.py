"""What a check says of one thing that it looked at."""

from dataclasses import dataclass, field
from typing import Any

PASS, FAIL, NOT_HERE = "pass", "fail", "not here"


@dataclass
class Line:
    """part: which of a check's things; figure: for a person; numbers: the same and more, for the JSON."""

    part: str
    outcome: str
    figure: str
    numbers: dict[str, Any] = field(default_factory=dict)


def judged(part: str, holds: bool, figure: str, **numbers: Any) -> Line:
    return Line(part, PASS if holds else FAIL, figure, numbers)


def not_here(part: str, reason: str) -> Line:
    """What this machine cannot show; it counts neither as passed nor as failed."""
    return Line(part, NOT_HERE, reason)
