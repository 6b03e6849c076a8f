"""How a function takes texts: as values, as files, or as a data set of the Hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from opfa.errors import RunError

if TYPE_CHECKING:
    from opfa.inference.texts import Texts


def texts_of(
    texts: Path | Iterable[str | Path],
    columns: str | Iterable[str],
    hub: str | None,
    hub_config: str | None,
    hub_split: str,
) -> "Texts":
    """Texts that can be read again and again; false where none were given."""
    if isinstance(texts, str):
        raise RunError(f"texts = {texts!r}: could be a text or a file; give [text] or Path(file)")
    given = [texts] if isinstance(texts, Path) else list(texts)
    from opfa.inference.texts import HubTexts, Texts

    return Texts(
        in_memory=tuple(each for each in given if isinstance(each, str)),
        files=tuple(each for each in given if isinstance(each, Path)),
        hub=None if hub is None else HubTexts(name=hub, config=hub_config, split=hub_split),
        columns=(columns,) if isinstance(columns, str) else tuple(columns),
    )
