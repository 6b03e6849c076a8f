"""A fuzzer for packed files, run by hand: python tests/runtime/fuzz_packed.py 500

Each file is a packed one that was changed in one to four places, mostly with a digest that is
right again. Whatever comes, `load` gives a model that computes or raises an `OpfaError`. Files are
read in processes of their own, so that one that crashes is seen.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from networks import CONFIGS, batch, in_8_bits, sparse
from test_packed import HEADS, changed, saved

import opfa
from opfa.compression import quant
from opfa.errors import OpfaError
from opfa.runtime import load
from opfa.weights import sealed

BATCH = 50  # files of a process
NUMBERS = [-1, 0, 1, 2, 6, 63, 64, 127, 128, 191, 192, 255, 256, 287, 288, 1 << 31, 1 << 40]


def damage(header: dict, data: bytearray, generator: np.random.Generator) -> None:
    """Change one place."""
    names = [name for name in header if name != sealed.METADATA]
    matrices = [name for name in names if name.startswith("matrix.")]
    name = str(generator.choice(matrices if generator.random() < 0.8 else names))
    other = str(generator.choice(matrices))
    start, end = header[name]["data_offsets"]
    kind = generator.integers(7)
    if kind <= 1 and 0 <= start < end <= len(data):
        data[generator.integers(start, end)] = generator.integers(256)
    elif kind == 2 and 0 <= start < end <= len(data):
        size = int(generator.choice([1, 4]))
        place = start + generator.integers(max(1, (end - start) // size)) * size
        number = int(generator.choice(NUMBERS)) % (1 << 8 * size)
        data[place : place + size] = number.to_bytes(size, "little")
    elif kind == 3:
        entries = json.loads(header[sealed.METADATA]["matrices"])
        entry = entries[generator.integers(len(entries))]
        key = str(generator.choice(["rows", "columns", "block", "tile", "num_live"]))
        entry[key] = int(generator.choice([entry[key] - 1, entry[key] + 1, *NUMBERS]))
        header[sealed.METADATA]["matrices"] = json.dumps(entries)
    elif kind == 4:
        header[name], header[other] = header[other], header[name]
    elif kind == 5:
        shape = header[name]["shape"]
        shape[generator.integers(len(shape))] += int(generator.choice([-1, 1, 1 << 33]))
    else:
        del data[generator.integers(len(data) + 1) :]


def read(packed: Path, seeds: range) -> None:
    """Load changed files, and compute with those that can be loaded."""
    ways = Counter()
    for seed in seeds:
        generator = np.random.default_rng(seed)

        def change(header: dict, data: bytearray, generator=generator) -> None:
            for _ in range(generator.integers(1, 5)):
                damage(header, data, generator)

        with tempfile.TemporaryDirectory() as work:
            is_sealed = bool(generator.random() < 0.9)
            try:
                model = load(changed(packed, change, Path(work) / "m", is_sealed=is_sealed))
                with torch.no_grad():
                    model(**batch([3, 70, 150], 0))
                ways["computes"] += 1
            except OpfaError as error:
                ways[str(error).partition("packed.safetensors: ")[2][:60] or "other"] += 1
    print(json.dumps(ways))


def main(num_files: int) -> None:
    """Run the fuzzer on fp32, bf16 and int8."""
    ways = Counter()
    with tempfile.TemporaryDirectory() as name:
        plain = sparse(HEADS["sequences"], CONFIGS["bert"])
        path = saved(plain, Path(name) / "model")
        opfa.pack(path, Path(name) / "fp32")
        opfa.pack(path, Path(name) / "bf16", dtype="bf16")
        quant.save(in_8_bits(plain), path / quant.FILE)
        opfa.pack(path, Path(name) / "int8")
        for start in range(0, num_files, BATCH):
            packed = Path(name) / ("fp32", "bf16", "int8")[start // BATCH % 3]
            words = [sys.executable, __file__, str(packed), str(start), str(start + BATCH)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (words, done.returncode, done.stderr[-2000:])
            ways.update(json.loads(done.stdout.splitlines()[-1]))
    for way, count in ways.most_common(30):
        print(f"{count:6} {way}")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(int(sys.argv[1]))
    else:
        read(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])))
