"""Files that are large, deep, damaged or odd: each is read, or refused in one line with a place."""

import gzip
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from opfa.data import lines, records
from opfa.data.records import read_records
from opfa.errors import DataError

PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}


def read(path: Path, content: str | bytes, columns: list[str] | None = None) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [record for _, record in read_records(path, columns=columns)]


def refused(path: Path, content: str | bytes, columns: list[str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(path, content, columns)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{path.parent}/")


# one record has a limit


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 100 characters in a record."""
    for module in (lines, records, records.read_json.__globals__, records.read_parquet.__globals__):
        names = module if isinstance(module, dict) else vars(module)
        monkeypatch.setitem(names, "LARGEST", 100)


LONG = "x " * 60
LIMIT = "is longer than 16,777,216 characters, which is the most that one record may have"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", f'{{"a": 1}}\n{{"a": "{LONG}"}}\n', "line 2: is"),
        ("a.json", f'[{{"a": 1}},\n{{"a": "{LONG}"}}]', "line 2: is"),
        ("a.csv", f"a,b\n1,2\n1,{LONG}\n", "line 3: the record that begins here is"),
        ("a.csv", 'a,b\n1,"2\n' + "1,2\n" * 100, "line 2: the record that begins here is"),
        ("a.tsv", f"a\tb\n1\t{LONG}\n", "line 2: the record that begins here is"),
        ("a.txt", f"one\n\n{LONG}\n", "line 3: is"),
        ("a.txt", "one\n\n" + "two\n" * 100, f"line 3: {records.UP_TO_EMPTY} is"),
        ("a.conll", "one O\n" * 100, f"line 1: {records.UP_TO_EMPTY} is"),
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_record_that_is_too_large_is_named(
    tmp_path: Path, name: str, content: str, place: str, compression: str
) -> None:
    packed = PACK.get(compression[1:], bytes)(content.encode())
    message = refused(tmp_path / f"{name}{compression}", packed)
    assert message == f"{name}{compression}, {place} {LIMIT.removeprefix('is ')}"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f'{{"text": "{LONG}"}}\n{{"text": "two"}}\n'),
        ("a.txt", f"{LONG}\n\ntwo\n"),
        ("a.txt", "one\n" * 100 + "\ntwo\n"),
    ],
)
def test_records_that_are_too_large_may_be_left_out(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    errors: list[DataError] = []
    found = [record for _, record in read_records(tmp_path / name, errors.append)]
    assert (found, len(errors)) == ([{"text": "two"}], 1)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.zst", "a.csv.zst", "a.txt.zst"])
def test_an_endless_line_is_refused_before_its_end(tmp_path: Path, name: str) -> None:
    writer = zstandard.ZstdCompressor().compressobj()
    start = {"a.json.zst": b'[{"a": "', "a.jsonl.zst": b'{"a": "'}.get(name, b"")
    packed = [writer.compress(part) for part in [start, *[b"x" * (1 << 20)] * 400]]
    packed.append(writer.flush())
    begin = time.process_time()
    assert LIMIT in refused(tmp_path / name, b"".join(packed))
    assert time.process_time() - begin < 3.0


BLANK = lines.BLANK  # before it is made small


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "start", "blank", "place"),
    [
        ("a.json", "[", " ", "line 1"),
        ("a.json", '[{"a": 1}', "\t", "line 1"),
        ("a.json", '[{"a": 1},', "\n", "line 1"),
        ("a.json", '[{"a": 1}]', "\r\n", "line 1"),
        ("a.jsonl", '{"a": 1}\n', " \n", "line 52"),
        ("a.csv", "a,b\n1,2\n", "\n", "line 103"),
        ("a.txt", "one\n", "\n", "line 102"),
        ("a.conll", "one O\n", "\n", "line 102"),
    ],
)
def test_blanks_without_end_are_refused(
    tmp_path: Path, name: str, start: str, blank: str, place: str
) -> None:
    """Packed, hours of them are a few kilobytes."""
    end = {".json": '{"a": 2}]', ".jsonl": '{"a": 2}'}.get(Path(name).suffix, "")
    content = zstandard.compress((start + blank * 150 + end).encode())
    assert refused(tmp_path / f"{name}.zst", content) == f"{name}.zst, {place}: {BLANK}"


def test_a_csv_field_of_135_000_characters_is_read(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", f"a,b\n1,{'x' * 135_000}\n") == [{"a": "1", "b": "x" * 135_000}]


def test_a_value_that_a_parquet_file_stores_once_is_not_written_out_everywhere(
    tmp_path: Path,
) -> None:
    texts = pyarrow.DictionaryArray.from_arrays([0] * 200, ["x" * (1 << 20)])
    parquet.write_table(pyarrow.table({"a": texts}), tmp_path / "a.parquet")
    del texts
    before = pyarrow.total_allocated_bytes()
    for _, record in read_records(tmp_path / "a.parquet"):
        assert len(record["a"]) == 1 << 20
        assert pyarrow.total_allocated_bytes() - before < 50 << 20


def test_a_parquet_row_that_is_too_large_is_named(tmp_path: Path) -> None:
    rows = {"a": ["x", "y" * (17 << 20)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, line 2: holds more than 16,777,216 bytes"):
        list(read_records(tmp_path / "a.parquet"))


# JSON


@pytest.mark.parametrize("depth", [5_000, 200_000])
@pytest.mark.parametrize("value", ["[", '{"a":'])
@pytest.mark.parametrize(("name", "array"), [("a.jsonl", "{}"), ("a.json", "[{}]")])
def test_deep_json_is_one_message(
    tmp_path: Path, name: str, array: str, value: str, depth: int
) -> None:
    deep = value * depth + "1" + {"[": "]", '{"a":': "}"}[value] * depth
    content = array.replace("{}", f'{{"a": {deep}}}')
    message = refused(tmp_path / name, content, ["b"])
    assert message.startswith(f"{name}, line 1: malformed JSON: maximum recursion depth exceeded")


@pytest.mark.parametrize(("name", "array"), [("a.jsonl", "{}"), ("a.json", "[{}]")])
def test_an_integer_of_5_000_digits_is_one_message(tmp_path: Path, name: str, array: str) -> None:
    content = array.replace("{}", f'{{"a": {"9" * 5_000}}}')
    assert "line 1: malformed JSON: Exceeds the limit" in refused(tmp_path / name, content)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_an_array_of_objects_is_read(tmp_path: Path, indent: int | None, compression: str) -> None:
    rows = [{"a": 1, "b": ["é", {"c": None}]}, {"a": "]}"}] * 3
    content = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    assert (
        read(tmp_path / f"a.json{compression}", PACK.get(compression[1:], bytes)(content)) == rows
    )


@pytest.mark.parametrize("piece", [1, 7, 30])
def test_an_array_is_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setitem(records.read_json.__globals__, "PIECE", piece)
    rows = [{"a": "\n\u20ac \\u", "b": [1.5e3, True, None, -12]}, {"a": {"c": "x" * 40}}] * 3
    assert read(tmp_path / "a.json", json.dumps(rows, indent=1)) == rows


def test_objects_of_an_array_are_numbered_by_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n\n{"a":\n2}, {"a": 3}\n]\n')
    places = [place for place, _ in read_records(tmp_path / "a.json")]
    assert places == ["line 2", "line 4", "line 5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, {"a": "b', "line 1: malformed JSON: Unterminated string"),
        ('[{"a": 1}', "line 1: malformed JSON: the end of the file instead of ','"),
        ('[{"a": 1}\n{"a": 2}]', "line 2: malformed JSON: '{' instead of ','"),
        ('[{"a": 1},\n]', "line 2: malformed JSON: Expecting value"),
        ('[{"a":\n\n oops}]', "line 3: malformed JSON: Expecting value"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2: malformed JSON: '[' after the end of the array"),
        ("[1, 2]", "line 1: not a JSON object"),
        ("[]", "is empty"),
        (" \n ", "is empty"),
        ('{\n  "a": 1\n}', "line 1: malformed JSON: Expecting property name"),
    ],
)
def test_what_is_wrong_with_an_array_has_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    found = refused(tmp_path / "a.json", content)
    assert found.removeprefix("a.json").lstrip(",: ").startswith(message)


@pytest.mark.parametrize("content", ["[\n", '{\n  "a": 1\n}', '[{"a": 1}]'])
def test_json_that_is_not_one_object_a_line_is_told_the_two_layouts(
    tmp_path: Path, content: str
) -> None:
    assert "JSON Lines have one object a line; a .json file" in refused(
        tmp_path / "a.jsonl", content
    )


@pytest.mark.parametrize(("name", "array"), [("a.jsonl", "{}"), ("a.json", "[{}]")])
@pytest.mark.parametrize(
    "row", ['"a": 1, "a": 2', '"a": {"c": 1, "c": 2}', '"a": [{"c": 1, "c": 2}]']
)
def test_a_key_that_stands_twice_is_refused_where_it_is_wanted(
    tmp_path: Path, name: str, array: str, row: str
) -> None:
    content = array.replace("{}", f'{{"b": 3, {row}}}')
    assert "stands twice" in refused(tmp_path / name, content, ["a"])
    assert [record["b"] for record in read(tmp_path / name, content, ["b"])] == [3]


# tables


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_column_that_stands_twice_is_refused_where_it_is_wanted(
    tmp_path: Path, name: str, mark: str
) -> None:
    content = f"text{mark}text{mark}label\nx{mark}y{mark}z\n"
    message = refused(tmp_path / name, content, ["text", "label"])
    assert message == f"{name}, line 1: column 'text' stands twice"
    assert [row["label"] for row in read(tmp_path / name, content, ["label"])] == ["z"]


def test_a_parquet_column_that_stands_twice_is_refused_where_it_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    arrays = [pyarrow.array([value]) for value in "xyz"]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["text", "text", "label"]), file)
    with pytest.raises(DataError, match=r"a.parquet: column 'text' stands twice"):
        list(read_records(file, columns=["text"]))
    assert [row["label"] for _, row in read_records(file, columns=["label"])] == ["z"]


ODD = {
    "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
    "time": pyarrow.array([10**14 - 1], pyarrow.time64("ns")),
    "duration": pyarrow.array([2**62], pyarrow.duration("ns")),
    "timestamp": pyarrow.array([2**62], pyarrow.timestamp("us")),
    "zone": pyarrow.array([1], pyarrow.timestamp("us", tz="Nowhere/Land")),
    "date": pyarrow.array([2**30], pyarrow.date32()),
    "dictionary": pyarrow.array([7]).dictionary_encode(),
    "binary": pyarrow.array([b"\xff"]),
    "nested": pyarrow.array(
        [[[("a", "b")]]], pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    ),
    "null": pyarrow.array([None]),
    "utf8": pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"caf\xe9"]).buffers()),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_parquet_column_of_any_type_does_not_matter_where_it_is_not_wanted(
    tmp_path: Path, odd: str
) -> None:
    parquet.write_table(pyarrow.table({"text": ["x"], "odd": ODD[odd]}), tmp_path / "a.parquet")
    found = list(read_records(tmp_path / "a.parquet", columns=["text"]))
    assert found == [("line 1", {"text": "x", "odd": None})]


@pytest.mark.parametrize("odd", ["timestamp", "date", "zone", "utf8"])
def test_a_parquet_value_that_no_object_can_be_made_of_is_named(tmp_path: Path, odd: str) -> None:
    parquet.write_table(pyarrow.table({"odd": ODD[odd]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, line 1: can't be read: ."):
        list(read_records(tmp_path / "a.parquet"))


# words and tags


def test_a_no_break_space_is_a_part_of_a_word(tmp_path: Path) -> None:
    for mark in "\t", " ":
        rows = read(tmp_path / "a.conll", f"10\xa0000{mark}B-NUM\nfans{mark}O\n")
        assert rows == [{"tokens": ["10\xa0000", "fans"], "tags": ["B-NUM", "O"]}]


def test_words_with_tabs_between_columns_may_have_blanks(tmp_path: Path) -> None:
    rows = read(
        tmp_path / "a.conll", "New York\tNNP\tB-LOC\nwins\tVB\tO\n\n-DOCSTART-\tO\n\nhe\t\tO\n"
    )
    assert rows == [
        {"tokens": ["New York", "wins"], "tags": ["B-LOC", "O"]},
        {"tokens": ["he"], "tags": ["O"]},
    ]


# bytes


WHOLE = {
    "a.jsonl": '{"a": 1}\n{"a": "good"}\n',
    "a.json": '[{"a": 1},\n{"a": "good"}]\n',
    "a.csv": "a\ngood\n",
    "a.tsv": "a\ngood\n",
    "a.txt": "one\ngood\n",
    "a.conll": "one O\ngood O\n",
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_byte_that_is_not_utf8_has_its_line_and_place(
    tmp_path: Path, name: str, compression: str
) -> None:
    content = WHOLE[name].replace("good", "caf\xe9").encode("latin-1")
    place = WHOLE[name].splitlines()[1].index("good") + 4
    found = refused(tmp_path / f"{name}{compression}", PACK.get(compression[1:], bytes)(content))
    expected = f"line 2: byte 0xE9 at character {place} is not UTF-8"
    assert found == f"{name}{compression}, {expected}"


@pytest.mark.parametrize("name", WHOLE)
def test_a_zero_byte_has_its_line_and_place(tmp_path: Path, name: str) -> None:
    place = WHOLE[name].splitlines()[1].index("good") + 3
    found = refused(tmp_path / name, WHOLE[name].replace("good", "go\0od"))
    assert found.startswith(
        f"{name}, line 2: a zero byte at character {place}; is the file UTF-16?"
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", WHOLE)
def test_another_encoding_is_guessed(tmp_path: Path, name: str, encoding: str) -> None:
    found = refused(tmp_path / name, WHOLE[name].encode(encoding))
    assert "line 1: a zero byte at character" in found
    assert "UTF-16" in found


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("name", WHOLE)
def test_lines_may_end_as_anywhere(tmp_path: Path, name: str, end: str) -> None:
    (tmp_path / "unix").mkdir()
    there = read(tmp_path / "unix" / name, WHOLE[name])
    assert read(tmp_path / name, "\ufeff" + WHOLE[name].replace("\n", end)) == there


# files


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


MADE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (lambda path: path.mkdir(), "is a directory; give a plain file"),
    "a pipe": (os.mkfifo, "is a pipe; give a plain file"),
    "a socket": (_socket, "is a socket; give a plain file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device; give a plain file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link to nothing"),
    "a loop": (lambda path: path.symlink_to(path.name), "can't be read: Too many levels of "),
}


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize("what", MADE)
def test_only_a_plain_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make, message = MADE[what]
    make(Path(name))
    with pytest.raises(DataError) as caught:
        list(read_records(Path(name)))
    assert str(caught.value).replace("'", "").startswith(f"{name}: {message}".replace("'", ""))


@pytest.mark.parametrize("name", ["n" * 5_000 + ".csv", "a\0b.csv", "a\0b.parquet"])
def test_a_name_that_no_file_can_have_is_one_short_message(name: str) -> None:
    with pytest.raises(DataError, match=r": can't be read: ") as caught:
        list(read_records(Path(name)))
    assert len(str(caught.value)) < 300
