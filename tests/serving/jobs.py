"""A SageMaker training container without SageMaker: a directory in the place of /opt/ml, and the
variables that both SDKs' containers set.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

SAGEMAKER = Path(__file__).parents[2] / "launch/sagemaker"
sys.path.insert(0, str(SAGEMAKER))


def environment(
    root: Path,
    hyperparameters: dict[str, Any],
    channels: dict[str, Path] | None = None,
    **more: Any,
) -> dict[str, str]:
    """The variables of a container whose /opt/ml is `root`; `more` are others, or replace some."""
    (root / "model").mkdir(parents=True, exist_ok=True)
    (root / "output").mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "SM_HPS": hyperparameters,
        "SM_CHANNELS": sorted(channels or {}),
        "SM_MODEL_DIR": str(root / "model"),
        "SM_OUTPUT_DIR": str(root / "output"),
        "SM_HOSTS": ["algo-1"],
        "SM_CURRENT_HOST": "algo-1",
        **{f"SM_CHANNEL_{name.upper()}": str(path) for name, path in (channels or {}).items()},
        **more,
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}


def through_s3(directory: Path, deleted: list[str]) -> None:
    """What SageMaker does to checkpoints over an interruption: only files come back, without links,
    rights and times, and what was deleted comes back too.
    """
    content = {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
    content |= {Path(name): b"" for name in deleted}
    shutil.rmtree(directory)
    for name, data in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
