"""The compact file: nothing is lost, nothing damaged is read, and transformers loads it."""

import base64
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from conftest import outside
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM

from opfa.errors import ModelError
from opfa.weights.compact import FILE, CompactFile, write
from opfa.weights.packing import Int8

CORPUS = Path(__file__).parent / "corpus" / "compact.jsonl"
NAMES = ("bert.layer.0.dense.weight", "bert.layer.1.dense.weight")
Header = dict[str, Any]


def small() -> dict[str, Tensor | Int8]:
    """One tensor of every kind, always the same."""
    numbers = torch.Generator().manual_seed(0)
    sparse = torch.randn(6, 50, generator=numbers)
    sparse *= torch.rand(6, 50, generator=numbers) < 0.1
    return {
        NAMES[0]: sparse,
        NAMES[1]: Int8(
            values=torch.arange(-20, 20, dtype=torch.int8).view(4, 10),
            scale=torch.tensor([0.5, 0.25, 1.0, 2.0]),
            mask=torch.rand(4, 10, generator=numbers) < 0.3,
        ),
        "bert.embeddings.weight": torch.randn(5, 4, generator=numbers).bfloat16(),
        "bert.layer.0.dense.bias": torch.randn(6, generator=numbers),
        "bert.position_ids": torch.arange(7).view(1, 7),
        "bert.scalar": torch.tensor(3.5),
        "bert.nothing.weight": torch.empty(0, 4),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / FILE
    write(small(), path, sparse=NAMES[:1])
    return path


def test_every_tensor_comes_back(file: Path) -> None:
    expected, found = small(), dict(CompactFile(file))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor):
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_the_same_tensors_give_the_same_bytes(file: Path, tmp_path: Path) -> None:
    for _ in range(6):  # safetensors orders metadata by chance
        write(small(), tmp_path / "again", sparse=NAMES[:1])
        assert (tmp_path / "again").read_bytes() == file.read_bytes()


def split(data: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def sealed(header: Header, data: bytes) -> bytes:
    """A file whose digest is right, whatever else is wrong: made from the format's page alone."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    header = {**header, "__metadata__": metadata}
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    metadata["sha256"] = sha256(canonical + data).hexdigest()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_reader_written_from_the_page_reads_it(file: Path) -> None:
    header, data = split(file.read_bytes())
    assert header["__metadata__"]["sha256"] in sealed(header, data).decode(errors="replace")
    stored = load_file(file)
    codec = pyarrow.Codec("zstd")
    for name, tensor in CompactFile(file):
        if f"{name}.form" not in stored:
            continue
        kind, n, g, rows, columns = stored[f"{name}.form"].tolist()
        width = (4, 2, 2, 1)[kind]
        frame = stored[f"{name}.values"].numpy().tobytes()
        planes = np.frombuffer(codec.decompress(frame, n * width), np.uint8).reshape(width, n)
        numpy_type = (np.float32, np.float16, np.uint16, np.int8)[kind]
        values = np.ascontiguousarray(planes.T).view(numpy_type)[:, 0]
        if kind == 2:  # BF16: the upper half of an fp32 number
            values = (values.astype(np.uint32) << 16).view(np.float32)
        places = np.arange(n)
        if f"{name}.positions" in stored:
            gaps = codec.decompress(stored[f"{name}.positions"].numpy().tobytes(), g)
            codes = np.frombuffer(gaps, np.uint8)
            places = np.cumsum(codes, dtype=np.int64)[codes != 255] + np.arange(n)
        if kind == 3:
            scale = stored[f"{name}.scale"].numpy()
            products = values * (scale[places // columns] if scale.ndim else scale)
            values = np.where(values == 0, np.float32(2.0**-126), products)
        matrix = np.zeros(rows * columns, np.float32)
        matrix[places] = values
        assert np.array_equal(matrix.reshape(rows, columns), tensor.float().numpy())


def unsealed_damage(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What happens to files by accident: the digest is that of the undamaged one."""
    header, body = split(data)
    for offset in range(0, len(data), max(1, len(data) // 170)):
        flipped = bytes([data[offset] ^ (1 << offset % 8)])
        yield f"bit flipped at {offset}", data[:offset] + flipped + data[offset + 1 :]
    for length in (*range(0, 40, 3), *range(40, len(data), len(data) // 30)):
        yield f"truncated to {length}", data[:length]
    yield "a byte more", data + b"\0"
    yield "two files", data + data
    for length in (0, 1, 2**24 + 1, 2**31, 2**63, 2**64 - 1):
        yield f"header length {length}", struct.pack("<Q", length) + data[8:]
    for text in (b"[]", b"1", b"null", b"{}", b'{"__metadata__":[]}', b"{", b"[" * 100_000):
        yield f"header {text[:20]!r}", struct.pack("<Q", len(text)) + text + body
    for key in ("sha256", "opfa-compact"):
        metadata = {k: v for k, v in header["__metadata__"].items() if k != key}
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        yield f"no {key}", struct.pack("<Q", len(text)) + text + body


def sealed_damage(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What a hostile file may say: its digest is right."""
    header, body = split(data)

    def changed(name: str, **entry: Any) -> bytes:
        return sealed({**header, name: {**header[name], **entry}}, body)

    form = f"{NAMES[0]}.form"
    start = header[form]["data_offsets"][0]
    for index, value in [
        *[(0, v) for v in (-1, 4, 2**62)],
        *[(1, v) for v in (-1, 0, 1, 301, 2**40, 2**62)],
        *[(2, v) for v in (-1, 0, 1, 2**40)],
        *[(3, v) for v in (-6, 0, 1, 2**31, 2**62)],
        *[(4, v) for v in (-50, 0, 1, 2**31, 2**62)],
    ]:
        place = start + 8 * index
        wrong = body[:place] + struct.pack("<q", value) + body[place + 8 :]
        yield f"form[{index}] = {value}", sealed(header, wrong)
    for entry in (
        {"dtype": "F32"},
        {"dtype": "I32", "shape": [10]},
        {"dtype": "Q7"},
        {"shape": [4]},
        {"shape": [2**40]},
        {"shape": [-5]},
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [40, 0]},
        {"data_offsets": [-8, 32]},
    ):
        yield f"form as {entry}", changed(form, **entry)
    for part in ("form", "positions", "values"):
        kept = {k: v for k, v in header.items() if k != f"{NAMES[0]}.{part}"}
        yield f"without {part}", sealed(kept, body)
    yield "without scale", sealed({k: v for k, v in header.items() if "scale" not in k}, body)
    one, other = header[f"{NAMES[0]}.values"], header[f"{NAMES[0]}.positions"]
    swapped = {f"{NAMES[0]}.values": other, f"{NAMES[0]}.positions": one}
    yield "values and positions swapped", sealed({**header, **swapped}, body)
    for version in ("0", "2", "", "one"):
        metadata = {**header["__metadata__"], "opfa-compact": version}
        yield f"version {version!r}", sealed({**header, "__metadata__": metadata}, body)
    frame = one["data_offsets"][0]
    for offset in range(frame, one["data_offsets"][1], 8):
        wrong = body[:offset] + bytes([body[offset] ^ 0xFF]) + body[offset + 1 :]
        yield f"values' frame at {offset}", sealed(header, wrong)


def read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for _ in CompactFile(path):
        pass


def test_every_accident_is_one_clear_error_that_names_the_file(file: Path, tmp_path: Path) -> None:
    cases = list(unsealed_damage(file.read_bytes()))
    assert len(cases) > 200
    for what, data in cases:
        with pytest.raises(ModelError, match=f"{tmp_path}/damaged: ") as error:
            read(tmp_path / "damaged", data)
        assert "\n" not in str(error.value), what


def test_a_hostile_file_is_refused_or_harmless_and_takes_no_memory(
    file: Path, tmp_path: Path
) -> None:
    """Bytes of a value may be any: such a file is as good as another. All else is refused."""
    tracemalloc.start()
    refused = 0
    cases = list(sealed_damage(file.read_bytes()))
    for what, data in cases:
        try:
            read(tmp_path / "hostile", data)
        except ModelError:
            refused += 1
        else:
            assert what.startswith("values' frame"), what
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 40
    assert peak < 1 << 26


def test_a_small_file_can_not_ask_for_much(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds 100,000,000 weights; by its size"):
        write({"weight": torch.zeros(10_000, 10_000)}, tmp_path / FILE, sparse=["weight"])


def test_what_a_fuzzer_found_stays_refused(tmp_path: Path) -> None:
    """Each line is one way of being refused (see fuzz_compact.py) that the tables lack."""
    lines = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    for line in lines:
        with pytest.raises(ModelError):
            read(tmp_path / "found", base64.b85decode(line["file"]))


@pytest.fixture(scope="module")
def compact(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sparse model in compact form."""
    directory = tmp_path_factory.mktemp("compact") / "model"
    shutil.copytree(sparse, directory)
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = json.loads((directory / "sparsity.json").read_text())["tensors"]
    write(state, directory / FILE, sparse=names)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "opfa", "version": "1"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_transformers_loads_the_same_weights(sparse: Path, compact: Path) -> None:
    plain = AutoModelForMaskedLM.from_pretrained(sparse).state_dict()
    loaded, info = AutoModelForMaskedLM.from_pretrained(compact, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


def test_a_loaded_model_is_plain_and_saves_as_one(compact: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(compact)  # without its head: names lose their prefix
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        for name, tensor in model.state_dict().items():
            assert torch.equal(saved.get_tensor(name), tensor)
    assert "opfa" not in (tmp_path / "config.json").read_text()


def test_a_model_loads_in_16_bits_when_asked(sparse: Path, compact: Path) -> None:
    plain = AutoModel.from_pretrained(sparse, dtype=torch.bfloat16).state_dict()
    for name, tensor in (
        AutoModel.from_pretrained(compact, dtype=torch.bfloat16).state_dict().items()
    ):
        assert tensor.dtype == plain[name].dtype
        assert torch.equal(tensor, plain[name])


def test_a_damaged_file_is_refused_by_from_pretrained(compact: Path, tmp_path: Path) -> None:
    shutil.copytree(compact, tmp_path / "model")
    data = bytearray((tmp_path / "model" / FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / "model" / FILE).write_bytes(data)
    with pytest.raises(ModelError, match="is damaged"):
        AutoModel.from_pretrained(tmp_path / "model")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=outside(), check=False)


@pytest.mark.parametrize("order", ["opfa, transformers", "transformers.modeling_utils, opfa"])
def test_importing_opfa_before_or_after_transformers_is_enough(order: str, compact: Path) -> None:
    code = f"import sys, {order}; print(transformers.AutoModel.from_pretrained(sys.argv[1]).dtype)"
    result = python(code, str(compact))
    assert result.stdout == "torch.float32\n", result.stderr


def test_without_opfa_transformers_stops_and_says_why(compact: Path) -> None:
    code = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])"
    result = python(code, str(compact))
    assert result.returncode != 0
    assert "Unknown quantization type, got opfa" in result.stderr
    assert "no file named model.safetensors" in result.stderr


def test_importing_opfa_alone_imports_neither_torch_nor_transformers() -> None:
    code = "import opfa, sys; print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    assert python(code).stdout == "set()\n"
