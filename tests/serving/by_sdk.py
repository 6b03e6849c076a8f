"""submit.py with the real classes of Amazon's SDK, of whichever version this interpreter has.

    python by_sdk.py ARGUMENTS OF submit.py       prints the requests that would have gone to Amazon

Every client is stopped at the one place that all of them pass, so nothing leaves this machine. What
is uploaded under sm_drivers goes to the directory OPFA_DRIVERS, if that is set.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import boto3  # pyright: ignore[reportMissingImports]
import botocore.client  # pyright: ignore[reportMissingImports]
import requests.adapters
from jobs import SAGEMAKER

import submit  # isort: skip - jobs says where it is

assert SAGEMAKER.is_dir()

ANSWERS: dict[str, Any] = {
    "GetCallerIdentity": {"Account": "111122223333", "Arn": "arn:aws:iam::111122223333:user/me"},
    "CreateTrainingJob": {"TrainingJobArn": "arn:aws:sagemaker:us-east-1:111122223333:job/x"},
    "DescribeTrainingJob": {
        "TrainingJobName": "x",
        "TrainingJobArn": "arn:aws:sagemaker:us-east-1:111122223333:job/x",
        "TrainingJobStatus": "InProgress",
    },
    "GetRole": {
        "Role": {
            "Arn": "arn:aws:iam::111122223333:role/r",
            "AssumeRolePolicyDocument": {
                "Statement": [
                    {
                        "Effect": "Allow",
                        "Principal": {"Service": "sagemaker.amazonaws.com"},
                        "Action": "sts:AssumeRole",
                    }
                ]
            },
        }
    },
    "ListBuckets": {"Buckets": [{"Name": "sagemaker-us-east-1-111122223333"}]},
    "SimulatePrincipalPolicy": {"EvaluationResults": [{"EvalDecision": "allowed"}]},
}


def main() -> None:
    """Start a job, and print what was asked of the service and which keys were uploaded."""
    asked: list[dict[str, Any]] = []
    keys: list[str] = []

    def answer(_: object, operation: str, values: dict[str, Any]) -> Any:
        if operation == "PutObject":
            keys.append(values["Key"])
            if "/sm_drivers/" in values["Key"] and (place := os.environ.get("OPFA_DRIVERS")):
                path = Path(place, values["Key"].partition("/sm_drivers/")[2])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(values["Body"].read())
        if operation == "CreateTrainingJob":
            asked.append(values)
        return ANSWERS.get(operation, {})

    def refuse(*_: object, **__: object) -> None:  # the SDK's reports of how it is used
        raise requests.ConnectionError

    setattr(botocore.client.BaseClient, "_make_api_call", answer)  # noqa: B010
    setattr(requests.adapters.HTTPAdapter, "send", refuse)  # noqa: B010
    boto = boto3.Session("id", "secret", region_name="us-east-1")
    given = submit.parser().parse_intermixed_args(sys.argv[1:])
    job = submit.plan(given)
    if job["sdk"] == 3:
        from sagemaker.core.helper.session_helper import Session  # pyright: ignore[reportMissingImports]
    else:
        from sagemaker.session import Session  # pyright: ignore[reportMissingImports]
    submit.start(job, given.recipe, wait=False, session=Session(boto_session=boto))
    print(json.dumps({"asked": asked, "keys": keys}))


if __name__ == "__main__":
    main()
