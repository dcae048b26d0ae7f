"""What is written is whole, or as it was before."""

from datetime import date
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from sft.errors import UserError
from sft.files import require_space, whole_folder, write_bytes, write_json, write_json_lines, write_text, writing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_utf8_with_line_feeds_and_nothing_stays_beside_it(tmp_path):
    write_text(tmp_path / "a.txt", "é\n世\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n\xe4\xb8\x96\n"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_whose_run_was_killed_between_the_two_moves_is_put_back(tmp_path):
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "weights").write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert (tmp_path / "model" / "weights").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["model"]


def test_json_is_readable_and_takes_what_json_does_not_know_as_text(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, date(2024, 2, 29)]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "é": [\n    1,\n    "2024-02-29"\n  ]\n}\n'


def test_json_lines_are_split_at_line_feeds_only(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [{"text": "one\ntwo\u2028three"}, [4]])
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"text": "one\\ntwo\xe2\x80\xa8three"}\n[4]\n'


def test_a_file_stays_as_it_was_where_its_successor_breaks_off(tmp_path):
    def broken():
        yield "new"
        raise KeyboardInterrupt

    write_json_lines(tmp_path / "a.jsonl", ["old"])
    with pytest.raises(KeyboardInterrupt):
        write_json_lines(tmp_path / "a.jsonl", broken())
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '"old"\n'


@pytest.mark.parametrize("write", [write_bytes, write_json_lines], ids=["bytes", "lines"])
def test_a_file_that_cannot_be_written_is_the_users_to_mend(write, tmp_path):
    with pytest.raises(UserError, match=r"missing.a\.json cannot be written: No such file or directory"):
        write(tmp_path / "missing" / "a.json", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_a_full_disk_is_known_by_the_words_of_a_rust_library_too():
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left on device, .* free some space"):
        with writing(Path("/dev/full")):
            Tokenizer(BPE()).save("/dev/full")
    with pytest.raises(ZeroDivisionError), writing(Path("/dev/full")):
        1 / 0  # noqa: B018 - an error of ours stays one


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "parent" / "model") as folder:
            write_text(folder / content, content)
            assert folder != tmp_path / "parent" / "model"
    assert names(tmp_path / "parent") == ["model"] and names(tmp_path / "parent" / "model") == ["new"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_stays_as_it_was_where_its_successor_breaks_off(error, tmp_path):
    with whole_folder(tmp_path / "model") as folder:
        write_text(folder / "old", "")
    with pytest.raises(error), whole_folder(tmp_path / "model") as folder:
        write_text(folder / "new", "")
        raise error
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


def test_a_folder_that_is_a_link_is_filled_where_the_link_points(tmp_path):
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "big_disk", target_is_directory=True)
    with whole_folder(tmp_path / "model") as folder:
        write_text(folder / "new", "")
    assert (tmp_path / "model").is_symlink() and names(tmp_path / "big_disk") == ["new"]
    assert names(tmp_path) == ["big_disk", "model"]


def test_a_folder_that_the_disk_has_no_place_for_is_refused_before_it_is_written(tmp_path):
    require_space(tmp_path / "model", 1)
    with pytest.raises(UserError, match=r"model takes 1000000000\.000 GB, and .* GB are free; free some space there"):
        require_space(tmp_path / "model", 10**18)


def test_what_a_killed_run_left_beside_a_folder_does_not_get_into_it(tmp_path):
    for left in ("model", ".model.partial", ".model.old"):
        (tmp_path / left / "half").mkdir(parents=True)
    with whole_folder(tmp_path / "model") as folder:
        write_text(folder / "new", "")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["new"]
