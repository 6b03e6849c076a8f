"""What a server did; apart from it, since it needs none of the server's packages."""

import shlex
from collections.abc import Iterable

from opfa.report.tables import Result, Table


class Served(Result):
    """What a server did until it was stopped."""

    model: str
    address: str
    requests: int
    answered: int  # with status 200
    examples: int
    seconds: float

    def parts(self, *, is_long: bool = False) -> Iterable[Table | str]:
        """One line for each number."""
        rows = [
            ("requests", f"{self.requests:,}"),
            ("answered", f"{self.answered:,}"),
            ("examples", f"{self.examples:,}"),
            ("seconds", f"{self.seconds:,.0f}"),
        ]
        yield Table((self.model, ""), rows, numbers_from=1)
        yield f"    next  {shlex.join(['opfa', 'bench', 'serve', self.model])}"
