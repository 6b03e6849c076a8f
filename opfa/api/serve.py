"""A finished model behind HTTP, as a function."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opfa.api.progress import progress
from opfa.extras import require
from opfa.serving.limits import Limits

if TYPE_CHECKING:  # it waits for torch
    from opfa.serving.results import Served

DEFAULT = Limits()


@progress()
def serve(
    model: str | Path,
    *,
    host: str = DEFAULT.host,
    port: int = DEFAULT.port,
    batch: int = DEFAULT.batch,
    wait_ms: float = DEFAULT.wait_ms,
    queue: int = DEFAULT.queue,
    body_mb: float = DEFAULT.body_mb,
    read_seconds: float = DEFAULT.read_seconds,
    answer_seconds: float = DEFAULT.answer_seconds,
    kind: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    choices: Sequence[str] = (),
    recipe: Path | None = None,
    tokenizer: str | None = None,
    sequence_tokens: int | None = None,
) -> "Served":
    """Answer over HTTP, as `opfa.predict` does, until SIGTERM or Ctrl-C; in the main thread.

    `model` is whatever `opfa.predict` takes, and `kind` to `sequence_tokens` are as there. Others
    than this machine need a `host` such as "0.0.0.0"; `port` 0 takes a free one. The model computes
    up to `batch` examples at once and waits `wait_ms` milliseconds for more of them. At most
    `queue` examples wait; what is beyond gets status 503. A body may have `body_mb` * 10^6 bytes
    and `read_seconds` to arrive, its answer `answer_seconds`. Raises `OpfaError` before it listens.
    Needs `opfa[serve]`.
    """
    require("opfa serve", "opfa[serve]", "fastapi", "uvicorn", "prometheus_client")
    limits = Limits.of(
        host=host,
        port=port,
        batch=batch,
        wait_ms=wait_ms,
        queue=queue,
        body_mb=body_mb,
        read_seconds=read_seconds,
        answer_seconds=answer_seconds,
    )
    from opfa.inference.predictor import Options
    from opfa.serving.run import serve as execute

    options = Options(
        kind=kind,
        text=text,
        text_pair=text_pair,
        choices=choices,
        recipe=recipe,
        tokenizer=tokenizer,
        sequence_tokens=sequence_tokens,
        batch=batch,
    )
    return execute(str(model), options, limits)
