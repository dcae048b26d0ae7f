"""Files of every type: the same rows come out of each, and what is wrong is said with file and row."""

import csv
import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path

import datasets
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given

from sft.data import rows
from sft.data.rows import HubDataset, count_rows, read_rows
from sft.errors import DataError, FormatError, RecipeError
from tests.data.conftest import talk, texts, write

TURN = {"query": "1", "response": "2"}
SKIP = ["dataset.on_error=skip", "dataset.max_lost=1"]


def json_lines(values):
    return "".join(f"{json.dumps(value)}\n" for value in values).encode()


def table(values, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(values[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue().encode()


def parquet(values):
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values), stream)
    return stream.getvalue()


WRITERS = {
    "a.jsonl": json_lines,
    "a.json": lambda values: json.dumps(values, indent=1).encode(),
    "lines.json": json_lines,
    "a.csv": table,
    "a.tsv": lambda values: table(values, "\t"),
    "a.parquet": parquet,
    "a.jsonl.gz": lambda values: gzip.compress(json_lines(values)),
    "a.jsonl.zst": lambda values: zstd.compress(json_lines(values)),
    "a.csv.gz": lambda values: gzip.compress(table(values)),
    "a.JSONL.GZ": lambda values: gzip.compress(json_lines(values)),
    "a.Parquet": parquet,
    "[a] *.parquet": parquet,
}


def read(name, content):
    Path(name).write_bytes(content)
    return list(read_rows(Path(name)))


# ----------------------------------------------------------------------------------------------------- the same rows


@pytest.mark.parametrize("name", WRITERS)
def test_every_type_of_file_gives_the_same_rows(run, tokenizer, name):
    values = [TURN, {"query": '3,\t"x"', "response": "4\n5"}, {"query": "6", "response": "7"}]
    Path(name).write_bytes(WRITERS[name](values))
    source = json.dumps(name)
    data = run(f"dataset.train={source}", f"dataset.test={source}")
    assert data.files[0].rows["line"] == [1, 2, 3]
    assert [place for place, _ in data.test_conversations] == [f"{name}:{i}" for i in (1, 2, 3)]
    said = [[message["content"] for message in c.messages[1:]] for _, c in data.test_conversations]
    assert said == [["1", "2"], ['3,\t"x"', "4\n5"], ["6", "7"]]
    assert data.ledger["files"][0]["format"] == "query_response"
    stream = run(f"dataset.train={source}", "dataset.streaming=true", "training_args.max_steps=1").train
    assert [row["input_ids"] for row in stream] == data.train["input_ids"]


def test_the_same_bytes_under_another_ending_are_read_anew(run, tokenizer):
    said = []
    for name in ("a.csv", "a.tsv"):
        Path(name).write_bytes(b"query,response,a\tquery\tresponse\n1,2,3\t4\t5\n")
        said += texts(tokenizer, run(f"dataset.train={name}").train)
    assert [text.replace("<|im_end|>", "") for text in said] == ["S 1 2", "S 4 5"]


def test_rows_are_counted_beforehand_where_that_is_told_in_a_moment(empty_folder):
    for name, content in {"a.jsonl": b"{}\n" * 3, "a.parquet": parquet([TURN] * 4), "b.parquet": b"PAR1"}.items():
        Path(name).write_bytes(content)
    names = ("a.jsonl", "a.parquet", "b.parquet", "nosuch.jsonl", "a.csv")
    assert [count_rows(Path(name)) for name in names] == [3, 4, None, None, None]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd.compress], ids=["plain", "gz", "zst"])
def test_lines_of_json_lines_are_those_of_the_unpacked_file(empty_folder, pack):
    ending = {bytes: "", gzip.compress: ".gz", zstd.compress: ".zst"}[pack]
    found = read(f"a.jsonl{ending}", pack(b'\xef\xbb\xbf\n{"a": 1}\r\n\n{\n{"a": 2}'))
    assert [number for number, _ in found] == [2, 4, 5]
    assert found[0][1] == {"a": 1} and isinstance(found[1][1], FormatError) and found[2][1] == {"a": 2}


# ------------------------------------------------------------------------------------------------------------- endings


@pytest.mark.parametrize("name", ["a.txt", "a", "a.parquet.gz", "a.xlsx", "a.gz", "jsonl"])
def test_another_ending_is_an_error_that_lists_the_known_ones(run, name):
    write(name, talk("1", "2"))
    with pytest.raises(RecipeError) as caught:
        run(f"dataset.train={name}")
    known = ".jsonl, .json, .parquet, .csv, .tsv, and each but .parquet with .gz or .zst after it"
    assert str(caught.value).endswith(f"={name}: {name} has no ending of a file that can be read: {known}")


# ------------------------------------------------------------------------------------------------------------- packed

PACKED = gzip.compress(json_lines([TURN] * 2000)), zstd.compress(json_lines([TURN] * 2000))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", PACKED[0][:-20], "ended before the end-of-stream marker"),
        ("a.jsonl.gz", b"hello", "Not a gzipped file"),
        ("a.jsonl.gz", PACKED[0][:30] + b"zzzz" + PACKED[0][34:], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.zst", PACKED[1][:-20], "ended before the end-of-stream marker"),
        ("a.jsonl.zst", b"hello world", "Unable to decompress Zstandard data"),
        ("a.csv.gz", b"hello", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b" \n"), "a.jsonl.gz: is empty"),
        ("a.jsonl.zst", b"", "a.jsonl.zst: "),
    ],
    ids=["cut gz", "no gz", "broken gz", "cut zst", "no zst", "no csv.gz", "empty gz", "empty zst"],
)
def test_a_broken_compressed_file_is_one_clear_error(run, name, content, reason):
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        run(f"dataset.train={name}", *SKIP)
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- JSON arrays

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
)


@given(st.lists(json_values, min_size=1), st.integers(2, 40), st.sampled_from([None, 0, 1]), st.booleans())
def test_an_array_gives_its_elements_wherever_the_pieces_are_cut(values, chunk, indent, ascii):
    text = f" \n{json.dumps(values, indent=indent, ensure_ascii=ascii)}\n "
    before, rows.ARRAY_CHUNK = rows.ARRAY_CHUNK, chunk
    try:
        found = list(rows._array_elements(Path("a.json"), io.StringIO(text)))
    finally:
        rows.ARRAY_CHUNK = before
    assert found == values


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"a": 1},\n{"a": }]', "Expecting value (row 2, line 2)"),
        (b'[{"a": 1}\n{"a": 2}]', "Expecting ',' or ']' (row 1, line 2)"),
        (b'[{"a": 1},', "Expecting value (row 2, line 1)"),
        (b'[{"a": 1}', "Expecting ',' or ']' (row 1, line 1)"),
        (b'[{"a": "1', "Unterminated string starting at (row 1, line 1)"),
        (b'[{"a": 1},]', "Expecting value (row 2, line 1)"),
        (b"[", "Expecting value (row 1, line 1)"),
    ],
)
def test_a_broken_array_is_an_error_with_its_row_and_line(empty_folder, monkeypatch, content, reason):
    for chunk in (4, 2**20):
        monkeypatch.setattr(rows, "ARRAY_CHUNK", chunk)
        with pytest.raises(DataError) as caught:
            read("a.json", content)
        assert str(caught.value) == f"a.json: begins as a JSON array and is not one: {reason}"


def test_what_follows_an_array_is_not_lost_in_silence(empty_folder):
    with pytest.raises(DataError, match="^a.json: has more text after the end of its JSON array, after row 1$"):
        read("a.json", b'[{"a": 1}]\n[{"a": 2}]')
    with pytest.raises(DataError, match="^a.json: is empty"):
        read("a.json", b"[ ]")
    with pytest.raises(DataError, match="^a.json: row 2 is JSON nested too deep"):
        read("a.json", b"[1, " + b"[" * 100_000)
    with pytest.raises(DataError, match="^a.json: cannot be read.*: is not UTF-8"):
        read("a.json", '[{"a": "你好"}]'.encode("gbk"))


def test_an_error_early_in_a_large_array_does_not_read_it_all(empty_folder, monkeypatch):
    monkeypatch.setattr(rows, "ARRAY_CHUNK", 1000)
    text = io.StringIO('[{"a": 1}, {"a" 2},' + '{"a": 3},' * 10_000)
    with pytest.raises(DataError, match="Expecting ':' delimiter"):
        list(rows._array_elements(Path("a.json"), text))
    assert text.tell() == 1000


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_table_may_have_a_byte_order_mark_blanks_in_its_header_quoted_line_breaks_and_empty_cells(empty_folder):
    content = b'\xef\xbb\xbfquery,response , system,history\r\n"1\n1",2,,\r\n\r\n3,4,S,"[[""5"", ""6""]]"\r\n'
    assert read("a.csv", content) == [
        (1, {"query": "1\n1", "response": "2"}),
        (2, {"query": "3", "response": "4", "system": "S", "history": '[["5", "6"]]'}),
    ]


def test_the_history_of_a_table_is_json(run, tokenizer):
    Path("a.csv").write_bytes(table([{**TURN, "history": '[["5", "6"]]'}, {**TURN, "history": ""}]))
    said = [text.replace("<|im_end|>", "") for text in texts(tokenizer, run("dataset.train=a.csv").train)]
    assert said == ["S 5 6 1 2", "S 1 2"]
    Path("a.csv").write_bytes(table([{**TURN, "history": "5; 6"}]))
    with pytest.raises(DataError, match="^a.csv:1: the field 'history' is text, not a list"):
        run("dataset.train=a.csv")


def test_cells_stay_text_whatever_they_look_like(empty_folder):
    assert read("a.csv", b"query,response\n1,NA\nnull,1e5\n") == [
        (1, {"query": "1", "response": "NA"}),
        (2, {"query": "null", "response": "1e5"}),
    ]


def test_a_row_with_a_missing_answer_or_too_many_cells_is_a_bad_row(run):
    Path("a.csv").write_bytes(b"query,response\n1,2\n1,\n1,2,3\n1\n1,2\n")
    data = run("dataset.train=a.csv", *SKIP)
    assert data.ledger["files"][0]["dropped"] == {"bad row": [2, 3, 4]}
    with pytest.raises(DataError) as caught:
        run("dataset.train=a.csv")
    assert str(caught.value).splitlines()[:3] == [
        "a.csv:2: the field 'response' is missing (format query_response)",
        "a.csv:3: has 3 cells, and the header has 2",
        "a.csv:4: has 1 cells, and the header has 2",
    ]


def test_a_long_cell_is_read(empty_folder):
    ((_, row),) = read("a.csv", b"query,response\n1," + b"2" * 200_000)
    assert len(row["response"]) == 200_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b'query,response\n1,2\n1,"2\n',
            "a.csv: cannot be read beyond row 1: a quoted cell has no end",
        ),
        (b'query,response\n"1"2,3\n', "a.csv: cannot be read: ',' expected after '\"'"),
        (b"query,query\n1,2\n", "a.csv: two columns are called 'query'; rename one"),
        (b"query,response\n", "a.csv: is empty"),
        (b"", "a.csv: is empty"),
        ("query,response\n你好,2\n".encode("gbk"), "a.csv: cannot be read: is not UTF-8 (byte 0xc4)"),
        ("query,response\n1,2\n".encode("utf-16"), "a.csv: is UTF-16, not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_error(empty_folder, content, reason):
    with pytest.raises(DataError) as caught:
        read("a.csv", content)
    assert str(caught.value).startswith(reason)


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2), min_size=1))
def test_a_table_gives_back_the_texts_that_were_written(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    values = [{"a": a, "b": b} for a, b in cells]
    path.write_bytes(table(values))
    expected = [{key: text for key, text in value.items() if text} for value in values]
    assert [row for _, row in read_rows(path)] == expected


# -------------------------------------------------------------------------------------------------------------- Arrow


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def test_a_parquet_file_gives_no_key_that_only_other_rows_have(empty_folder):
    """Arrow writes one struct type for all rows, and null where a row has not the key."""
    number, choice = {"type": "integer"}, {"type": "string", "enum": ["a", None]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    values = [
        {"messages": [{"role": "user", "content": "1"}, call], "tools": [tool("f", x=number)]},
        {"messages": [{"role": "assistant", "content": "2"}], "tools": [tool("g", y=choice), tool("h")]},
        {"messages": [{"role": "assistant", "content": "2"}]},
    ]
    found = [row for _, row in read("a.parquet", parquet(values))]
    del call["content"]  # a null like any other; the formats know that a call has no content
    assert found == values


def test_a_null_of_json_in_a_parquet_file_stays(empty_folder):
    """The datasets library keeps mixed objects as JSON, with a feature that says so."""
    values = [
        {"tools": [{"default": None, "x": {"type": "integer"}}]},
        {"tools": [{"default": 3, "x": {"type": ["integer", "null"], "enum": [1, None]}}]},
    ]
    datasets.Dataset.from_list(values, on_mixed_types="use_json").to_parquet("a.parquet")
    assert [row for _, row in read_rows(Path("a.parquet"))][1] == values[1]
    stored = datasets.Features({"a": datasets.Json(), "b": {"c": datasets.Value("string")}})
    row = {"a": '{"c": null}', "b": {"c": None}}
    assert rows._without_padding(row, stored) == {"a": {"c": None}, "b": {}}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 not a file", parquet([TURN])[:-10], b"hello"])
def test_a_broken_parquet_file_is_one_clear_error(empty_folder, capfd, content):
    with pytest.raises(DataError, match="^a.parquet: ") as caught:
        read("a.parquet", content)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_large_file_is_read_piece_by_piece(empty_folder, name):
    digits = random.Random(0)  # which no compression makes small
    values = [{"query": str(i), "response": f"{digits.getrandbits(8000):02000x}"} for i in range(8000)]  # 16 MB
    Path(name).write_bytes(WRITERS[name](values))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    arrow = [pa.total_allocated_bytes() - before for _ in read_rows(Path(name))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(arrow) == 8000 and peak < 8_000_000 and max(arrow) < 8_000_000


# ----------------------------------------------------------------------------------------------------- hub data sets

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.parquet}
  - {split: test, path: main/test.parquet}
- config_name: other
  data_files:
  - {split: train, path: other/*.parquet}
---
"""


@pytest.fixture
def hub_folder(empty_folder):
    """A copy of a hub data set of two subsets."""
    for name in ("main", "other"):
        Path("copy", name).mkdir(parents=True)
    Path("copy/README.md").write_text(CARD, encoding="utf-8")
    Path("copy/main/train.parquet").write_bytes(parquet([TURN, {"query": "3", "response": "4"}]))
    Path("copy/main/test.parquet").write_bytes(parquet([{"query": "5", "response": "6"}]))
    Path("copy/other/a.parquet").write_bytes(parquet([talk("7", "8")]))


def test_subset_and_split_of_a_data_set_are_read(run, tokenizer, hub_folder):
    data = run(
        "dataset.train=[{path: copy, subset: main, split: train}, {path: copy, subset: other, split: train}]",
        "dataset.test={path: copy, subset: main, split: test}",
    )
    said = [text.replace("<|im_end|>", "") for text in texts(tokenizer, data.train)]
    assert said == ["S 1 2", "S 3 4", "S 7 8"]
    assert [place for place, _ in data.test_conversations] == ["copy (main, test):1"]
    paths = ["copy (main, train)", "copy (other, train)", "copy (main, test)"]
    assert [file["path"] for file in data.ledger["files"]] == paths


def test_a_changed_file_of_a_data_set_makes_its_rows_anew(run, tokenizer, hub_folder):
    source = "dataset.train={path: copy, subset: other, split: train}"
    assert len(run(source).train) == 1
    Path("copy/other/a.parquet").write_bytes(parquet([talk("7", "8"), talk("9", "9")]))
    assert len(run(source).train) == 2


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{path: copy, subset: none, split: train}", r"copy \(none, train\): .* 'none' not found"),
        ("{path: copy, subset: main, split: none}", r"copy \(main, none\): datasets.load_dataset cannot .* none"),
        ("copy", "is a directory; name its files, e.g. copy/.*, or, of a hub data set's copy, a split"),
        ("{path: copy/other/a.parquet, split: train}", "is a file: it has no subset and no split"),
        ("{path: ./nothing, split: train}", "there is no file ./nothing"),
    ],
)
def test_a_data_set_that_is_not_there_is_one_clear_error(run, hub_folder, source, reason):
    with pytest.raises((DataError, RecipeError), match=reason) as caught:
        run(f"dataset.train={source}")
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_without_a_network_is_one_clear_error(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        run("dataset.train={path: user/name, subset: main, split: test}")
    assert str(caught.value).startswith(
        "user/name (main, test): is no file here, and https://huggingface.co does not give it: "
    )
    assert "\n" not in str(caught.value)


def test_the_names_of_data_sets():
    assert str(HubDataset("user/name")) == "user/name"
    assert f"{HubDataset('user/name', None, 'test')}:5" == "user/name (test):5"
