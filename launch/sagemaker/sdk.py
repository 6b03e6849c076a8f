"""A job of submit.py as the objects of Amazon's SDK, version 3 or 2, which are imported here alone.

`session` is the SDK's; by default it makes a new one. No type checker sees the SDK: it is no
package that opfa asks for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_SYSTEMS = {"fsx": "FSxLustre", "efs": "EFS"}
# Python is process 1 then, and SIGTERM comes to it; the SDK's drivers don't hand it on.
COMMAND = "exec python3 train.py"
# Version 2's containers don't either. So the first process there makes the file that stops a run.
WATCH = (
    "trap 'mkdir -p {run} && touch {run}/stop' TERM; "
    "host=$(command -v start_with_right_hostname.sh); "
    'if [ -n "$host" ]; then bash -m "$host" train & else train & fi; '
    "while kill -0 $! 2>/dev/null; do wait $!; status=$?; done; exit $status"
)


def by_version_3(job: Mapping[str, Any], source: Path, session: Any = None) -> Any:
    """A `ModelTrainer` and its channels. `session` is the SDK's, by default a new one."""
    from sagemaker.core import image_uris  # pyright: ignore[reportMissingImports]
    from sagemaker.core.helper.session_helper import Session  # pyright: ignore[reportMissingImports]
    from sagemaker.core.shapes import FileSystemDataSource  # pyright: ignore[reportMissingImports]
    from sagemaker.core.training import configs  # pyright: ignore[reportMissingImports]
    from sagemaker.train import ModelTrainer  # pyright: ignore

    session = session or Session()
    image = job["image"]
    if not isinstance(image, str):
        image = image_uris.retrieve(
            "huggingface",
            session.boto_region_name,
            version=image["transformers"],
            py_version=image["python"],
            base_framework_version=f"pytorch{image['pytorch']}",
            instance_type=job["instance"],
            image_scope="training",
        )
    optional: dict[str, Any] = {}
    if job["checkpoints"]:
        optional["checkpoint_config"] = configs.CheckpointConfig(s3_uri=job["checkpoints"])
    if job["output"]:
        optional["output_data_config"] = configs.OutputDataConfig(s3_output_path=job["output"])
    if job["subnets"]:
        optional["networking"] = configs.Networking(
            subnets=job["subnets"], security_group_ids=job["security_groups"]
        )
    trainer = ModelTrainer(
        training_image=image,
        sagemaker_session=session,
        role=job["role"],
        base_job_name=job["name"],
        source_code=configs.SourceCode(
            source_dir=str(source), command=COMMAND, requirements="requirements.txt"
        ),
        compute=configs.Compute(
            instance_type=job["instance"],
            instance_count=job["instances"],
            enable_managed_spot_training=job["spot"],
        ),
        stopping_condition=configs.StoppingCondition(
            max_runtime_in_seconds=job["seconds"], max_wait_time_in_seconds=job["wait_seconds"]
        ),
        hyperparameters=dict(job["hyperparameters"]),
        environment=dict(job["environment"]),
        **optional,
    ).with_metric_definitions(
        [configs.MetricDefinition(name=name, regex=regex) for name, regex in job["metrics"].items()]
    )

    def place(text: str) -> Any:
        system = _file_system(text)
        return FileSystemDataSource(**system) if system else text

    channels = [
        configs.InputData(channel_name=name, data_source=place(text))
        for name, text in job["channels"].items()
    ]
    return trainer, channels


def by_version_2(job: Mapping[str, Any], source: Path, session: Any = None) -> Any:
    """A `HuggingFace` estimator and its channels. `session` is the SDK's, by default a new one."""
    from sagemaker.huggingface import HuggingFace  # pyright: ignore[reportMissingImports]
    from sagemaker.inputs import FileSystemInput  # pyright: ignore[reportMissingImports]

    image = job["image"]
    versions = {"image_uri": image} if isinstance(image, str) else {
        "transformers_version": image["transformers"],
        "pytorch_version": image["pytorch"],
    }  # fmt: skip
    estimator = HuggingFace(
        entry_point="train.py",
        source_dir=str(source),
        py_version="py312" if isinstance(image, str) else image["python"],
        **versions,
        role=job["role"],
        sagemaker_session=session,
        base_job_name=job["name"],
        instance_type=job["instance"],
        instance_count=job["instances"],
        hyperparameters=dict(job["hyperparameters"]),
        environment=dict(job["environment"]),
        metric_definitions=[{"Name": n, "Regex": regex} for n, regex in job["metrics"].items()],
        checkpoint_s3_uri=job["checkpoints"],
        output_path=job["output"],
        use_spot_instances=job["spot"],
        max_run=job["seconds"],
        max_wait=job["wait_seconds"],
        subnets=job["subnets"] or None,
        security_group_ids=job["security_groups"] or None,
        container_entry_point=["/bin/bash", "-c", WATCH.format(run=job["run"])],
    )

    def place(text: str) -> Any:
        system = _file_system(text)
        if system is None:
            return text if text.startswith("s3://") else f"file://{Path(text).absolute()}"
        return FileSystemInput(**system)

    return estimator, {name: place(text) for name, text in job["channels"].items()}


def _file_system(text: str) -> dict[str, str] | None:
    """The parts of fsx://ID/PATH; None of another place."""
    kind, _, rest = text.partition("://")
    if kind not in FILE_SYSTEMS:
        return None
    name, _, path = rest.partition("/")
    return {
        "file_system_id": name,
        "file_system_type": FILE_SYSTEMS[kind],
        "directory_path": f"/{path}",
        "file_system_access_mode": "rw",
    }
