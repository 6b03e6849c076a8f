"""Where the kernels' library comes from, and what is said where it can't be had."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opfa.errors import RunError
from opfa.runtime import build, compiler, library

ROOT = Path(__file__).parents[2]
WITHOUT = {"CC": "", "PATH": ""}  # of an environment: no compiler
USE = """
import sys
from types import ModuleType
sys.modules["opfa.runtime"] = room = ModuleType("opfa.runtime")  # without torch, which takes long
room.__path__ = [sys.argv[1]]
from opfa.runtime.build import loaded, why_not
print(why_not() or loaded()._name)
"""
COMPILER = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
sleep 0.1
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test looks for the library anew."""
    build.loaded.cache_clear()
    yield
    build.loaded.cache_clear()


@pytest.fixture(scope="session")
def compiled() -> Path:
    """The library that the other tests use too."""
    if why := build.why_not():
        pytest.skip(why)
    return Path(build.loaded()._name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user, and an empty place for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache/opfa/runtime"


@pytest.fixture
def quick(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A compiler that takes no time; and where it worked."""
    made = []

    def copy(work: Path) -> Path:
        made.append(work)
        return Path(shutil.copy(compiled, work / "copy.so"))

    monkeypatch.setattr(build, "compile_library", copy)
    return made


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WITHOUT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiler, "has", lambda _: False)


def test_a_library_is_compiled_once_and_then_found(cache: Path, quick: list[Path]) -> None:
    first = build.loaded()._name
    assert Path(first).parent == cache and len(quick) == 1
    assert {path.name for path in cache.iterdir()} == {Path(first).name, "lock"}
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    build.loaded.cache_clear()
    assert build.loaded()._name == first and len(quick) == 1


def test_the_library_of_a_wheel_comes_first(
    cache: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None
) -> None:
    shutil.copytree(compiler.KERNELS, tmp_path / "kernels")
    monkeypatch.setattr(build, "KERNELS", tmp_path / "kernels")
    assert build.why_not() == compiler.MISSING
    shipped = Path(shutil.copy(compiled, tmp_path / "kernels" / build.file_name(compiled)))
    assert build.why_not() is None and build.loaded()._name == str(shipped)
    assert not list(cache.glob("*.so"))


def test_a_library_of_other_sources_is_not_loaded(
    cache: Path, quick: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build.loaded()._name
    build.loaded.cache_clear()
    shutil.copytree(compiler.KERNELS, tmp_path / "kernels")
    (tmp_path / "kernels/ops.h").write_text("/* changed */")
    monkeypatch.setattr(build, "KERNELS", tmp_path / "kernels")
    assert build.loaded()._name != old and len(quick) == 2


@pytest.mark.parametrize("length", [0, 100, 20_000, None])
def test_a_damaged_library_is_compiled_anew(
    cache: Path, quick: list[Path], length: int | None
) -> None:
    path = Path(build.loaded()._name)
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    path.unlink()
    path.write_bytes(damaged if length is None else content[:length])
    build.loaded.cache_clear()
    assert Path(build.loaded()._name).read_bytes() == content and len(quick) == 2


def test_what_cannot_be_loaded_is_passed_over(
    cache: Path, quick: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "foreign").write_bytes(b"\x7fELF of another machine")
    cache.mkdir(0o700, parents=True)
    foreign = shutil.copy(tmp_path / "foreign", cache / build.file_name(tmp_path / "foreign"))
    assert build.loaded()._name != str(foreign) and len(quick) == 1


@pytest.mark.parametrize("is_link", [False, True])
def test_where_others_can_write_nothing_is_loaded(
    cache: Path, quick: list[Path], tmp_path: Path, is_link: bool
) -> None:
    planted = tmp_path / "planted" if is_link else cache
    planted.mkdir(parents=True, exist_ok=True)
    if is_link:
        cache.parent.mkdir(parents=True)
        cache.symlink_to(planted)
    else:
        planted.chmod(0o777)
    (tmp_path / "made").mkdir()
    library_of_others = build.compile_library(tmp_path / "made")
    shutil.copy(library_of_others, planted / build.file_name(library_of_others))
    found = Path(build.loaded()._name)
    assert found.parent == tmp_path / "tmp" / f"opfa-runtime-{os.getuid()}"


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_directory(
    cache: Path, quick: list[Path], tmp_path: Path
) -> None:
    cache.parent.parent.write_text("a file, where root can't make a directory either")
    found = Path(build.loaded()._name)
    assert found.parent == tmp_path / "tmp" / f"opfa-runtime-{os.getuid()}"
    build.loaded.cache_clear()
    assert build.loaded()._name == str(found) and len(quick) == 1


def test_a_planted_temporary_directory_is_refused_with_both_reasons(
    cache: Path, quick: list[Path], tmp_path: Path
) -> None:
    cache.parent.parent.write_text("")
    planted = tmp_path / "tmp" / f"opfa-runtime-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    told = build.why_not()
    assert told is not None and "Not a directory" in told and "others can write here" in told


def test_without_a_compiler_one_sentence_says_what_to_install(
    cache: Path, no_compiler: None
) -> None:
    assert build.why_not() == compiler.MISSING
    with pytest.raises(RunError, match=r"install gcc or clang, or pip install .opfa\[runtime\]"):
        build.loaded()
    assert not list(cache.glob("*.so"))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_compilers_are_tried_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None
) -> None:
    for name in ("mine", "gcc", "clang"):
        script(tmp_path / "bin" / name, "#!/bin/sh\n")
    (tmp_path / "bin/cc").symlink_to("gcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert compiler.compilers() == [["cc"], ["clang"]]  # gcc is the same
    monkeypatch.setenv("CC", "mine -march=armv8-a 'a b'")
    monkeypatch.setattr(compiler, "has", lambda _: True)
    expected = [["mine", "-march=armv8-a", "a b"], ["cc"], ["clang"], compiler.ZIG]
    assert compiler.compilers() == expected
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiler.compilers() == expected[1:]


def test_a_compiler_that_fails_is_named_with_its_first_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None
) -> None:
    said = "echo 'In function x' >&2; echo 'ops.c:1: error: no vectors' >&2; echo more >&2; exit 1"
    script(tmp_path / "bin/gcc", f"#!/bin/sh\n{said}\n")
    script(tmp_path / "bin/clang", "#!/bin/sh\nexit 3\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert build.why_not() == "gcc: ops.c:1: error: no vectors; clang: exit code 3"
    assert {path.name for path in cache.iterdir()} == {"lock"}


def test_of_processes_that_start_together_one_compiles(
    cache: Path, compiled: Path, tmp_path: Path
) -> None:
    mine = script(tmp_path / "bin/mycc", COMPILER.format(library=compiled))
    environment = os.environ | {"CC": f"{mine} -mine", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", USE, str(ROOT / "opfa/runtime")]
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **options) for _ in range(3)]
    told = {each.communicate(timeout=300)[0].strip() for each in started}
    assert len(told) == 1 and Path(told.pop()).parent == cache
    calls = (tmp_path / "bin/calls").read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1
    assert all(call.startswith("-mine ") for call in calls)


def test_a_level_that_a_compiler_does_not_know_is_left_out(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = "case \"$*\" in *-mnew*) echo 'error: unknown -mnew'; exit 1;; esac\n"
    head, rest = COMPILER.format(library=compiled).split("\n", 1)
    mine = script(tmp_path / "bin/mycc", f"{head}\n{old}{rest}")
    levels = {"avx512bf16": (64, ["-mnew"]), "plain": (16, [])}
    monkeypatch.setattr(compiler, "LEVELS", {compiler.machine(): levels})
    (tmp_path / "work").mkdir()
    compiler.compile_into(tmp_path / "work", [str(mine)])
    calls = (tmp_path / "bin/calls").read_text()
    assert "-DOPFA_WITHOUT_AVX512BF16 -c" in calls and "avx512bf16.o" not in calls


def test_a_level_that_the_cpu_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := build.why_not():
        pytest.skip(why)
    library.library.cache_clear()
    monkeypatch.setenv("OPFA_RUNTIME_LEVEL", "avx1024")
    allowed = "must be one of (.*, )?(plain|neon), which this CPU has"
    with pytest.raises(RunError, match=f"^OPFA_RUNTIME_LEVEL = 'avx1024': {allowed}$"):
        library.library()
    library.library.cache_clear()
