"""Records from files: what each format gives, and where each mistake is said to be."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from opfa.data.records import expand, read_records
from opfa.errors import DataError


def read(path: Path, content: str | bytes) -> list[tuple[str, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_records(path))


# JSON Lines


def test_json_lines_are_numbered_and_empty_lines_are_no_records(tmp_path: Path) -> None:
    found = read(tmp_path / "a.jsonl", '{"a": 1}\n\n  \n{"a": "é"}')
    assert found == [("line 1", {"a": 1}), ("line 4", {"a": "é"})]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{oops", "malformed JSON: Expecting property name"),
        ('{"a": 1} {"a": 2}', "malformed JSON: Extra data"),
        ("[1, 2]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ('{"a": "\\ud83d"}', "malformed JSON: .*surrogates not allowed"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, second: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}/a.jsonl, line 3: {message}"):
        read(tmp_path / "a.jsonl", f'{{"a": 1}}\n\n{second}\n{{"a": 3}}\n')


def test_an_escaped_emoji_is_text(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00"}') == [("line 1", {"a": "😀"})]


def test_a_line_separator_within_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    assert read(tmp_path / "a.jsonl", f'{{"a": "{text}"}}') == [("line 1", {"a": text})]


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", '\ufeff{"a": 1}') == [("line 1", {"a": 1})]


# CSV and TSV


def test_csv_has_its_columns_in_the_first_line(tmp_path: Path) -> None:
    found = read(tmp_path / "a.csv", 'a,b\n1,"x, ""y"""\n2,\n')
    assert found == [("line 2", {"a": "1", "b": 'x, "y"'}), ("line 3", {"a": "2", "b": ""})]


def test_a_csv_record_over_several_lines_is_numbered_by_its_last(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", 'a,b\n1,"x\ny"\n') == [("line 3", {"a": "1", "b": "x\ny"})]


@pytest.mark.parametrize(("row", "what"), [("1", "1 value"), ("1,2,3", "3 values")])
def test_a_csv_line_with_another_number_of_values_is_named(
    tmp_path: Path, row: str, what: str
) -> None:
    with pytest.raises(DataError, match=f"a.csv, line 3: {what}, and the header has 2$"):
        read(tmp_path / "a.csv", f"a,b\n1,2\n{row}\n")


def test_an_unfinished_quotation_in_a_csv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a.csv, line 2: can't be read: unexpected end of data"):
        read(tmp_path / "a.csv", 'a,b\n1,"x\n')


def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    found = read(tmp_path / "a.tsv", 'a\tb\n"x\ty"\n')
    assert found == [("line 2", {"a": '"x', "b": 'y"'})]


def test_a_tsv_line_with_another_number_of_values_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a.tsv, line 2: 1 value, and"):
        read(tmp_path / "a.tsv", "a\tb\nx\n")


# text and Parquet


def test_text_documents_are_parted_by_empty_lines(tmp_path: Path) -> None:
    found = read(tmp_path / "a.txt", "\none\r\ntwo\n\n \n\nthree\n")
    assert found == [("line 2", {"text": "one\ntwo"}), ("line 7", {"text": "three"})]


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"a": [1, 2], "b": ["x", None]}), tmp_path / "a.parquet")
    found = list(read_records(tmp_path / "a.parquet"))
    assert found == [("line 1", {"a": 1, "b": "x"}), ("line 2", {"a": 2, "b": None})]


# compression


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_every_text_format_may_be_compressed(tmp_path: Path, suffix: str, compression: str) -> None:
    content = {".jsonl": '{"text": "é"}', ".txt": "é"}.get(suffix, "text\né\n").encode()
    packed = {"gz": gzip.compress, "zst": zstandard.compress}[compression](content)
    plain = read(tmp_path / f"a{suffix}", content)
    assert read(tmp_path / f"a{suffix}.{compression}", packed) == plain
    assert [record for _, record in plain] == [{"text": "é"}]


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_compressed_file_of_two_parts_is_read_whole(tmp_path: Path, compression: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[compression]
    assert len(read(tmp_path / f"a.txt.{compression}", pack(b"one\n\n") + pack(b"two\n"))) == 2


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_off_is_refused(tmp_path: Path, compression: str) -> None:
    content = "\n\n".join(str(i**7) for i in range(20_000)).encode()
    packed = {"gz": gzip.compress, "zst": zstandard.compress}[compression](content)
    with pytest.raises(DataError, match=f"a.txt.{compression}: can't be read: "):
        read(tmp_path / f"a.txt.{compression}", packed[: len(packed) // 2])


# files


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.txt.zst"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    with pytest.raises(DataError, match=f"{name}: is empty"):
        read(tmp_path / name, pack(b""))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.zst", b"no zstandard"),
        ("a.parquet", b"no parquet"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes
) -> None:
    with pytest.raises(DataError, match=f"{name}: can't be read: .") as caught:
        read(tmp_path / name, content)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a.doc", "a", "a.gz"])
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: unknown kind of file; known are .jsonl, .json"):
        read(tmp_path / name, "x")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"^nowhere.jsonl: no such file"):
        next(read_records(Path("nowhere.jsonl")))


def test_patterns_name_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.csv"):
        (tmp_path / name).touch()
    found = expand([f"{tmp_path}/*.csv", f"{tmp_path}/*.txt"])
    assert [file.name for file in found] == ["c.csv", "a.txt", "b.txt"]


def test_a_pattern_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/\*\.txt: no such file"):
        expand([f"{tmp_path}/*.txt"])
