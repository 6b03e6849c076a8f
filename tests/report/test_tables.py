"""Tables and results: the same content on a screen, in Markdown, in HTML and in JSON."""

import json

import pytest

from opfa.report.tables import LayerKinds, Result, Row, Table, column, figure, layer_table, show

TABLE = Table(("name", "zeros"), [("a [b]", "1,024"), ("<c>", "-")], "found", numbers_from=1)


class Line(Row):
    name: str
    share: float | None = column("share", ".1%")
    num_bytes: int = column("MB", ".2f", 1e-6)
    is_exact: bool = column("exact")


class Found(Result):
    lines: dict[str, Line]

    def parts(self, *, is_long: bool = False) -> list[Table | str]:
        return [Table.of("name", self.lines), "so much" if is_long else "so little"]


FOUND = Found(lines={"x": Line(name="x", share=0.125, num_bytes=2_500_000, is_exact=True)})


def test_numbers_are_aligned_to_the_right_in_markdown() -> None:
    assert TABLE.markdown() == "| name | zeros |\n|---|---:|\n| a [b] | 1,024 |\n| <c> | - |"
    assert Table(("a", "b"), []).markdown() == "| a | b |\n|---|---|"


def test_a_screen_shows_everything_even_what_looks_like_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    FOUND.show()
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if "x" in line][-1] == [
        "x", "12.5%", "2.50", "True",
    ]  # fmt: skip
    assert out.endswith("so little\n")
    FOUND.show(is_long=True)
    assert capsys.readouterr().out.endswith("so much\n")


def test_columns_follow_from_the_fields_of_a_row() -> None:
    table = Table.of("name", {"y": Line(name="y", share=None, num_bytes=1, is_exact=False)})
    assert table.head == ("name", "share", "MB", "exact")
    assert table.rows == [("y", "", "0.00", "False")]


def test_json_is_the_fields_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    FOUND.show(as_json=True)
    assert json.loads(capsys.readouterr().out) == FOUND.values()
    monkeypatch.setenv("MY_TOKEN", "0123456789")
    line = Line(name="0123456789", share=0.0, num_bytes=0, is_exact=True)
    Found(lines={"x": line}).show(as_json=True)
    assert "0123456789" not in capsys.readouterr().out


def test_a_result_as_a_page_has_its_parts_one_after_the_other() -> None:
    assert FOUND.markdown().endswith("| x | 12.5% | 2.50 | True |\n\nso little")


def test_layers_are_named_by_stack_only_where_there_are_several() -> None:
    one = LayerKinds(stack="encoder", layer=0, kinds={"attention.query": 0.5})
    other = LayerKinds(stack="decoder", layer=0, kinds={"output": 0.25})
    assert layer_table("", [one]).rows == [["0", "50.00"]]
    assert layer_table("", [one, other]).rows == [
        ["encoder.0", "50.00", ""],
        ["decoder.0", "", "25.00"],
    ]


def test_figures_have_two_digits_where_a_metric_goes_to_100() -> None:
    assert figure(0.5, None) == "0.5000"
    assert figure(81.234, 0.5) == "81.23 ± 0.50"


WIDE = Table(
    ("name", "task", "sparsity", "bytes", "results"),
    [("someone/" + 60 * "x", "masked language modelling", "85%", "1,024", "accuracy 0.9, loss 2")],
)


def test_a_table_fits_80_columns_by_folding_texts_and_heads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    numbers = ("the largest of all numbers", "1,234,567,890")
    show([WIDE, Table(("tensor", *(numbers[0],) * 3), [(70 * "q", *(numbers[1],) * 3)], "t", 1)])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    letters = "".join(out.split())
    assert letters.count("x") == 60 and letters.count("q") == 70  # nothing is cut
    assert out.count("1,234,567,890") == 3


def test_numbers_are_never_folded_even_where_a_table_is_too_wide(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show([Table(("a", *(f"x{i}" for i in range(14))), [("name", *("1234567",) * 14)], "", 1)])
    assert capsys.readouterr().out.count("1234567") == 14
