"""What is wrong with YAML text, in the user's terms: PyYAML says where its parser gave up, not what was typed."""

import contextlib
from collections.abc import Iterator

import yaml

Found = tuple[yaml.Mark | None, str]  # where, and what was found and what to do


def explain(text: str, error: yaml.MarkedYAMLError) -> Found:
    """The place and the words for an error of PyYAML.

    >>> def said(text):
    ...     try:
    ...         yaml.safe_load(text)
    ...     except yaml.MarkedYAMLError as error:
    ...         mark, words = explain(text, error)
    ...         return f"{mark.line + 1}:{mark.column + 1}: {words}"
    >>> said('a: "out\\nb: 1\\nc: "2"\\n')
    '1:4: this quote is closed in line 3 only; close it where its text ends'
    >>> said("a: b\\n  c: d\\n")
    '2:4: this line is indented deeper than line 1, which has its value already; indent both alike'
    """
    problem, mark = str(error.problem), error.problem_mark
    if "'\\t'" in problem:
        return mark, "found a tab; indent with spaces"
    if long_quote := _quote_over_lines(text):
        return long_quote
    if "end of stream" in problem and error.context and "quoted" in error.context:
        return error.context_mark, "this quote is never closed; close it where its text ends"
    if "could not find expected ':'" in problem:
        return error.context_mark, "no `: ` in this line; write key: value"
    if error.context and "flow" in error.context:
        bracket = "[" if "sequence" in error.context else "{"
        closing = {"[": "]", "{": "}"}[bracket]
        return error.context_mark, f"this {bracket} is never closed; write {closing}, and a comma between two values"
    if mark is not None and (indentation := _indentation(text.splitlines(), mark, problem)):
        return mark, indentation
    context = f"{error.context}, " if error.context else ""
    return mark or error.context_mark, f"{context}{problem}; quote text with special characters"


def _quote_over_lines(text: str) -> Found | None:
    """Of the last quoted text before the error, where its quote begins, if it goes over a line's end."""
    last = None
    with contextlib.suppress(yaml.YAMLError):
        for token in _tokens(text):
            if isinstance(token, yaml.ScalarToken) and token.style in ("'", '"'):
                last = token
    if last is None or last.start_mark.line == last.end_mark.line:
        return None
    line = last.end_mark.line + 1
    return last.start_mark, f"this quote is closed in line {line} only; close it where its text ends"


def _tokens(text: str) -> Iterator[yaml.Token]:
    yield from yaml.scan(text, yaml.SafeLoader)


def _indentation(lines: list[str], mark: yaml.Mark, problem: str) -> str:
    """Whether the line of the error is indented unlike those around it; else, what follows its text."""
    here = lines[mark.line] if mark.line < len(lines) else ""
    before = next((n for n in range(mark.line - 1, -1, -1) if lines[n].strip()), None)
    if before is not None and ("mapping values" in problem or "block mapping start" in problem):
        indented, above = (len(line) - len(line.lstrip()) for line in (here, lines[before]))
        if indented > above:
            return (
                f"this line is indented deeper than line {before + 1}, which has its value already; indent both alike"
            )
        if indented < above and "block mapping start" in problem:
            return "this line is indented like none above it; indent it like the keys beside it"
    if "mapping values" in problem:
        return "a second `: ` in this line; put text that holds one in quotes"
    if "'<scalar>'" in problem and here[: mark.column].rstrip().endswith(("'", '"')):
        return "found text after a closing quote; write a quote within quotes twice"
    return ""
