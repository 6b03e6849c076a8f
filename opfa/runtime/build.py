"""The kernels' library: found in the wheel or the cache, or compiled once.

Its name has a hash of the sources, so a stale one is never loaded.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from opfa.errors import RunError

KERNELS = Path(__file__).parent / "kernels"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
LEVELS = {  # the name of a level: bytes of a vector, and the compiler's options
    "x86_64": {
        "avx512bf16": (64, [*AVX512, "-mavx512vnni", "-mavx512bf16"]),
        "avx512vnni": (64, [*AVX512, "-mavx512vnni"]),
        "avx512": (64, AVX512),
        "avx2": (32, ["-mavx2", "-mfma"]),
        "plain": (16, []),
    }
}
PLAIN = {"plain": (16, [])}
OPTIONS = ["-std=gnu11", "-O3", "-fPIC", "-Wall", "-Wextra"]


@functools.cache
def compiled() -> Path:
    """The library, compiled if it is nowhere yet. Raises `RunError` without a compiler."""
    name = f"libopfa-{digest()}.so"
    for directory in (KERNELS, cache()):
        if (directory / name).is_file():
            return directory / name
    compiler = find_compiler()
    if compiler is None:
        raise RunError("the runtime needs a C compiler: install gcc, or pip install ziglang")
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as work:
        built = compile_into(Path(work), compiler)
        os.replace(built, cache() / name)
    return cache() / name


def digest() -> str:
    """A hash of the sources and of how they are compiled."""
    found = hashlib.sha256(repr((platform.machine(), LEVELS, OPTIONS)).encode())
    for path in sorted(KERNELS.glob("*.[ch]")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def cache() -> Path:
    """Where a compiled library is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opfa" / "runtime"


def find_compiler() -> list[str] | None:
    """The command of a C compiler: $CC, cc, gcc, clang, or zig's."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


def compile_into(work: Path, compiler: list[str]) -> Path:
    """Compile the kernels for each level in a directory, and give the library."""
    objects = [work / "runtime.o"]
    commands = [[*compiler, *OPTIONS, "-c", KERNELS / "runtime.c", "-o", objects[0]]]
    for level, (width, options) in LEVELS.get(platform.machine(), PLAIN).items():
        objects.append(work / f"{level}.o")
        defined = [f"-DOPFA_LEVEL={level}", f"-DVB={width}"]
        source = ["-c", KERNELS / "ops.c", "-o", objects[-1]]
        commands.append([*compiler, *OPTIONS, *options, *defined, *source])
    library = work / "libopfa.so"
    commands.append([*compiler, "-shared", *objects, "-o", library, "-lpthread", "-lm"])
    for command in commands:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"{' '.join(map(str, command))}: {done.stderr.strip()[:500]}")
    return library
