"""A fuzzer for the reader of compact files, run by hand: python tests/weights/fuzz_compact.py 20000

Hypothesis changes bytes, numbers in the header and parts, mostly with a digest that is right again.
Whatever comes, the reader may return tensors or raise `ModelError`, in little memory. One file for
each way of being refused that is new goes to tests/corpus/compact.jsonl, which a test replays.
"""

import base64
import json
import re
import sys
import tempfile
import tracemalloc
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_compact import CORPUS, FILE, NAMES, read, sealed, small, split

from opfa.errors import ModelError
from opfa.weights.compact import write

MOST_MEMORY = 1 << 26  # bytes


def way(error: ModelError) -> str:
    """What was wrong, without numbers and names."""
    cause = error.__cause__
    text = str(error).partition(": ")[2] if cause is None else f"{type(cause).__name__}: {cause}"
    return re.sub(r"-?\d[\d,]*|[\w.]+\.(form|values|positions|scale|weight)", "#", text)[:80]


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """A compact file that was changed in one to four places."""
    header, body = split(data)
    content = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["byte", "number", "drop", "rename", "cut", "insert", "entry"]))
        name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"}) or ["none"]))
        place = draw(st.integers(0, max(0, len(content) - 8)))
        if kind == "byte" and content:
            content[place] = draw(st.integers(0, 255))
        elif kind == "number":
            number = draw(st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300))
            content[place // 8 * 8 : place // 8 * 8 + 8] = number.to_bytes(8, "little", signed=True)
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, 60))]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=20))
        elif kind == "drop":
            header.pop(name, None)
        elif kind == "rename" and name in header:
            other = draw(st.sampled_from([f"{NAMES[0]}.form", "x.form", "x.scale", ""]))
            header[other] = header[name]
        elif name in header:
            key = draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
            value = draw(
                st.lists(st.integers(-2, 2**64) | st.integers(0, 400), max_size=3)
                | st.sampled_from(["U8", "I64", "F32", "F16", "BOOL", "F4", 7, None])
            )
            header[name] = {**header[name], key: value}
    if draw(st.booleans()) or draw(st.booleans()):
        return sealed(header, bytes(content))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(content)


def main(num_examples: int) -> None:
    """Run the fuzzer."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / FILE
        write(small(), path, sparse=NAMES[:1])
        lines = CORPUS.read_text().splitlines() if CORPUS.exists() else []
        found = {json.loads(line)["way"] for line in lines}

        @settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            phases=[Phase.generate],
        )
        @given(damaged(path.read_bytes()))
        def fuzz(data: bytes) -> None:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                read(Path(name) / "damaged", data)
            except ModelError as error:
                if way(error) not in found:
                    found.add(way(error))
                    packed = base64.b85encode(data).decode()
                    lines.append(json.dumps({"way": way(error), "file": packed}))
            assert tracemalloc.get_traced_memory()[1] - before < MOST_MEMORY

        tracemalloc.start()
        fuzz()
    CORPUS.parent.mkdir(exist_ok=True)
    CORPUS.write_text("".join(line + "\n" for line in lines))
    print(f"{num_examples} files; {len(found)} ways of being refused")


if __name__ == "__main__":
    main(int(sys.argv[1]))
