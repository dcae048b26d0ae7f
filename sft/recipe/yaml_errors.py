"""What is wrong with YAML text, in the user's terms: PyYAML says where its parser gave up, not what was typed."""

import contextlib

import yaml

NO_COLON = "no `: ` in this line; write key: value"


def explain(text: str, error: yaml.MarkedYAMLError) -> tuple[int, int, str]:
    """Line and column, both from 1, and what was found there and what to do.

    >>> def said(text):
    ...     try:
    ...         yaml.safe_load(text)
    ...     except yaml.MarkedYAMLError as error:
    ...         return explain(text, error)
    >>> said('a: "out\\nb: 1\\nc: "2"\\n')
    (1, 4, 'this quote is closed in line 3 only; close it where its text ends')
    >>> said("a: b\\n  c: d\\n")
    (2, 4, 'this line is indented deeper than line 1, which has its value already; indent both alike')
    """
    problem, context = str(error.problem), error.context or ""
    here, opened = error.problem_mark or error.context_mark, error.context_mark or error.problem_mark
    assert here and opened  # PyYAML sets one at least
    if "'\\t'" in problem:
        return *_place(here), "found a tab; indent with spaces"
    if quote := _quote_over_lines(text):
        closed = quote.end_mark.line + 1
        return *_place(quote.start_mark), f"this quote is closed in line {closed} only; close it where its text ends"
    if "end of stream" in problem and "quoted" in context:
        return *_place(opened), "this quote is never closed; close it where its text ends"
    if "could not find expected ':'" in problem:
        return *_place(opened), NO_COLON
    if context in ("while parsing a flow mapping", "while parsing a flow sequence"):
        pair = "{}" if "mapping" in context else "[]"
        return *_place(opened), f"this {pair[0]} is never closed; write {pair[1]}, and a comma between two values"
    lines = text.splitlines()
    above = next((n for n in range(here.line - 1, -1, -1) if lines[n].strip()), None)
    if "mapping values" in problem and above is not None and ":" not in lines[above]:
        return above + 1, 1, NO_COLON
    words = _indentation(lines, here, above, problem) or f"{context}{', ' * bool(context)}{problem}"
    return *_place(here), words if ";" in words else f"{words}; quote text with special characters"


def _place(mark: yaml.Mark) -> tuple[int, int]:
    return mark.line + 1, mark.column + 1


def _quote_over_lines(text: str) -> yaml.ScalarToken | None:
    """The last quoted text before the error, if it goes over a line's end."""
    last = None
    with contextlib.suppress(yaml.YAMLError):
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.ScalarToken) and token.style in ("'", '"'):
                last = token
    return last if last is not None and last.start_mark.line < last.end_mark.line else None


def _indentation(lines: list[str], mark: yaml.Mark, above: int | None, problem: str) -> str:
    """Whether the line of the error is indented unlike the line above it; else, what its text is followed by."""
    line = lines[mark.line] if mark.line < len(lines) else ""
    if above is not None and ("mapping values" in problem or "block mapping start" in problem):
        here, before = (len(text) - len(text.lstrip()) for text in (line, lines[above]))
        if here > before:
            return f"this line is indented deeper than line {above + 1}, which has its value already; indent both alike"
        if here < before and "block mapping start" in problem:
            return "this line is indented like none above it; indent it like the keys beside it"
    if "mapping values" in problem:
        return "a second `: ` in this line; put text that holds one in quotes"
    if "'<scalar>'" in problem and line[: mark.column].rstrip().endswith(("'", '"')):
        return "found text after a closing quote; write a quote within quotes twice"
    return ""
