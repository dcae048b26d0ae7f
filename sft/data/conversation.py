"""What a row becomes before it is tokens: messages, and the tools that the template shows to the model."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]  # "role", "content", "tool_calls", ...: whatever the chat template reads
Tools = list[dict[str, Any]]


class Conversation(NamedTuple):
    """What a format makes of a row. untrained: the indexes of the answers that carry no loss, though others may."""

    messages: list[Message]
    tools: Tools | None = None
    untrained: frozenset[int] = frozenset()


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """The indexes of the messages that the model writes.

    >>> assistant_turns([{"role": "user"}, {"role": "assistant"}, {"role": "tool"}, {"role": "assistant"}])
    [1, 3]
    """
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def strings(value: Any) -> Iterator[str]:
    """Every text in a value, keys included, at any depth of lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
