"""Which part of a model a tensor is, by its name and shape alone.

A matrix of zeros alone is pruned where it belongs to the encoder: nobody begins to train one there.
A head or an adapter (LoRA's B) often begins as zeros, so there it is new and has to stay trainable.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

EMBEDDING = re.compile(
    r"embed(?!dings_project|ding_hidden_mapping)|wte|wpe|lm_head\.weight|(^|\.)decoder\.weight|"
    r"vocab_projector"
)
LAYER = re.compile(
    r"^(?P<stack>.*?)(?:^|\.)(?:(?:albert_)?layers?|h|blocks?|attentions|ffns)\.(?P<number>\d+)\."
    r"(?P<kind>.+)$"
)
ADAPTER = re.compile(  # modules that PEFT and the adapters library put into a model
    r"(^|\.)(\w*adapters?(_\w+)?\.|(\w*lora|ia3|hada|lokr|\w*oft|p?vera_lambda|\w?hra|shira|hira|road|"
    r"c3a|fourierft|waveft|adamss|beft|deft|frod|lily|miss|osf|peanut|poly|shadow|supertuning|"
    r"prefix)_\w)"
)
APART = re.compile(  # what tools store in place of a weight, or beside it, until it is permanent
    r"(weight|bias)_orig$|parametrizations\.(weight|bias)\.original\d*$|mask_scores$"
)
MASK = re.compile(r"(^|[._])mask$")
TABLE = re.compile(r"weight(_quantized)?$")  # ONNX Runtime's quantizer appends a word
NORM = re.compile(r"(weight|gamma|beta)$")
HEAD_ROWS = re.compile(r"(query|key|value|[qkv]_lin|[qkv]_proj)\.weight$")
HEAD_COLUMNS = re.compile(r"(attention\.output\.dense|out_lin|out_proj|o_proj|attn\.Wo)\.weight$")
FUSED = re.compile(r"attn\.Wqkv\.weight$")
GENERIC = {"dense", "self", "linear"}  # parts of names that tell nothing apart
READING_ORDER = (  # as data flow through a layer
    re.compile(r"Wqkv|query|q_(lin|proj)"),
    re.compile(r"key|k_(lin|proj)"),
    re.compile(r"value|v_(lin|proj)"),
    re.compile(r"att\w*\."),
    re.compile(r"intermediate|lin1|Wi|fc1|gate|up_proj"),
)
PARTS = ("encoder", "embeddings", "pooler", "heads", "norms", "biases", "other")
Value = TypeVar("Value")


class Layer(NamedTuple):
    """The place of a tensor in a stack of numbered layers."""

    stack: str
    number: int
    kind: str


def layer_of(name: str) -> Layer | None:
    """Where a tensor of a numbered layer is; None for all others."""
    if (found := LAYER.match(name)) is None:
        return None
    return Layer(found["stack"], int(found["number"]), found["kind"].removesuffix(".weight"))


def by_layer(values: Mapping[str, Value]) -> dict[tuple[str, int], dict[str, Value]]:
    """What is known of tensors in numbered layers: by (stack, number) in order, then by kind."""
    found: dict[tuple[str, int], dict[str, Value]] = {}
    for name, value in values.items():
        if layer := layer_of(name):
            found.setdefault((layer.stack, layer.number), {})[layer.kind] = value
    return dict(sorted(found.items()))


def short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Short names for kinds of matrices, in the order in which data flow through a layer."""

    def place(kind: str) -> tuple[int, str]:
        found = [i for i, pattern in enumerate(READING_ORDER) if pattern.search(kind)]
        return min(found, default=len(READING_ORDER)), kind

    kinds = sorted(set(kinds), key=place)
    words = {kind: [w for w in kind.split(".") if w not in GENERIC] or [kind] for kind in kinds}
    lasts = [parts[-1] for parts in words.values()]
    short = {k: " ".join(w[-2:] if lasts.count(w[-1]) > 1 else w[-1:]) for k, w in words.items()}
    is_clear = len(set(short.values())) == len(short)
    return short if is_clear else {kind: kind for kind in kinds}


def layer_labels(layers: Sequence[tuple[str, int]]) -> list[str]:
    """What to call numbered layers: by number, and by stack too where there are several."""
    is_one_stack = len({stack for stack, _ in layers}) == 1
    return [str(n) if is_one_stack else f"{stack}.{n}".lstrip(".") for stack, n in layers]


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the matrix of a linear layer, which pruning is about."""
    return len(shape) == 2 and name.endswith("weight") and not EMBEDDING.search(name)


def is_pruned(name: str, shape: Sequence[int], num_zeros: int) -> bool:
    """Whether a matrix is pruned: it has zeros, and live weights unless it is of the encoder."""
    has_live = num_zeros < math.prod(shape)
    return num_zeros > 0 and (has_live or part_of(name, shape) not in ("heads", "other"))


def problem_of_storage(name: str) -> str | None:
    """Why a tensor's name shows that a weight is stored apart from its mask, or in parts."""
    if not APART.search(name):
        return None
    if name.endswith("mask_scores"):
        return f"{name}: scores from which masks are made; apply the masks to the weights first"
    is_new = "parametrizations" in name
    function = "parametrize.remove_parametrizations" if is_new else "prune.remove"
    return (
        f"{name}: this weight is stored apart from its mask or in parts; call "
        f"torch.nn.utils.{function}(layer, ...) for each such layer, so that its zeros are in its "
        "weight, and save the model again"
    )


def part_of(name: str, shape: Sequence[int]) -> str:
    """One of `PARTS`: what a tensor without zeros counts to."""
    if len(shape) == 1:
        if name.endswith("bias"):
            return "biases"
        return "norms" if NORM.search(name) else "other"
    if EMBEDDING.search(name) and TABLE.search(name):
        return "embeddings"
    if not is_matrix(name, shape) or ADAPTER.search(name):
        return "other"
    if layer_of(name):
        return "encoder"
    words = {"pooler": "pooler", "embed": "embeddings"}  # the latter of a projection behind them
    return next((part for word, part in words.items() if word in name), "heads")


@dataclass(frozen=True)
class NumHeads:
    """How many heads layers have: most of them, and those that have another number."""

    most: int
    own: Mapping[int, int] = field(default_factory=dict)

    def of(self, name: str) -> int:
        """The heads of the layer that a tensor is in."""
        layer = layer_of(name)
        return self.most if layer is None else self.own.get(layer.number, self.most)


def heads_of(name: str, num_heads: NumHeads | None) -> tuple[int, int] | None:
    """Where an attention matrix holds its heads: (dimension, number of groups of lines)."""
    if num_heads is None or not (count := num_heads.of(name)):
        return None
    if FUSED.search(name):
        return 0, 3 * count
    if HEAD_ROWS.search(name):
        return 0, count
    return (1, count) if HEAD_COLUMNS.search(name) else None


def paired_names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Which names of two checkpoints mean the same tensor: equal, or one is the other behind the
    path of a base model (`bert.`), and no second one is.
    """
    ours, theirs = dict.fromkeys(ours), dict.fromkeys(theirs)
    found = [(name, name) for name in ours if name in theirs]
    ours_left, theirs_left = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    found += [(name, end) for name in ours_left for end in _endings(name) if end in theirs_left]
    found += [(end, name) for name in theirs_left for end in _endings(name) if end in ours_left]
    counts = Counter(one for one, _ in found), Counter(other for _, other in found)
    pairs = {a: b for a, b in found if counts[0][a] == counts[1][b] == 1}
    return {name: pairs[name] for name in ours if name in pairs}


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
