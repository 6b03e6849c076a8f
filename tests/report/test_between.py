"""A part of a Markdown file that a command writes."""

from pathlib import Path

import pytest

from opfa.errors import RunError
from opfa.report.between import write_between


def test_a_file_without_marks_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("text <!-- mark -->\n")
    with pytest.raises(RunError, match="has no <!-- mark --> with <!-- /mark --> after it"):
        write_between(file, "mark", "new")
    assert file.read_text() == "text <!-- mark -->\n"
