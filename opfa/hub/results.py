"""What downloads and uploads give: results that print themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from opfa.report.outcome import Outcome, Place
from opfa.report.tables import Table


class DownloadResult(Outcome):
    """A released model that is complete here."""

    name: str
    directory: Place
    files: int
    bytes: int
    manifest_sha256: str | None  # None where the Hub's own listing was checked against

    def table(self) -> Table:
        """Files and bytes."""
        rows = [("files", f"{self.files:,}"), ("bytes", f"{self.bytes:,}")]
        return Table((self.name, "downloaded"), rows, numbers_from=1)

    def notes(self) -> Sequence[str]:
        """What was verified."""
        source = "its manifest" if self.manifest_sha256 else "the Hub's listing"
        return [f"complete; each file checked against {source}"]

    def places(self) -> Mapping[str, Path | str]:
        """The model."""
        return {"model": self.directory}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """Where its zeros are, and to fine-tune it."""
        tune = ("finetune", "RECIPE", "--output", "RUN", f"model.init={self.directory}")
        return [("inspect", self.directory), tune]


class PushResult(Outcome):
    """A release that is on the Hub."""

    name: str
    directory: Place
    address: str  # of the commit

    def table(self) -> Table:
        """Its name."""
        return Table(("uploaded", "as"), [(str(self.directory), self.name)])

    def places(self) -> Mapping[str, Path | str]:
        """The commit."""
        return {"address": self.address}

    def commands(self) -> Sequence[Sequence[Path | str]]:
        """What others run."""
        return [("download", self.name, "--output", self.name.rpartition("/")[2])]
