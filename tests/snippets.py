"""The Python that documents show, to be run."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def snippets(text: str) -> list[str]:
    """The Python blocks of a page, in their order."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_snippets(page: str, having: str, **names: Any) -> dict[str, Any]:
    """Run the blocks of a page of this repository that have a text in them; what they name."""
    found = [code for code in snippets((ROOT / page).read_text()) if having in code]
    assert found, f"{page} has no Python with {having!r}"
    for code in found:
        exec(code, names)
    return names
