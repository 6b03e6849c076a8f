"""Requests to the real handler of SageMaker's Hugging Face containers, one process a model.

    python by_toolkit.py DIRECTORY < REQUESTS      a JSON list of [body, content type, accept]

Needs sagemaker-huggingface-inference-toolkit, sagemaker-inference and multi-model-server, which a
container has. Its newest release imports a name that transformers 5 lacks; that one is given here.
"""

import json
import sys
from pathlib import Path
from typing import Any

import transformers.file_utils


def main() -> None:
    """Print what each request is answered with: [body, content type], or the error alone."""
    setattr(transformers.file_utils, "is_tf_available", lambda: False)  # noqa: B010
    from mms.context import Context, RequestProcessor  # pyright: ignore[reportMissingImports]
    from mms.metrics.metrics_store import MetricsStore  # pyright: ignore[reportMissingImports]
    from mms.service import PredictionException  # pyright: ignore[reportMissingImports]
    from sagemaker_huggingface_inference_toolkit import handler_service  # pyright: ignore[reportMissingImports]

    service = handler_service.HuggingFaceHandlerService()
    found: list[Any] = []
    for body, content_type, accept in json.load(sys.stdin):
        context = Context("model", str(Path(sys.argv[1])), {}, 1, -1, "1.1.11")
        context.request_processor = [
            RequestProcessor({"Content-Type": content_type, "Accept": accept})
        ]
        context.metrics = MetricsStore(1, "model")
        try:
            answer = service.handle([{"body": body.encode()}], context)[0]
            found.append([answer, context.get_response_content_type(0)])
        except PredictionException as error:
            found.append(error.message)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
