"""Sentence encoders: how hidden states become one vector, and sentence-transformers' files of it.

    tokens -> encoder -> hidden states [B, T, H] -> mean, or first token [B, H] -> perhaps length 1

The files are written in the form of sentence-transformers 2, which all later versions read. What
its directories can also ask for, such as a dense layer or a prompt, is refused when it is read.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import normalize
from transformers import PretrainedConfig

from opfa.errors import ModelError, opening, shown
from opfa.models.configs import checked_directory
from opfa.models.encoders import has_head
from opfa.storage import foreign
from opfa.storage.files import write_text

VECTOR = "sentence_embedding"  # sentence-transformers' name of the output
MODULES, FOLDER = "modules.json", "1_Pooling"
OWN, CONFIG = "sentence_bert_config.json", "config_sentence_transformers.json"
FILES = (MODULES, f"{FOLDER}/config.json", OWN, CONFIG)
MODES = {"mean": "mean_tokens", "first": "cls_token"}  # as the older files call them
OLD_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
NEW_MODES = {"mean": "mean", "cls": "first"}  # as the files of version 6 call them
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pooling:
    """How a text's hidden states become its vector."""

    mode: Literal["mean", "first"] = "mean"
    is_normalized: bool = True

    def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors [B, H] in fp32 of hidden states [B, T, H]; padding [B, T] is to the right."""
        states = states.float()
        if self.mode == "first":
            vectors = states[:, 0]
        else:
            kept = attention_mask.unsqueeze(-1).to(states.dtype)
            vectors = (states * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return normalize(vectors, dim=-1) if self.is_normalized else vectors


def read_pooling(name: str) -> Pooling | None:
    """What the files of a directory or Hub name say; None where it has no `modules.json`.

    Raises `ModelError` for anything between tokens and vector that is not done here.
    """
    directory = checked_directory("model", name)
    path = directory / MODULES
    if not path.exists():
        return None
    with opening(path, ModelError, "not a list of modules"):
        modules = json.loads(path.read_bytes())
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        places = [module["path"] for module in modules]
    if kinds[:1] != ["Transformer"] or set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ModelError(f"{path}: {shown(kinds)}: only an encoder, its pooling and Normalize work")
    if kinds not in (
        known := [["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]]
    ):
        what = "has no pooling" if "Pooling" not in kinds else f"is not {known[0]} or {known[1]}"
        raise ModelError(f"{path}: {shown(kinds)} {what}")
    if places[:2] != ["", FOLDER]:
        what = f"the encoder must lie beside it, and its pooling in {FOLDER}"
        raise ModelError(f"{path}: {shown(places[:2])}: {what}")
    _check_prompts(directory)
    return Pooling(_mode(directory / FOLDER / "config.json"), kinds[-1] == "Normalize")


def read_tokens(name: str) -> int | None:
    """The longest text in tokens, as `SentenceTransformer(name)` cuts; None where no file says."""
    path = checked_directory("model", name) / OWN
    tokens = foreign.read_object(path).get("max_seq_length") if path.exists() else None
    if tokens is not None and not (type(tokens) is int and tokens > 0):
        raise ModelError(f"{path}: max_seq_length = {shown(tokens)}: must be 1 or more")
    return tokens


def is_sentence_encoder(name: str, config: PretrainedConfig) -> bool:
    """Whether a model without a task's head has the files of sentence-transformers."""
    return not has_head(config) and (checked_directory("model", name) / MODULES).exists()


def files_of(name: str, config: PretrainedConfig) -> dict[str, bytes]:
    """A sentence encoder's files, by name: with them, what is made of it stays one. None of another
    model, nor, with a warning, of one that asks for what is not done here.
    """
    if not is_sentence_encoder(name, config):
        return {}
    try:
        read_pooling(name)
    except ModelError as error:
        log.warning("%s; so the new model has no files of sentence-transformers", error)
        return {}
    return _read_files(checked_directory("model", name))


def _read_files(directory: Path) -> dict[str, bytes]:
    found = {each: directory / each for each in FILES}
    return {each: path.read_bytes() for each, path in found.items() if path.is_file()}


def write_files(files: Mapping[str, bytes], directory: Path) -> None:
    """Write what `files_of` has read."""
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def _mode(path: Path) -> Literal["mean", "first"]:
    values = foreign.read_object(path)
    if "pooling_mode" in values:
        named = values["pooling_mode"]
        found = named if isinstance(named, list) else [named]
        modes = [NEW_MODES.get(mode, mode) if isinstance(mode, str) else mode for mode in found]
    else:
        ours = {old: mode for mode, old in MODES.items()}
        asked = [
            key.removeprefix("pooling_mode_") for key, value in values.items() if value is True
        ]
        modes = [ours.get(old, old) for old in asked if old != "include_prompt"]
    if values.get("include_prompt", True) is not True:
        raise ModelError(
            f"{path}: include_prompt = {shown(values['include_prompt'])}: not done here"
        )
    for mode in ("mean", "first"):
        if modes == [mode]:
            return mode
    raise ModelError(f"{path}: pools by {shown(modes)}; only the mean or the first token works")


def _check_prompts(directory: Path) -> None:
    """Refuse what changes the text before the tokenizer sees it."""
    for file, key, harmless in (
        (CONFIG, "default_prompt_name", None),
        (OWN, "do_lower_case", False),
    ):
        path = directory / file
        values: Mapping[str, Any] = foreign.read_object(path) if path.exists() else {}
        if (value := values.get(key, harmless)) != harmless and value is not None:
            raise ModelError(f"{path}: {key} = {shown(value)}: texts are taken as they are here")


def write_pooling(pooling: Pooling, directory: Path, *, hidden: int, tokens: int) -> None:
    """Write the files with which `SentenceTransformer(DIRECTORY)` gives the same vectors [hidden].

    `tokens` is the longest text in tokens; more is cut off.
    """
    kinds = ["Transformer", "Pooling", *(["Normalize"] if pooling.is_normalized else [])]
    places = ["", FOLDER, "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, place) in enumerate(zip(kinds, places, strict=False))
    ]
    modes = {f"pooling_mode_{mode}": mode == MODES[pooling.mode] for mode in OLD_MODES}
    (directory / FOLDER).mkdir()
    _write(directory / MODULES, modules)
    _write(directory / FOLDER / "config.json", {"word_embedding_dimension": hidden, **modes})
    _write(directory / OWN, {"max_seq_length": tokens, "do_lower_case": False})
    prompts = {"prompts": {}, "default_prompt_name": None}
    _write(directory / CONFIG, {**prompts, "similarity_fn_name": "cosine"})


def copy_files(source: Path, directory: Path) -> None:
    """Copy those files of a directory that are there."""
    write_files(_read_files(source), directory)


def _write(path: Path, values: Any) -> None:  # Any: what JSON can hold
    """Not by `write_json`: it names classes, so nothing is redacted."""
    write_text(path, json.dumps(values, indent=2) + "\n")
