"""Broken inputs for every reader, each with what its one answer must say; and odd ones that must pass.

`python benchmarks/garbage.py` prints them by reader; tests/test_garbage.py holds each to one clear answer.
"""

import datetime
import gzip
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as safetensors

from sft.data.file_bytes import zstd

Content = bytes | str | None | Callable[[bytes], bytes]  # None: the file is taken away; a function: of what it was

RECIPE = """\
model_name_or_path: model
output_dir: out
dataset:
  train: train.jsonl
  packing: false
lora_config: {r: 2, target_modules: [q_proj, v_proj]}
training_args: {max_steps: 1, per_device_train_batch_size: 1}
export: {merge: false}
"""
ROW = {"conversation": [{"human": "Hi.", "assistant": "Hello."}]}
GOOD = json.dumps(ROW) + "\n"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEEP = 10_000
MIB = 2**20


def torch_saved(value: object) -> bytes:
    """As torch.save writes it: a pickle in a zip."""
    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


class Executed:
    """What a pickle runs when it is loaded: it makes a file that a test looks for."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("EXECUTED",)


EVIL = pickle.dumps(Executed())


def evil_zip(_: bytes) -> bytes:
    return torch_saved(Executed())


@dataclass
class Garbage:
    """One input.

    says: a part of the answer; None: it must pass. files: path in the working folder -> what stands there.
    needs: "model" alone, or a "run" too, with out/checkpoint-1 and out/lora_adapter. heavy: for benchmarks only.
    """

    reader: str
    name: str
    says: str | None
    files: dict[str, Content] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    needs: str = "model"
    heavy: bool = False


CASES: list[Garbage] = []


def add(reader: str, name: str, says: str | None, files: dict[str, Content], *arguments: str, **more: Any) -> None:
    CASES.append(Garbage(reader, name, says, files, arguments, **more))


# -------------------------------------------------------------------------------------------------------------- recipe


def recipe(name: str, content: bytes | str, says: str | None, **more: Any) -> None:
    """The whole recipe."""
    add("recipe", name, says, {"recipe.yaml": content}, **more)


def lines(name: str, text: str, says: str | None, **more: Any) -> None:
    """Lines after a whole recipe, from line 9 on, or in place of its line for the same top-level key."""
    key = text.partition(":")[0]
    kept, skips = [], False
    for line in RECIPE.splitlines(keepends=True):
        skips = line.startswith(f"{key}:") or (skips and line.startswith(" "))
        kept += [] if skips else [line]
    recipe(name, "".join(kept) + text + "\n", says, **more)


def dataset(name: str, text: str, says: str | None, **more: Any) -> None:
    """Lines of the section `dataset`, from line 4 on; without a `train`, a whole one stands before them."""
    train = "" if text.startswith("train:") else "  train: train.jsonl\n"
    rest = RECIPE.replace("  train: train.jsonl\n  packing: false\n", train + "  " + text + "\n")
    recipe(name, rest, says, **more)


recipe("empty", b"", "recipe.yaml: is empty; a recipe has at least model_name_or_path")
recipe("comments alone", "# nothing\n", "recipe.yaml: is empty")
recipe("a list", "- a\n- b\n", "recipe.yaml: found a list; a recipe is lines of `key: value`")
recipe("one word", "model\n", "found 'model'; a recipe is lines of `key: value`")
recipe("JSON lines", GOOD * 2, "recipe.yaml:2:1: not YAML")
recipe("tabs", RECIPE.replace("  train", "\ttrain"), "recipe.yaml:4:1: not YAML: found a tab; indent with spaces")
recipe("UTF-16", RECIPE.encode("utf-16"), "recipe.yaml: is UTF-16, or not text at all; save it as UTF-8")
recipe("UTF-16 without BOM", RECIPE.encode("utf-16-le"), "recipe.yaml: is UTF-16, or not text at all")
recipe("UTF-32", RECIPE.encode("utf-32"), "recipe.yaml: is UTF-16, or not text at all")
recipe("GBK", RECIPE.replace("out", "模型").encode("gbk"), "recipe.yaml:2: is not UTF-8")
recipe("NUL", RECIPE.encode() + b"\0", "recipe.yaml: is UTF-16, or not text at all")
recipe("a picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not text at all")
recipe("escape sequences", RECIPE + "a: \x1b[2J\n", "recipe.yaml:9: not YAML: the character U+001B is not allowed")
recipe("a lone surrogate", RECIPE + 'run: "\\ud800"\n', "recipe.yaml:9: run: holds half of a surrogate pair")
recipe("1 MB", RECIPE + "#" * MIB, "bytes; a recipe is a short YAML file")
recipe("deep list", "a: " + "[" * DEEP, "recipe.yaml:1: is nested too deeply")
recipe("deep mapping", "a: " + "{a: " * DEEP, "recipe.yaml:1: is nested too deeply")
recipe("deep block", "- " * DEEP, "recipe.yaml:1: is nested too deeply")
recipe("deep within the limits of YAML", RECIPE + "a: " + "[" * 150 + "]" * 150, "recipe.yaml:9: unknown key a")
recipe("an alias of itself", "chat: &a [*a]\n", "an alias holds itself; write the values out")
recipe(
    "an alias bomb",
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "more than 100000 values; write aliases of aliases out",
)
recipe("an unknown alias", RECIPE + "a: *b\n", "recipe.yaml:9:4: not YAML: found undefined alias 'b'")
recipe("a merge key", RECIPE + "training_args: &a {}\nchat: {<<: *a}\n", "recipe.yaml:9: duplicate key training_args")
recipe("duplicate keys", RECIPE + "output_dir: b\n", "recipe.yaml:9: duplicate key output_dir, given in line 2 already")
recipe("two documents", RECIPE + "---\n" + RECIPE, "recipe.yaml:9:1: not YAML: expected a single document")
recipe("an open quote", RECIPE + 'a: "b\n', "recipe.yaml:9:4: not YAML: this quote is never closed")
recipe("an open bracket", RECIPE + "a: [b\n", "recipe.yaml:9:4: not YAML: this [ is never closed")
recipe("a Python object", RECIPE + "a: !!python/object/apply:os.mkdir [EXECUTED]\n", "found the YAML tag")
recipe("a tag that lies", RECIPE + "a: !!int abc\n", "recipe.yaml:9: a: found abc as a number")
recipe("a list as key", RECIPE + "? [a]\n: b\n", "recipe.yaml:9: a key of the recipe is not text; put it in quotes")
recipe("null as key", RECIPE + "~: b\n", "recipe.yaml:9: a key of the recipe is not text; put it in quotes")
recipe("a directive", "%YAML 3.0\n---\n" + RECIPE, "recipe.yaml:1:1: not YAML: found incompatible YAML document")
lines("NaN", "training_args: {learning_rate: .nan}", "training_args.learning_rate: found .nan; give a finite number")
lines("infinity", "training_args: {learning_rate: 1e999}", "learning_rate: found 1e999; give a finite number")
lines("a huge whole number", "training_args: {max_steps: 99999999999999999999}", "give a finite number")
lines("a number of 10,000 digits", f"training_args: {{max_steps: {'9' * 10_000}}}", "max_steps: found 99999")
lines("no space after a colon", "training_args: {max_steps:10}", "training_args: found 'max_steps:10' without a value")
dataset("no space in dataset.columns", "columns: {question:human}", "write a space after the colon: `question: human`")
dataset("no space in a block", "columns:\n    question:human", "write a space after the colon: `question: human`")
lines("a list where a section belongs", "lora_config: [r, 2]", "lora_config: found a list; give a mapping (key: value)")
lines("text where a section belongs", "dataset: train.jsonl", "dataset: found 'train.jsonl'; give a mapping")
lines("a section that is null", "dataset:", "dataset.train: is missing; give a file, a glob or a hub id")
lines("an unknown key", "dataset_pth: a", "recipe.yaml:9: unknown key dataset_pth; did you mean 'dataset_path'?")
lines("an unknown key of 200 kB", "a" * 200_000 + ": 1", "recipe.yaml:9:1: not YAML: no `: ` in this line")
lines("a value of 200 kB", "training_args: {optim: " + "a" * 200_000 + "}", "training_args.optim: found 'aaaa")
lines("a missing value", "output_dir:", "output_dir: is missing; give the folder of the run")
lines("an empty name", "model_name_or_path: ''", "model_name_or_path: found ''; give a hub id or a local folder")
lines("NUL in a path", r'output_dir: "a\0b"', "output_dir: holds the control character U+0000")
lines("an escape sequence in a path", r'output_dir: "a\e[2Jb"', "output_dir: holds the control character U+001B")
lines("NUL in a model's name", r'model_name_or_path: "a\0b"', "holds the control character U+0000")
lines("a path of 5,000 letters", "output_dir: " + "a" * 5000, "is no path that can be read: File name")
lines(
    "a model's name of 5,000 letters",
    "model_name_or_path: ./" + "a" * 5000,
    "is no path that can be read: File name",
)
dataset("a data path of 5,000 letters", "train: ./" + "a" * 5000, "is no path that can be read: File name")
dataset("NUL in a data path", r'train: "a\0b.jsonl"', "holds the control character U+0000")
dataset("no data", "train: []", "dataset.train: is an empty list; give at least one")
dataset("a data path that is a number", "train: 5", "dataset.train: found 5; give text")
dataset("a data path in a list in a list", "train: [[train.jsonl]]", "dataset.train[0]: found a list; give text")
lines(
    "a pattern that is none", "lora_config: {target_modules: '(q_proj'}", "lora_config.target_modules: found '(q_proj'"
)
lines("a secret", f"training_args: {{hub_token: hf_{'a' * 34}}}", "a secret has no place in a recipe")
lines(
    "a password in an address",
    "model_name_or_path: https://me:hunter22@example.org/model",
    "an address with a password; a secret has no place in a recipe",
)
recipe("BOM", b"\xef\xbb\xbf" + RECIPE.encode(), None)
recipe("CRLF", RECIPE.replace("\n", "\r\n"), None)
dataset("NEL and U+2028 in text", 'system: "a\\Nb\\Lc"', None)

# ------------------------------------------------------------------------------------------------------------ overrides


def override(name: str, says: str, *arguments: str) -> None:
    add("override", name, says, {}, *arguments)


override("no value", "override seed: write key.path=value", "seed")
override("no key", "override =5: write key.path=value", "=5")
override("an empty part", "override dataset..train=a: write key.path=value", "dataset..train=a")
override("an unknown key", "unknown key dataset.max_lenght; did you mean 'max_length'?", "dataset.max_lenght=3")
override("below a value", "override output_dir as a whole", "output_dir.a=5")
override("below a list", "lora_config.target_modules is a list; override", "lora_config.target_modules.0=k_proj")
override("an index", "unknown key lora_config.target_modules[0]", "lora_config.target_modules[0]=k_proj")
override("no YAML", "override chat={a: [}: not YAML", "chat={a: [}")
override("no space after a colon", "found 'template:a' without a value", "chat={template:a}")
override("an alias bomb", "not YAML", "chat=*a")
override("deep", "is nested too deeply", "chat=" + "[" * DEEP)
override("a value of 1 MB", "override output_dir=aaa", "output_dir=" + "a" * MIB)
override("NUL", "override output_dir='a\\x00b': not YAML: the character U+0000 is not allowed", "output_dir=a\0b")
override("an escape sequence", "the character U+001B is not allowed", "output_dir=a\x1b[2J")
override("an escape sequence in a key", "unknown key 'a\\x1b[2J'", "a\x1b[2J=1")
override("bytes that are not UTF-8", "the character U+DCFF is not allowed", "output_dir=a\udcff")
override("a key that is not UTF-8", "unknown key 'a\\udcff'", "a\udcff=1")
override("two documents", "expected a single document", "output_dir=a\n---\nb")
override("a secret", "a secret has no place in a recipe", f"training_args.run_name=hf_{'a' * 34}")
override("NaN", "override dataset.max_lost=.nan: found .nan; give a finite number", "dataset.max_lost=.nan")
override("a list for text", "override output_dir=[a]: found a list; give text", "output_dir=[a]")
override("null for what must be", "output_dir: is missing", "output_dir=null")

# ---------------------------------------------------------------------------------------------------------- JSON lines


def data(file: str, name: str, content: Content, says: str | None, *arguments: str, **more: Any) -> None:
    kind = next(k for k in (".gz", ".zst", ".parquet", ".csv", ".tsv", ".jsonl", ".json") if file.endswith(k))
    reader = {".gz": ".gz, .zst", ".zst": ".gz, .zst", ".csv": ".csv, .tsv", ".tsv": ".csv, .tsv"}.get(kind, kind)
    arguments = arguments if file == "train.jsonl" else (f"dataset.train={file}", *arguments)
    add(reader, name, says, {file: content}, *arguments, **more)


def jsonl(name: str, content: Content, says: str | None, *arguments: str, **more: Any) -> None:
    data("train.jsonl", name, content, says, *arguments, **more)


def turn(value: str) -> str:
    """A row whose question is this JSON."""
    return f'{{"conversation": [{{"human": {value}, "assistant": "b"}}]}}\n'


jsonl("missing", None, "there is no file train.jsonl (working directory: ")
jsonl("empty", b"", "train.jsonl: is empty; rows are needed")
jsonl("blank lines", b"\n \n\r\n", "train.jsonl: is empty; rows are needed")
jsonl("UTF-16", GOOD.encode("utf-16"), "train.jsonl: is UTF-16, not UTF-8; save it as UTF-8")
jsonl("UTF-16 without BOM", GOOD.encode("utf-16-be"), "train.jsonl: is UTF-16, not UTF-8; save it as UTF-8")
jsonl("UTF-32", GOOD.encode("utf-32"), "train.jsonl: is UTF-32, not UTF-8; save it as UTF-8")
jsonl("GBK", turn('"你好"').encode("gbk"), "train.jsonl:1: is not UTF-8 (byte 0xc4 at column 30)")
jsonl("NUL all through", bytes(1000), "train.jsonl: holds NUL bytes and is no text")
jsonl("NUL in a line", GOOD.encode() + b'{"a": \0}\n', "train.jsonl:2: is not JSON")
jsonl(
    "gzip without its ending",
    gzip.compress(GOOD.encode()),
    "is packed with gzip; give its name the ending .gz",
)
jsonl(
    "zstd without its ending",
    zstd.compress(GOOD.encode()),
    "is packed with Zstandard; give its name the",
)
jsonl("a zip", b"PK\x03\x04" + bytes(30), "train.jsonl: is a zip file, as .xlsx and .docx are")
jsonl("a PDF", b"%PDF-1.7\n1 0 obj\n", "train.jsonl:1: is not JSON")
jsonl("a Parquet file", b"PAR1" + bytes(30) + b"PAR1", "is a Parquet file; give its name the")
jsonl("YAML", "human: Hi.\nassistant: Hello.\n", "train.jsonl:1: is not JSON: Expecting value at column 1")
jsonl("JSON over several lines", json.dumps(ROW, indent=1), "at column 2; write each row in one line")
jsonl("single quotes", str(ROW), "train.jsonl:1: is not JSON: Expecting property name enclosed in double quotes")
jsonl("a cut line", GOOD + GOOD[:20], "train.jsonl:2: is not JSON: ")
jsonl("two objects in a line", GOOD.strip() * 2, "train.jsonl:1: is not JSON: Extra data at column")
jsonl("a comma too many", GOOD.replace("}\n", ",}\n"), "train.jsonl:1: is not JSON")
jsonl("NaN", turn("NaN"), "train.jsonl:1: holds NaN, which is no number of JSON; write null")
jsonl("infinity", turn("-Infinity"), "train.jsonl:1: holds -Infinity, which is no number of JSON")
jsonl("a number of 10,000 digits", turn("1" * DEEP), "train.jsonl:1: holds a number of more than 4,300 digits")
jsonl("a lone surrogate", turn('"\\ud800"'), "train.jsonl:1: holds half of a surrogate pair")
jsonl("a lone surrogate as key", '{"\\udfff": 1}', "train.jsonl:1: holds half of a surrogate pair")
jsonl("a lone surrogate in bytes", turn('"x"').encode().replace(b"x", b"\xed\xa0\x80"), "train.jsonl:1: is not UTF-8")
jsonl("duplicate keys", '{"human": "a", "human": "b", "assistant": "c"}', "train.jsonl:1: has the key 'human' twice")
jsonl(
    "duplicate keys in a turn", '{"conversation": [{"human": "a", "human": "b", "assistant": "c"}]}', "twice; keep one"
)
jsonl("10,000-deep list", "[" * DEEP + "]" * DEEP, "train.jsonl: row 1 is JSON nested too deep to read")
jsonl("10,000-deep object", '{"a": ' * DEEP + "1" + "}" * DEEP, "train.jsonl:1: is JSON nested too deep to read")
jsonl("10,000-deep content", turn("[" * DEEP + "]" * DEEP), "train.jsonl:1: is JSON nested too deep to read")
jsonl("900-deep content", turn("[" * 900 + "]" * 900), "train.jsonl:1: ")
jsonl("a line of 40 MB", lambda _: b'{"a": "' + b"a" * (40 * MIB), "train.jsonl:1: is longer than 16 MiB")
jsonl("a line of 100 MB", lambda _: b'{"a": "' + b"a" * (100 * MIB) + b'"}', "is longer than 16 MiB", heavy=True)
jsonl("a row of 200 kB", turn(json.dumps("a " * 100_000)), "tokens, more than dataset.max_length")
jsonl("a row of 100,000 keys", json.dumps({f"k{i}": 1 for i in range(100_000)}), "no format fits the fields k0, k1")
jsonl("a key of 1 MB", json.dumps({"k" * MIB: 1}), "no format fits the fields kkkk")
jsonl("30,000 bad rows", "{}\n" * 30_000, "no row of the first 1,000 can be used")
jsonl("BOM, CRLF, blank lines, no last line end", b"\xef\xbb\xbf\r\n" + GOOD.strip().encode() + b"\r\n\r\n \n", None)
jsonl("NEL, U+2028, NUL and escape sequences in text", turn('"a\x85b\u2028c\\u0000d\\u001b[2J"'), None)
jsonl("a surrogate pair", turn('"\\ud83d\\ude00"'), None)
jsonl("an empty last line", GOOD + "\n", None)
jsonl(
    "numbers as text, and more keys", '{"conversation": [{"human": "1", "assistant": "2"}], "id": 7, "x": null}', None
)

# --------------------------------------------------------------------------------------------------------- rows (JSON)


def row(name: str, value: Any, says: str, *arguments: str) -> None:
    """The one row of train.jsonl."""
    add("row of a format", name, says, {"train.jsonl": json.dumps(value, ensure_ascii=False)}, *arguments)


def messages(*pairs: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


ANSWERED = (("user", "a"), ("assistant", "b"))
row("text", "Hi.", "train.jsonl:1: no format fits text; a row is an object with fields")
row("a number", 17, "train.jsonl:1: no format fits a number; a row is an object with fields")
row("null", None, "train.jsonl:1: no format fits null; a row is an object with fields")
row("an empty object", {}, "train.jsonl:1: no format fits an empty object")
row(
    "unknown fields",
    {"q": 1, "a": 2},
    "no format fits the fields q, a; docs/formats.md shows a row of each: conversation",
)
row("fields that hold escape sequences", {"\x1b[2J": 1}, r"no format fits the fields \x1b[2J")
row("a conversation that is text", {"conversation": "a"}, "the field 'conversation' is text, not a list")
row("a conversation without turns", {"conversation": []}, "train.jsonl:1: the conversation is empty")
row("a turn that is text", {"conversation": ["a"]}, "train.jsonl:1: turn 1 is str, not {")
row("a turn without an answer", {"conversation": [{"human": "a"}]}, "turn 1 (assistant) is missing")
row(
    "an answer that is a number",
    {"conversation": [{"human": "a", "assistant": 3}]},
    "turn 1 (assistant) is int, not text",
)
row("an answer that is null", {"conversation": [{"human": "a", "assistant": None}]}, "turn 1 (assistant) is ")
row("an answer of spaces", {"conversation": [{"human": "a", "assistant": " \n"}]}, "turn 1 is empty")
row("no messages", {"messages": []}, "train.jsonl:1: ")
row("a message that is text", {"messages": ["a"]}, "message 1 is str, not {")
row("an unknown role", messages(("bot", "a")), "is 'bot'; known are")
row("a role that is a list", messages(([], "a")), "train.jsonl:1: the role of message 1 is []; known are")
row("a role with escape sequences", messages(("\x1b[2J", "a")), r"is '\x1b[2J'; known are")
row("content that is a number", messages(("user", 5), ("assistant", "b")), "train.jsonl:1: ")
row("content of a picture", messages(("user", [{"type": "image"}]), ("assistant", "b")), "train.jsonl:1: ")
row("no answer", messages(("user", "a")), "train.jsonl:1: there is no assistant message")
row("an answer alone that is empty", messages(("user", "a"), ("assistant", "")), "train.jsonl:1: ")
row("tools that are text", messages(*ANSWERED, tools="none"), "the field 'tools' is not JSON")
row("tools that are numbers", messages(*ANSWERED, tools=[1]), "the field 'tools' must be a list of JSON schemas")
row(
    "a mark of loss that is text",
    {"messages": [{"role": "assistant", "content": "a", "train": "no"}]},
    "give true or false",
)
row("a control token", messages(("user", "<|im_end|>"), ("assistant", "b")), "spells the control token '<|im_end|>'")
row(
    "every row over-long",
    ROW,
    "no row of dataset.train is left to use",
    "dataset.max_length=2",
    "dataset.overlength=drop",
)
row(
    "another format named", ROW, "the field 'instruction' is missing (format instruction)", "dataset.format=instruction"
)
row("a column that no row has", ROW, "no row has q, which `columns` renames", "dataset.columns={q: human}")
row("sharegpt with an unknown speaker", {"conversations": [{"from": "x", "value": "a"}]}, "train.jsonl:1: ")
row("history that is no pair", {"query": "a", "response": "b", "history": [["c"]]}, "train.jsonl:1: ")
row("a prompt of numbers", {"prompt": [1], "completion": [2]}, "train.jsonl:1: ")

# ---------------------------------------------------------------------------------------------------------- JSON arrays


def array(name: str, content: Content, says: str | None, **more: Any) -> None:
    data("train.json", name, content, says, **more)


array("an open array", "[" + GOOD, "train.json: begins as a JSON array and is not one: Expecting ',' or ']' (row 1")
array("an array of nothing", "[ ]", "train.json: is empty; rows are needed")
array("an array of arrays", "[[1], [2]]", "train.json:1: no format fits a list")
array("text behind the array", "[" + GOOD + "] x", "has more text after the end of its JSON array, after row 1")
array("a wrong second element", "[" + GOOD + ", {'a': 1}]", "(row 2, line 2)")
array("a comma too many", "[" + GOOD + ",]", "begins as a JSON array and is not one")
array("10,000-deep", "[" + '{"a": [' * DEEP, "train.json: row 1 is JSON nested too deep to read")
array("duplicate keys", '[{"human": "a", "human": "b"}]', "train.json: row 1 has the key 'human' twice")
array("NaN", '[{"human": NaN}]', "train.json: row 1 holds NaN, which is no number of JSON")
array("a lone surrogate", '["\\ud800"]', "train.json:1: holds half of a surrogate pair")
array("GBK", '[{"a": "你好"}]'.encode("gbk"), "is not UTF-8 (byte 0xc4)")
array("a text of 100 MB without an end", lambda _: b'["' + b"a" * (100 * MIB), "row 1 is longer than 16 MiB")
array("40 MB of spaces", lambda _: b" " * (40 * MIB), "train.json:1: is longer than 16 MiB")
array("40 MB of spaces in an array", lambda _: b"[" + b" " * (40 * MIB), "train.json: ")
array("one object with the rows", json.dumps({"data": [ROW]}), "no format fits the fields data")
array("BOM before an array", b"\xef\xbb\xbf \n[" + GOOD.encode() + b"]\r\n", None)

# -------------------------------------------------------------------------------------------------------------- tables


def table(name: str, content: Content, says: str | None, file: str = "train.csv", **more: Any) -> None:
    data(file, name, content, says, **more)


HEAD = "human,assistant\n"
table("empty", b"", "train.csv: is empty; rows are needed")
table("a header alone", HEAD, "train.csv: is empty; rows are needed")
table(
    "semicolons",
    "human;assistant\na;b\n",
    "with ';' in it; separate columns with commas",
)
table(
    "commas in a .tsv",
    HEAD + "a,b\n",
    "with ',' in it; separate columns with tabs",
    "train.tsv",
)
table("two columns of one name", "human,human\na,b\n", "two columns are called 'human'; rename one")
table("too many cells", HEAD + "a,b,c\n", "train.csv:1: has 3 cells, and the header has 2")
table("an open quote", HEAD + 'a,"b\n', "a quoted cell has no end")
table("text behind a quote", HEAD + '"a"b,c\n', "train.csv: cannot be read: ',' expected after '\"'")
table(
    "an open quote and 40 MB", lambda _: (HEAD + 'a,"').encode() + b"b\n" * (20 * MIB), "a cell is longer than 16 MiB"
)
table("UTF-16, as Excel writes it", (HEAD + "a,b\n").encode("utf-16"), "train.csv: is UTF-16, not UTF-8")
table("GBK", (HEAD + "你,好\n").encode("gbk"), "is not UTF-8 (byte 0xc4)")
table("an .xlsx", b"PK\x03\x04" + bytes(30), "train.csv: is a zip file, as .xlsx and .docx are")
table("NUL all through", bytes(100), "train.csv: holds NUL bytes and is no text")
table(
    "an answer that is empty",
    HEAD + "a,\n",
    "train.csv:1: no format fits the fields human; of human_assistant assistant is missing",
)
table("a header of numbers", "1,2\na,b\n", "train.csv:1: no format fits the fields 1, 2")
table("JSON lines", GOOD, "train.csv: ")
table("100,000 columns", ",".join(f"c{i}" for i in range(100_000)) + "\n1\n", "the header has 100000")
table("an escape sequence in the header", "\x1b[2J,\x1b[2J\na,b\n", r"two columns are called '\x1b[2J'; rename one")
table("BOM, CRLF and line breaks in cells", b'\xef\xbb\xbfhuman,assistant\r\n"a\r\nb",c\r\n\r\n', None)

# ------------------------------------------------------------------------------------------------------------- Parquet


def parquet(name: str, content: Content | pa.Table, says: str | None, **more: Any) -> None:
    if isinstance(content, pa.Table):
        stream = io.BytesIO()
        pq.write_table(content, stream)
        content = stream.getvalue()
    data("train.parquet", name, content, says, **more)


def columns(human: Any, assistant: Any) -> pa.Table:
    return pa.table({"human": human, "assistant": assistant})


def as_parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


SOUND = as_parquet(columns(["a"], ["b"]))
parquet("empty", b"", "train.parquet: cannot be read: ")
parquet("JSON lines", GOOD, "train.parquet: cannot be read: ")
parquet("its magic alone", b"PAR1", "train.parquet: cannot be read: ")
parquet("a footer that lies", b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1", "train.parquet: cannot be read: ")
parquet("rubbish between the magics", b"PAR1" + b"\xff" * 100 + struct.pack("<I", 50) + b"PAR1", "cannot be read: ")
parquet("rubbish in the pages", SOUND[:4] + b"\xff" * 60 + SOUND[64:], "train.parquet: cannot be read")
parquet("no rows", columns(pa.array([], pa.string()), pa.array([], pa.string())), "train.parquet: is empty")
parquet("no columns", pa.table({}), "train.parquet: is empty")
parquet("numbers", columns([1.5], [2]), "train.parquet:1: the field 'human' is a number, not text")
parquet("NaN", columns([float("nan")], ["b"]), "train.parquet:1: the field 'human' is a number, not text")
parquet("bytes", columns([b"\xff"], [b"b"]), "train.parquet:1: the field 'human' is bytes, not text")
parquet("dates", columns([datetime.date(2024, 1, 1)], ["b"]), "train.parquet:1: the field 'human' is date, not text")
parquet("nulls", columns(["a"], pa.array([None], pa.string())), "train.parquet:1: ")
parquet(
    "text that is not UTF-8",
    SOUND.replace(b"\x01\x00\x00\x00a", b"\x01\x00\x00\x00\xff"),
    "is not UTF-8",
)
parquet("two columns of one name", pa.Table.from_arrays([pa.array(["a"])] * 2, ["human", "human"]), "train.parquet: ")
parquet("unknown columns", pa.table({"q": ["a"]}), "train.parquet:1: no format fits the fields q")

# -------------------------------------------------------------------------------------------------------------- packed


def packed(file: str, name: str, content: Content, says: str | None, **more: Any) -> None:
    data(file, f"{file}: {name}", content, says, **more)


def gzip_of(piece: bytes, mib: int) -> bytes:
    """So many MiB of a piece in a few KB."""
    return gzip.compress(piece * MIB) * (mib // len(piece))


packed("train.jsonl.gz", "empty", b"", "train.jsonl.gz: is empty")
packed("train.jsonl.gz", "not gzip", GOOD, "train.jsonl.gz: cannot be read: ")
packed(
    "train.jsonl.gz",
    "a gzip in a gzip",
    gzip.compress(gzip.compress(GOOD.encode())),
    "train.jsonl.gz: is packed with",
)
packed(
    "train.jsonl.gz",
    "rubbish behind the end",
    gzip.compress(GOOD.encode()) + b"rubbish",
    "cannot be read: Not a gzipped file",
)
packed("train.jsonl.gz", "a header alone", gzip.compress(b"")[:10], "train.jsonl.gz: cannot be read: ")
packed("train.jsonl.gz", "UTF-16", gzip.compress(GOOD.encode("utf-16")), "train.jsonl.gz: is UTF-16, not UTF-8")
packed(
    "train.jsonl.gz", "a bomb of zeros", lambda _: gzip_of(b"\0", 128), "train.jsonl.gz: holds NUL bytes and is no text"
)
packed("train.jsonl.gz", "a bomb of one line", lambda _: gzip_of(b"a", 128), "train.jsonl.gz:1: is longer than 16 MiB")
packed("train.jsonl.gz", "a bomb of line ends", lambda _: gzip_of(b"\n", 128), "unpacks to more than 300 times as much")
packed("train.csv.gz", "a bomb of commas", lambda _: gzip_of(b",", 128), "train.csv.gz:1: is longer than")
packed(
    "train.json.gz", "a bomb of brackets", lambda _: gzip_of(b"[", 128), "train.json.gz: row 1 is JSON nested too deep"
)
packed(
    "train.json.gz",
    "a bomb of spaces in an array",
    lambda _: gzip.compress(b"[") + gzip_of(b" ", 128),
    "train.json.gz: ",
)
packed("train.jsonl.gz", "a bomb of 10 GiB", lambda _: gzip_of(b"\n", 10 * 1024), "300 times as much", heavy=True)
packed("train.jsonl.zst", "empty", b"", "train.jsonl.zst: ")
packed("train.jsonl.zst", "not zstd", GOOD, "train.jsonl.zst: cannot be read: ")
packed(
    "train.jsonl.zst",
    "a bomb of line ends",
    lambda _: zstd.compress(b"\n" * (128 * MIB)),
    "more than 300 times as much",
)
packed(
    "train.jsonl.zst", "a window of 2 GiB", b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(20), "train.jsonl.zst: cannot be read"
)

# --------------------------------------------------------------------------------------------------------- model folder


def model(
    name: str, file: str, content: Content, says: str | None, *arguments: str, reader: str = "model folder"
) -> None:
    add(reader, name, says, {f"model/{file}": content}, *arguments)


def changed(**values: Any) -> Callable[[bytes], bytes]:
    """A JSON file with other values."""
    return lambda old: json.dumps(json.loads(old) | values).encode()


CONFIG, WEIGHTS = "config.json", "model.safetensors"
NO_CONFIG = "recipe.yaml:1: model_name_or_path: its configuration (config.json) does not load: "
NO_MODEL = "recipe.yaml:1: model_name_or_path: is no causal language model: "
CUT_OFF = "recipe.yaml:1: model_name_or_path: model does not load: model.safetensors is damaged; fetch it again"
NO_WEIGHTS = "recipe.yaml:1: model_name_or_path: does not load: "
model("no config.json", CONFIG, None, "the folder model holds no config.json; it is not a model")
model("an empty config.json", CONFIG, b"", NO_CONFIG)
model("a config.json that is no JSON", CONFIG, "{", NO_CONFIG)
model("a config.json that is a list", CONFIG, "[]", NO_CONFIG)
model(
    "a config.json in UTF-16",
    CONFIG,
    lambda old: old.decode().encode("utf-16"),
    NO_CONFIG,
)
model(
    "a config.json with a BOM",
    CONFIG,
    lambda old: b"\xef\xbb\xbf" + old,
    NO_CONFIG,
)
model(
    "a 10,000-deep config.json",
    CONFIG,
    '{"a": ' + "[" * DEEP + "]" * DEEP + "}",
    NO_CONFIG,
)
model("no model_type", CONFIG, "{}", NO_CONFIG)
model("an unknown model_type", CONFIG, changed(model_type="qwen99"), NO_CONFIG)
model(
    "a model_type that is a list",
    CONFIG,
    changed(model_type=["qwen2"]),
    NO_CONFIG,
)
model("a model that writes no text", CONFIG, '{"model_type": "vit"}', NO_MODEL)
model("a negative number of layers", CONFIG, changed(num_hidden_layers=-1), NO_CONFIG)
model("layers that are text", CONFIG, changed(num_hidden_layers="two"), NO_CONFIG)
model("a hidden size of 0", CONFIG, changed(hidden_size=0), NO_MODEL)
model("heads that are null", CONFIG, changed(num_attention_heads=None), NO_CONFIG)
model("heads that are 0", CONFIG, changed(num_attention_heads=0), NO_MODEL)
model(
    "another number of layers",
    CONFIG,
    changed(num_hidden_layers=3, layer_types=None),
    "its files lack 24 of the weights",
)
model("a huge hidden size", CONFIG, changed(hidden_size=2**40), NO_MODEL)
model("an unknown activation", CONFIG, changed(hidden_act="nosuch"), NO_MODEL)
model("an unknown dtype", CONFIG, changed(dtype="float99"), NO_CONFIG)
model("remote code", CONFIG, changed(model_type="mine", auto_map={"AutoConfig": "a--b.C"}), "trust_remote_code")
model("no weights", WEIGHTS, None, NO_WEIGHTS)
model("empty weights", WEIGHTS, b"", CUT_OFF)
model("weights that are text", WEIGHTS, b"weights\n" * 10, CUT_OFF)
model("a header of 2 ** 60 bytes", WEIGHTS, struct.pack("<Q", 2**60) + b"{}", CUT_OFF)
model(
    "weights of another model",
    WEIGHTS,
    safetensors({"a": np.zeros(2)}),
    "its files lack 15 of the weights",
)
model(
    "weights of another shape",
    WEIGHTS,
    safetensors({"model.embed_tokens.weight": np.zeros((3, 3), np.float32)}),
    NO_WEIGHTS,
)
model(
    "a git-lfs pointer", WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"
)


def pickled(name: str, content: Content, says: str, *arguments: str) -> None:
    files: dict[str, Content] = {f"model/{WEIGHTS}": None, "model/pytorch_model.bin": content}
    add("model folder", name, says, files, *arguments)


NAMED = "model_init.use_safetensors=false"
NOT_RUN = "does not load: a pickle is broken or would run code; it was read as weights only, and nothing was run"
pickled(
    "weights that are a pickle",
    lambda _: torch_saved({}),
    "its weights are a pickle; to read it, as weights only, set model_init",
)
pickled("a hostile pickle that is named", EVIL, NOT_RUN, NAMED)
pickled("a hostile pickle in a zip that is named", evil_zip, NOT_RUN, NAMED)
pickled("a pickle that is none", b"weights", NOT_RUN, NAMED)
add(
    "model folder",
    "an index that points out of the folder",
    NO_WEIGHTS,
    {
        f"model/{WEIGHTS}": None,
        "model/model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "../secret.safetensors"}, "metadata": {}}
        ),
        "secret.safetensors": safetensors({"a": np.zeros(2)}),
    },
)
add(
    "model folder",
    "a file",
    "model.bin is a file; give the folder",
    {"model.bin": b"a"},
    "model_name_or_path=model.bin",
)

# ------------------------------------------------------------------------------------------------------------ tokenizer


def tokenizer(name: str, file: str, content: Content, says: str, *arguments: str) -> None:
    model(name, file, content, says, *arguments, reader="tokenizer")


TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
NO_TOKENIZER = "model_name_or_path: its tokenizer does not load: "


def vocabulary(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """tokenizer.json after a change of its JSON."""

    def changed_file(old: bytes) -> bytes:
        state = json.loads(old)
        change(state)
        return json.dumps(state).encode()

    return changed_file


tokenizer("no tokenizer.json", TOKENIZER, None, "its tokenizer knows no text; its tokenizer.json is missing")
tokenizer("an empty tokenizer.json", TOKENIZER, b"", NO_TOKENIZER)
tokenizer("a tokenizer.json that is no JSON", TOKENIZER, "{", NO_TOKENIZER)
tokenizer("a tokenizer.json that is a list", TOKENIZER, "[]", NO_TOKENIZER)
tokenizer("a tokenizer.json of nothing", TOKENIZER, "{}", NO_TOKENIZER)
tokenizer("a tokenizer.json in UTF-16", TOKENIZER, lambda old: old.decode().encode("utf-16"), NO_TOKENIZER)
tokenizer("a 10,000-deep tokenizer.json", TOKENIZER, "[" * DEEP + "]" * DEEP, NO_TOKENIZER)
tokenizer(
    "merges of unknown tokens", TOKENIZER, vocabulary(lambda s: s["model"].update(merges=[["€€", "xx"]])), NO_TOKENIZER
)
tokenizer("an unknown model", TOKENIZER, vocabulary(lambda s: s["model"].update(type="Nosuch")), NO_TOKENIZER)
tokenizer("a vocabulary of text", TOKENIZER, vocabulary(lambda s: s["model"].update(vocab="a")), NO_TOKENIZER)
tokenizer("ids beyond the model's vocabulary", CONFIG, changed(vocab_size=10), "vocabulary has 10; these do not fit")
NAMED_TWICE = [{"name": "default", "template": CHATML}, {"name": "../../a", "template": CHATML}]
add(
    "tokenizer",
    "a template that is called as a file elsewhere",
    "its tokenizer names a chat template '../../a', which is no name of a file",
    {f"model/{SETTINGS}": changed(chat_template=NAMED_TWICE), "model/chat_template.jinja": None},
)
tokenizer("settings that are no JSON", SETTINGS, "{", NO_TOKENIZER)
tokenizer("settings that are a list", SETTINGS, "[]", NO_TOKENIZER)
tokenizer("an end that is a number", SETTINGS, changed(eos_token=5), NO_TOKENIZER)
tokenizer("an end that is a list", SETTINGS, changed(eos_token=["a"]), NO_TOKENIZER)
tokenizer("no template", "chat_template.jinja", None, "its tokenizer has no chat template; give one with chat.template")

# ------------------------------------------------------------------------------------------------------------- template


def template(name: str, content: Content, says: str | None, **more: Any) -> None:
    """chat.template, a file of the user's; the model's own goes the same way."""
    add("template", name, says, {"chat.jinja": content}, "chat.template=chat.jinja", **more)


STEPS = "takes more steps than"
NOT_JINJA = "chat.template=chat.jinja: the chat template is no Jinja template: line 1: "
TOO_DEEP = "the chat template is no Jinja template that can be run: it is nested too deep"
REFUSES = "train.jsonl:1: the chat template refuses this conversation: "
NOT_WRITTEN = "train.jsonl:1: the chat template does not write the content of message 2 exactly once"
TOO_LONG = "chat.jinja has more than 262,144 characters; no chat template has"
add("template", "missing", "there is no file x.jinja", {}, "chat.template=x.jinja")
template("empty", b"", "chat.jinja is empty; give the .jinja file of a chat template")
template("not UTF-8", b"\xff\xfe\x00", "chat.jinja is not UTF-8")
template("a tag without an end", "{% for m in messages %}", NOT_JINJA)
template("an unknown tag", "{% nosuch %}", NOT_JINJA)
template("an unknown filter", "{{ messages | nosuch }}", NOT_JINJA)
template("a file that it includes", "{% include '/etc/passwd' %}", NOT_JINJA)
template("a template that it extends", "{% extends '/etc/passwd' %}", NOT_JINJA)
template("brackets 10,000 deep", "{{ " + "(" * DEEP + "1" + ")" * DEEP + " }}", TOO_DEEP)
template("loops 100 deep", "{% for a in messages %}" * 100 + "{% endfor %}" * 100, TOO_DEEP)
template("10 MB of text", lambda _: b"a" * (10 * MIB), TOO_LONG)
template("10 MB of expressions", lambda _: b"{{ 1 }}" * (10 * MIB // 7), TOO_LONG)
template("one answer for all", "Hello.", NOT_WRITTEN)
template("nothing of the messages", "{% for m in messages %}{{ m.role }}{% endfor %}", NOT_WRITTEN)
template("a name that is not there", "{{ nosuch.a }}", REFUSES)
template("an error of its own", "{{ raise_exception('no\\x1b[2J') }}", "refuses ")
template("a loop of 10 ** 9", "{% for a in range(10 ** 9) %}{% endfor %}", "Range too big")
template("loops in loops", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", STEPS)
template("loops that write", "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}", STEPS)
template(
    "a macro that calls itself",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls itself without an end, or too deep",
)
template(
    "a macro that calls itself twice",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    STEPS,
)
template("a text of 10 GB", "{{ 'a' * 10 ** 10 }}", STEPS)
template("a padded text of 10 GB", "{{ 'a'.center(10 ** 10) }}", STEPS)
template("a filter that pads to 10 GB", "{{ 'a' | center(10000000000) }}", STEPS)
template("a formatted text of 10 GB", "{{ '%9999999999d' % 1 }}", STEPS)
template("a formatted text of 10 GB, by a method", "{{ '{:>9999999999}'.format(1) }}", STEPS)
template("a replaced text of 10 GB", "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}", STEPS)
template("a power without an end", "{{ 9 ** 9 ** 9 ** 9 }}", STEPS)
template(
    "a text that doubles",
    "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    STEPS,
)
template(
    "a block that doubles",
    "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set b %}{{ n.a ~ n.a }}{% endset %}"
    "{% set n.a = b %}{% endfor %}",
    STEPS,
)
template("ten million words of rubbish", "{{ lipsum(n=1000000) }}", REFUSES)
template("Python's insides", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe")
template("Python's insides, by format", "{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe")
template("BOM and CRLF", b"\xef\xbb\xbf" + CHATML.replace("%}{", "%}\r\n{").encode(), None)

# -------------------------------------------------------------------------------------------------------------- adapter


def adapter(name: str, file: str, content: Content, says: str, *more: str) -> None:
    arguments = "adapter_name_or_path=adapter", "lora_config=null", "output_dir=new", *more
    add("adapter", name, says, {f"adapter/{file}": content}, *arguments, needs="run")


LORA, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = "override adapter_name_or_path=adapter: "
adapter("no adapter_config.json", LORA, None, "the folder adapter holds no adapter_config.json; it is not an adapter")
adapter("an empty adapter_config.json", LORA, b"", ADAPTER)
adapter("no JSON", LORA, "{", ADAPTER)
adapter("a list", LORA, "[]", ADAPTER)
adapter("nothing", LORA, "{}", ADAPTER)
adapter("UTF-16", LORA, lambda old: old.decode().encode("utf-16"), ADAPTER)
adapter("an unknown type", LORA, changed(peft_type="NOSUCH"), ADAPTER)
adapter("another kind of adapter", LORA, '{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}', ADAPTER)
adapter("a rank of -1", LORA, changed(r=-1), ADAPTER)
adapter("a rank that is text", LORA, changed(r="two"), ADAPTER)
adapter("modules that the model has not", LORA, changed(target_modules=["query"]), ADAPTER)
adapter("another rank than its weights", LORA, changed(r=3), ADAPTER)
adapter("no weights", LORA_WEIGHTS, None, ADAPTER)
adapter("empty weights", LORA_WEIGHTS, b"", ADAPTER)
adapter("weights that are text", LORA_WEIGHTS, b"weights\n" * 10, ADAPTER)
adapter("weights of another adapter", LORA_WEIGHTS, safetensors({"a": np.zeros(2)}), ADAPTER)
add(
    "adapter",
    "a pickle",
    "its weights are a pickle; to read it, as weights only, set model_init",
    {f"adapter/{LORA_WEIGHTS}": None, "adapter/adapter_model.bin": EVIL},
    "adapter_name_or_path=adapter",
    "lora_config=null",
    "output_dir=new",
    needs="run",
)

# ----------------------------------------------------------------------------------------------------------- checkpoint


def checkpoint(name: str, file: str, content: Content, says: str, *more: str) -> None:
    arguments = "training_args.max_steps=3", "resume_from_checkpoint=out/checkpoint-1", *more
    unsealed = {"out/checkpoint-1/checksums.json": None}  # by which any change would be told already
    add("checkpoint", name, says, {**unsealed, f"out/{file}": content}, *arguments, needs="run")


RESUME = "error: out/checkpoint-1 does not load: "
DAMAGED = "out/checkpoint-1 cannot be gone on from: "  # by the formats of its files
OTHER = "error: out/checkpoint-1 is another model's: it lacks 4 weights"
STATE = "out/checkpoint-1/trainer_state.json is none of a run"
checkpoint("missing", "x", b"", "there is no checkpoint out/checkpoint-7", "resume_from_checkpoint=out/checkpoint-7")
checkpoint("a file", "x", b"", "there is no checkpoint out/x", "resume_from_checkpoint=out/x")
checkpoint("no trainer_state.json", "checkpoint-1/trainer_state.json", None, "is not a whole checkpoint")
checkpoint("a state that is no JSON", "checkpoint-1/trainer_state.json", "{", "is not a whole checkpoint")
checkpoint("a state that is a list", "checkpoint-1/trainer_state.json", "[]", STATE)
checkpoint("a state of nothing", "checkpoint-1/trainer_state.json", "{}", STATE)
checkpoint("a step that is text", "checkpoint-1/trainer_state.json", changed(global_step="one"), STATE)
checkpoint("a step of -5", "checkpoint-1/trainer_state.json", changed(global_step=-5), STATE)
checkpoint("no weights", "checkpoint-1/adapter_model.safetensors", None, RESUME)
checkpoint("weights that are text", "checkpoint-1/adapter_model.safetensors", b"weights\n" * 10, DAMAGED)
checkpoint(
    "weights of another model",
    "checkpoint-1/adapter_model.safetensors",
    safetensors({"a": np.zeros(2)}),
    OTHER,
)
checkpoint("an optimizer that is a hostile pickle", "checkpoint-1/optimizer.pt", evil_zip, RESUME)
checkpoint("an optimizer that is text", "checkpoint-1/optimizer.pt", b"optimizer", DAMAGED)
checkpoint("random numbers that are a hostile pickle", "checkpoint-1/rng_state.pth", evil_zip, RESUME)
checkpoint("a schedule that is a hostile pickle", "checkpoint-1/scheduler.pt", EVIL, DAMAGED)
checkpoint(
    "a description that is no JSON", "training_config.json", "{", "training_config.json is not JSON that a run wrote"
)
checkpoint(
    "a description that is a list", "training_config.json", "[]", "training_config.json is not JSON that a run wrote"
)
checkpoint(
    "a recipe that is a list",
    "training_config.json",
    changed(recipe=[]),
    "training_config.json is not JSON that a run wrote",
)

# ------------------------------------------------------------------------------------------------- paths and data sets


def path(name: str, train: str, says: str, files: dict[str, Content] | None = None) -> None:
    add("path of data", name, says, files or {}, f"dataset.train={train}")


path("a directory", "model", "model is a directory; name its files, e.g. model/*.jsonl")
path("no such ending", "a.txt", "a.txt has no ending of a file that can be read: .jsonl", {"a.txt": GOOD})
path("no match", "'*.jsonx'", "no file matches *.jsonx (working directory: ")
path("a file named twice", "[train.jsonl, ./train.jsonl]", "names train.jsonl twice; give it a weight")
path("a split of a file", "{path: train.jsonl, split: test}", "train.jsonl is a file: it has no subset and no split")
path("a split of a folder without data", "{path: model, split: x}", "datasets.load_dataset cannot read this folder")

# -------------------------------------------------------------------------------------------------------------- running

SECONDS, MEMORY = 20, 512 * MIB  # what one input may take at most; the heavy ones are held to the same
LONGEST = 6000  # characters of an answer: twenty bad rows, each with a file name


def make_base(folder: Path) -> None:
    """A tiny model in folder/model, and in folder/out what a run of one step left."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import run_sft
    from tests.families import FAMILIES, build

    tokenizer = build(FAMILIES["qwen2_5"], "bytes")
    tokenizer.chat_template = CHATML
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "train.jsonl").write_text(GOOD, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run_sft.main(["recipe.yaml", "training_args.save_steps=1"]) == 0
    finally:
        os.chdir(before)


def lay_out(case: Garbage, base: Path, folder: Path) -> None:
    """The working folder of a case: what `make_base` made, with the files of the case in it."""
    shutil.copytree(base / "model", folder / "model")
    if case.needs == "run":
        shutil.copytree(base / "out", folder / "out")
        shutil.copytree(base / "out/lora_adapter", folder / "adapter")
    for name in ("recipe.yaml", "train.jsonl"):
        shutil.copyfile(base / name, folder / name)
    for name, content in case.files.items():
        file = folder / name
        if callable(content):
            content = content(file.read_bytes() if file.exists() else b"")
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def arguments_of(case: Garbage) -> list[str]:
    return ["recipe.yaml", *case.arguments, *(["--check"] if case.says is None else [])]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Each folder below, and each file with its size and the time of its last change."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.stat()
        found[str(path.relative_to(folder))] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return found


def faults(case: Garbage, code: object, message: str, left: list[str]) -> list[str]:
    """What is wrong with an answer; of a right one, nothing.

    Args: code: the exit code, or what was raised. message: all of stderr. left: what the run changed in its folder.
    """
    found = [f"left {left}"] if left else []
    if code != (0 if case.says is None else 2):
        found.append(f"ended with {code!r}")
    if case.says is None:
        return found + ([f"said {message}"] if message else [])
    if not message.startswith("error: ") or message.count("\nerror: "):
        found.append("is not one message")
    if "Traceback" in message or "Error:" in message:
        found.append("is a traceback")
    if len(message) > LONGEST:
        found.append(f"has {len(message)} characters")
    if not all(c.isprintable() or c == "\n" for c in message):
        found.append("holds control characters")
    if case.says not in message:
        found.append(f"does not say {case.says!r}")
    return found
