"""The kernels' C sources, made into one library by whatever C compiler there is.

ops.c is compiled once for each level of instructions, and runtime.c chooses between them when the
library is loaded. So a library runs on every CPU of its machine's kind, and none is made for the
CPU that compiles: a home directory may be shared by several.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opfa.errors import RunError, brief
from opfa.extras import has

KERNELS = Path(__file__).parent / "kernels"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
AMX = ["-mavx512vnni", "-mavx512bf16", "-mavx512vbmi2", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
LEVELS = {  # the name of a level: bytes of a vector, and the compiler's options
    "x86_64": {
        "amx": (64, [*AVX512, *AMX]),
        "avx512bf16": (64, [*AVX512, "-mavx512vnni", "-mavx512bf16"]),
        "avx512vnni": (64, [*AVX512, "-mavx512vnni"]),
        "avx512": (64, AVX512),
        "avx2": (32, ["-mavx2", "-mfma"]),
        "plain": (16, []),
    }
}
PLAIN = {"plain": (16, [])}  # NEON where that is a part of the machine
OPTIONS = ["-std=gnu11", "-O3", "-fPIC", "-g0", "-Wall", "-Wextra"]
LINKING = ["-shared"] if sys.platform == "darwin" else ["-shared", "-s", "-lpthread", "-lm"]
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}  # what other systems call these machines
ZIG = [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]  # its default is this very CPU
MOST_SECONDS = 900  # where many share a core
MISSING = 'the runtime needs a C compiler: install gcc or clang, or pip install "opfa[runtime]"'


def machine() -> str:
    """The kind of this machine's CPU: x86_64, aarch64 or another."""
    name = platform.machine().lower()
    return NAMES.get(name, name)


def compilers() -> list[list[str]]:
    """Commands of the C compilers that are there, in the order in which they are tried: $CC, which
    may have options, cc, gcc, clang, and the one of the package ziglang.
    """
    found: dict[str | None, list[str]] = {}
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
        if command and (program := shutil.which(command[0])):
            key = program if len(command) > 1 else os.path.realpath(program)
            found.setdefault(key, command)
    return [*found.values(), *([ZIG] if has("ziglang") else [])]


def compile_library(work: Path) -> Path:
    """The library, made in an empty directory by the first compiler that can.

    Raises `RunError` where there is none, or with what each of them said first.
    """
    problems = []
    for compiler in compilers():
        try:
            return compile_into(work, compiler)
        except RunError as error:
            problems.append(str(error))
    raise RunError("; ".join(problems) or MISSING)


def compile_into(work: Path, compiler: Sequence[str], kind: str | None = None) -> Path:
    """Compile the kernels in a directory for a kind of machine, this one's by default. Levels whose
    options an old compiler doesn't know are left out.

    Raises `RunError` with the first error that the compiler tells.
    """
    levels = LEVELS.get(kind or machine(), PLAIN)
    without = [name for name in levels if not _knows(compiler, levels[name][1], work)]
    objects = [work / "runtime.o"]
    defined = [f"-DOPFA_WITHOUT_{name.upper()}" for name in without]
    commands = [[*defined, "-c", KERNELS / "runtime.c", "-o", objects[0]]]
    for level, (width, options) in levels.items():
        if level not in without:
            objects.append(work / f"{level}.o")
            defined = [f"-DOPFA_LEVEL={level}", f"-DVB={width}"]
            commands.append([*options, *defined, "-c", KERNELS / "ops.c", "-o", objects[-1]])
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda each: _run(compiler, [*OPTIONS, *each], work), commands))
    library = work / f"libopfa{SUFFIX}"
    _run(compiler, [*objects, "-o", library, *LINKING], work)
    return library


def _knows(compiler: Sequence[str], options: Sequence[str], work: Path) -> bool:
    """Whether a compiler accepts the options of a level."""
    try:
        if options:
            _run(compiler, [*options, "-c", "-x", "c", os.devnull, "-o", work / "none.o"], work)
    except RunError:
        return False
    return True


def _run(compiler: Sequence[str], arguments: Sequence[str | Path], work: Path) -> None:
    """Run a compiler, with its own temporary files in `work` too unless the user says where."""
    own = dict.fromkeys(("TMPDIR", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), str(work))
    words, name = [*compiler, *map(str, arguments)], shlex.join(compiler)
    environment = {**own, **os.environ, "LC_ALL": "C"}
    options = {"capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(words, env=environment, timeout=MOST_SECONDS, check=False, **options)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{name}: not done after {MOST_SECONDS} s") from error
    except OSError as error:
        raise RunError(f"{name}: {error}") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines() or [f"exit code {done.returncode}"]
        told = next((line for line in lines if "error" in line.lower()), lines[0])
        raise RunError(f"{name}: {brief(told.strip(), 300)}")
