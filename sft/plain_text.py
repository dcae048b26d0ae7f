"""What may be shown: text for a terminal or a log, without what a terminal would obey and without secrets."""

import logging
import os
import re
from typing import Any

SECRET_KEY = re.compile(r"(token|(api|access)_?key|secret|password|credentials?)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"(?<![\w-])(hf_|gh[pousr]_|sk-(proj-|ant-)?)[A-Za-z0-9]{30,}|://[^/\s:@]+:[^/\s@]+@")
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SHORTEST_SECRET = 8  # characters of an environment variable that is hidden; "1" or "true" is none


def plain_text(text: Any) -> str:
    r"""The text with control characters, marks that turn the direction of writing, and halves of surrogates spelled.

    Access tokens, passwords in addresses, and the values of environment variables whose names say secret, are dots.

    >>> plain_text("a\x1b[2J\n https://me:hunter22@example.org")
    'a\\x1b[2J\n https://...@example.org'
    """
    shown = _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
    shown = SECRET_VALUE.sub(lambda found: "://...@" if found[0][0] == ":" else "...", shown)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and SECRET_KEY.search(name):
            shown = shown.replace(value, "...")
    return shown


class PlainFormatter(logging.Formatter):
    """Lines of a log, as `plain_text` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_text(super().format(record))


def duration(seconds: float) -> str:
    """
    >>> duration(0.42), duration(59.7), duration(130), duration(7322), duration(200_000)
    ('0.4 s', '1 min', '2 min 10 s', '2 h 2 min', '2 d 7 h')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    parts, left = [], round(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        parts.append((count, unit))
    first = next(i for i, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)
