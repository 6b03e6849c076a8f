"""What a model directory holds, looked at before transformers sees it: code, missing files, web
pages under the name of weights, absurd numbers. Nothing is executed here.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from opfa.errors import ModelError, brief, not_plain, opening, shown

CONFIG, TOKENIZER_CONFIG, ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"
QUANTIZED = "quantization_config"  # of a configuration
PACKED = "packed.safetensors"  # what `opfa pack` writes: no weights, but what the runtime maps
CODE_KEYS = ("auto_map", "custom_pipelines")  # of a configuration: where its own code is
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
COUNTS = re.compile(r"layer|label|block|head|group|expert|depth|stage", re.IGNORECASE)
MOST = 100_000  # layers, labels, heads: transformers makes lists of so many
INT64 = 1 << 63
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
INDEXED = {"model.safetensors": INDEXES[0], "pytorch_model.bin": INDEXES[1]}  # in this order
SHARDS = ("model-*-of-*.safetensors", *WEIGHT_FILES)  # without an index
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[a-z]+)")
MOST_CONFIG = 1 << 24  # bytes
CONFIGS = (  # what can name code
    CONFIG,
    TOKENIZER_CONFIG,
    ADAPTER,
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
START = 256  # bytes of a file that tell what it is not
NOT_A_MODEL = (  # what is found under the name of a file that was never fetched
    (
        re.compile(rb"version https?://[\w.-]+/spec/v\d"),
        "is a git-lfs pointer, not the file itself; fetch it with: git lfs pull",
    ),
    (re.compile(rb"(?i)<(!doctype html|html|head)"), "is a web page (HTML), not the file itself"),
    (re.compile(rb"(?i)<(\?xml|error)"), "is an XML message, not the file itself"),
)
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.bpe", "*.spm", "*.tiktoken", "*.jinja")


def check_content(path: Path, what: object = None) -> None:
    """Refuse what is no plain file, and a git-lfs pointer or a web page in the place of one."""
    what = what or path
    if problem := not_plain(path):
        raise ModelError(f"{what}: {problem}")
    with opening(what), path.open("rb") as file:
        start = file.read(START)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, problem in NOT_A_MODEL:
        if pattern.match(text):
            raise ModelError(f"{what}: {problem}")


def check_weights(path: Path) -> None:
    """Refuse what can't be a file of weights by its first bytes."""
    check_content(path)
    if not path.stat().st_size:
        raise ModelError(f"{path}: is empty")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file."""
    check_content(path)
    if path.stat().st_size > MOST_CONFIG:
        raise ModelError(f"{path}: has more than {MOST_CONFIG:,} bytes")
    with opening(path, ModelError, "not valid JSON"):
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds {shown(values)}, not a JSON object")
    return values


def asks_for_code(values: Any) -> list[str]:  # Any: what JSON can hold
    """The keys of a configuration that name code."""
    return [key for key in CODE_KEYS if isinstance(values, dict) and key in values]


def code_refused(what: object, keys: Iterable[str]) -> ModelError:
    """What to say of a configuration that asks for code of its own."""
    asked = f"asks for code of its own ({', '.join(keys)})"
    return ModelError(f"{what} {asked}, and remote code is never run")


def check_directory(
    directory: Path, is_type: Callable[[str], bool], is_tokenizer: Callable[[str], bool]
) -> dict[str, Any]:
    """Refuse a directory whose configurations can't be used as they are; the values of its
    `config.json`, if there is one. The functions say which model types and tokenizer classes
    transformers has itself, whatever code comes with them.
    """
    values = {}
    for path in sorted(directory.iterdir()):
        if path.name in CONFIGS:
            values[path.name] = read_object(path)
        elif path.is_file() and any(path.match(pattern) for pattern in TOKENIZER_FILES):
            check_content(path)
    config = values.get(CONFIG, {})
    is_known = _is(config.get("model_type"), is_type)
    for name, found in values.items():
        is_own = name == TOKENIZER_CONFIG and _is(found.get("tokenizer_class"), is_tokenizer)
        if (keys := asks_for_code(found)) and not (is_own or (is_known and name != ADAPTER)):
            raise code_refused(directory / name, keys)
    _check_values(directory / CONFIG, config)
    return config


def _is(value: Any, known: Callable[[str], bool]) -> bool:  # Any: what JSON can hold
    return isinstance(value, str) and known(value)


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse numbers that no model has, and a file or kernel from elsewhere."""
    for key, value in _leaves(config):
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ModelError(f"{path}: {key} = {value}: not a finite number")
        most = MOST if COUNTS.search(key) else INT64 - 1
        if isinstance(value, int) and abs(value) > most:
            found = value if abs(value) < INT64 else "more than 64 bits"
            raise ModelError(f"{path}: {key} = {found}: at most {most} is allowed")
        if key in KERNEL_KEYS and isinstance(value, str) and "/" in value:
            raise code_refused(path, [f"{key} = {value!r}"])
    names = config.get("architectures")
    if not (names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))):
        raise ModelError(f"{path}: architectures: not a list of names")
    if "transformers_weights" in config:
        raise ModelError(f"{path}: transformers_weights: names another file; remove it")


def _leaves(values: Any) -> Iterable[tuple[str, Any]]:  # Any: what JSON can hold
    """Keys and values, however deep; no recursion, which JSON could exhaust."""
    waiting = [("", values)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((key, item) for item in value)
        else:
            yield key, value


def check_model(directory: Path) -> None:
    """Refuse an adapter, and a directory without a model's configuration."""
    if (directory / ADAPTER).exists():
        advice = "merge it into its model first, with peft's merge_and_unload"
        raise ModelError(f"{directory}: holds an adapter ({ADAPTER}); {advice}")
    if not (directory / CONFIG).exists():
        raise ModelError(f"{directory}: has no {CONFIG}")


def check_plain(directory: Path, config: Mapping[str, Any], method: str) -> None:
    """Refuse an adapter, and weights quantized by another method than ours."""
    check_model(directory)
    quantized = config.get(QUANTIZED, {"quant_method": method})
    found = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if quantized is not None and found != method:
        what = f"weights quantized by {found!r} can't be used; take the model with plain weights"
        raise ModelError(f"{directory / CONFIG}: {QUANTIZED}: {what}")


def weight_map(content: bytes, where: object) -> dict[str, str]:
    """What an index says: in which file each tensor is."""
    with opening(where, ModelError, "not an index"):
        values = json.loads(content.decode())
    found = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{where}: not an index: has no weight_map")
    for name, file in found.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise ModelError(f"{where}: {name}: {str(file)[:80]!r} is no file beside it")
    return found


def check_shards(files: Iterable[str], there: Collection[str], where: object) -> None:
    """Raise `ModelError` that names those of these files which are not there."""
    missing = sorted(set(files) - set(there))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{where}: {missing[0]}{more} is missing; the weights are not complete")


def siblings(name: str) -> list[str]:
    """All files of a numbered one's set, as in model-00001-of-00002; else itself alone."""
    found = NUMBERED.fullmatch(name)
    if found is None or not 0 < int(found[2]) <= int(found[3]):
        return [name]
    stem, count, suffix = found[1], found[3], found[4]
    return [f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)]


def tokenizer_files(directory: Path, names: Mapping[str, str]) -> list[str]:
    """The files that a tokenizer needs and that are not there; `names` are those of its class."""
    others = ("tokenizer.json", "tokenizer.*.json", "*.model", "*.tiktoken", "tekken.json")
    if any(path.is_file() for pattern in others for path in directory.glob(pattern)):
        return []
    if (directory / "vocab.json").is_file() and not (directory / "merges.txt").is_file():
        return ["merges.txt"]
    needed = [names[key] for key in ("vocab_file", "merges_file") if key in names]
    return [file for file in needed if not (directory / file).is_file()]


def packed_problem(config: bytes) -> str:
    """What is wrong with packed weights where others are wanted; `config` may name their model."""
    with opening(CONFIG, ModelError, "not valid JSON"):
        values = json.loads(config)
    made_from = values.get("packed_from") if isinstance(values, dict) else None
    whole = f"the model that it was made from ({brief(made_from)})" if made_from else "its model"
    readers = "opfa.runtime.load, `opfa predict` and `opfa inspect --runtime`"
    return f"is packed for the runtime, and only {readers} read it; give {whole}"


def weight_files(
    names: Iterable[str], where: object, read: Callable[[str], bytes]
) -> tuple[list[str], dict[str, str]]:
    """Which of these files are the weights, first those that transformers would load; and which
    tensors are in which of them, where an index, which `read` reads, says so.
    """
    names = sorted(set(names) - {"quantization.safetensors"})
    if PACKED in names:
        raise ModelError(f"{where}: {packed_problem(read(CONFIG))}")
    for whole, index in INDEXED.items():
        if whole in names:
            return [whole], {}
        if index in names:
            tensors = weight_map(read(index), f"{where}/{index}")
            files = sorted(set(tensors.values()))
            check_shards(files, names, f"{where}/{index}")
            return files, tensors
    for pattern in SHARDS:
        if found := fnmatch.filter(names, pattern):
            check_shards([each for name in found for each in siblings(name)], names, where)
            return found, {}
    raise ModelError(f"{where}: has no weights ({' or '.join(WEIGHT_FILES)})")
