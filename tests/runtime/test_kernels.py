"""The kernels against double precision, at every level of this CPU. The rest, sanitizers and other
machines, is in launch/check_kernels.sh, which takes minutes.
"""

import subprocess
from pathlib import Path

import pytest

from opfa.runtime import build, compiler

KERNELS = Path(__file__).parent / "kernels_test.c"
NETWORKS = 24


def test_every_level_agrees_with_double_precision_and_leaves_no_memory(tmp_path: Path) -> None:
    if (why := build.why_not()) or not compiler.compilers():
        pytest.skip(why or compiler.MISSING)
    library, program = Path(build.loaded()._name), tmp_path / "kernels_test"
    options = ["-std=gnu11", "-O1", "-w", f"-I{compiler.KERNELS}", str(KERNELS), str(library)]
    linking = [f"-Wl,-rpath,{library.parent}", "-lm", "-lpthread", "-o", str(program)]
    subprocess.run([*compiler.compilers()[0], *options, *linking], check=True)
    done = subprocess.run([program, str(NETWORKS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    levels = [line.partition(":")[0] for line in done.stdout.splitlines()[:-1]]
    assert levels and levels[-1] in ("plain", "neon")
    assert f"{NETWORKS} networks" in done.stdout
