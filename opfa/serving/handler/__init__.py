"""What answers in a SageMaker container: `opfa pack` copies this folder to code/opfa_handler.

    request -> input_fn -> rows -> predict_fn -> answers, as `opfa predict` gives them -> output_fn

It runs where opfa is not, beside whatever transformers the container has. So it imports numpy,
tokenizers, onnxruntime and its own files alone, and does with them what opfa's rooms `tasks` and
`inference` do with torch and transformers. Tests compare every kind of task.
"""

from .functions import input_fn, model_fn, output_fn, predict_fn

__all__ = ["input_fn", "model_fn", "output_fn", "predict_fn"]
