"""Where compiled kernels are kept, when they are compiled again, and what is said meanwhile."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from numba.core import config

from ttr_kernels.common import compilation
from ttr_kernels.common.compilation import jit

PACKAGE = Path(compilation.__file__).resolve().parent.parent


def directory_now():
    return compilation.cache_directory.__wrapped__()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A home and a temporary folder of the test's own."""
    monkeypatch.delenv("TTR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    return tmp_path


@pytest.fixture
def blocked(folders, monkeypatch):
    """`TTR_CACHE_DIR` below a plain file: no one, root included, makes a folder there."""
    (folders / "file").write_text("")
    monkeypatch.setenv("TTR_CACHE_DIR", str(folders / "file" / "cache"))
    return folders


def test_the_users_cache_is_the_default(folders):
    directory = directory_now()
    assert directory.parent == folders / "home" / "ttr-gpu"
    assert directory.is_dir()


def test_the_environment_chooses(folders, monkeypatch):
    monkeypatch.setenv("TTR_CACHE_DIR", str(folders / "chosen" / "deep"))
    assert directory_now().parent == folders / "chosen" / "deep"


def test_a_folder_that_cannot_be_made_is_replaced_by_a_private_one(blocked):
    directory = directory_now()
    root = blocked / "shared" / f"ttr-gpu-{os.getuid()}"
    assert directory.parent == root
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert directory_now() == directory


@pytest.mark.parametrize("trap", ["writable by others", "a link"])
def test_a_shared_folder_that_others_can_write_is_not_used(blocked, trap):
    root = blocked / "shared" / f"ttr-gpu-{os.getuid()}"
    if trap == "a link":
        (blocked / "elsewhere").mkdir()
        root.symlink_to(blocked / "elsewhere")
    else:
        root.mkdir()
        root.chmod(0o777)
    assert directory_now() is None


def test_kernels_work_without_a_folder(monkeypatch):
    monkeypatch.setattr(compilation, "cache_directory", lambda: None)

    def double(x):
        for i in range(x.shape[0]):
            x[i] *= 2

    x = np.ones(3)
    jit(double)(x)
    assert (x == 2).all()


def test_kernels_release_the_interpreter_and_keep_nan():
    options = jit(lambda x: x).targetoptions
    assert options["nogil"]
    assert not options["fastmath"] & {"fast", "nnan", "ninf"}


def test_the_setting_of_numba_is_put_back(monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", "elsewhere")
    jit(lambda x: x)
    assert config.CACHE_DIR == "elsewhere"


def test_the_name_changes_with_what_is_compiled(folders, monkeypatch):
    copy = folders / "ttr_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compilation, "__file__", str(copy / "common" / "compilation.py"))
    names = [directory_now().name]
    for source in ("rope/reference.py", "rope/cpu.py", "common/philox.py"):
        with (copy / source).open("a") as file:
            file.write("# changed\n")
        names.append(directory_now().name)
    assert names[0] == names[1], "no compiled kernel depends on a reference"
    assert len(set(names[1:])) == 3


def test_folders_of_old_versions_go(folders):
    root = folders / "home" / "ttr-gpu"
    month_ago = time.time() - 31 * 86400
    for name, age in (("numba-old", month_ago), ("numba-recent", time.time()), ("else-old", month_ago)):
        (root / name).mkdir(parents=True)
        (root / name / "kernel.nbc").write_text("")
        os.utime(root / name, (age, age))
    directory = directory_now()
    assert {path.name for path in root.iterdir()} == {"numba-recent", "else-old", directory.name}


def test_compiling_is_announced_once_and_kept(tmp_path):
    # Two of the smallest kernels.
    script = textwrap.dedent("""
        import numpy as np
        from ttr_kernels.common.reductions import _add
        from ttr_kernels.common.vectors import start_of
        x = np.ones(4, np.float32)
        _add(np.ones((2, 4), np.float32), x)
        assert start_of(x) == x.ctypes.data
        print(x.tolist())
    """)
    environment = {**os.environ, "TTR_CACHE_DIR": str(tmp_path)}

    def run():
        return subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
        )

    cold = run()
    assert cold.stdout == "[3.0, 3.0, 3.0, 3.0]\n"
    assert cold.stderr.count("\n") == 1
    assert cold.stderr.startswith("compiling kernels for this CPU, once, up to a minute (kept in ")
    (directory,) = tmp_path.iterdir()
    assert str(directory) in cold.stderr
    assert len(list(directory.rglob("*.nbc"))) == 2
    warm = run()
    assert (warm.stdout, warm.stderr) == (cold.stdout, "")


ATTENTION = """
import hashlib
import numpy as np
from ttr_kernels.attention import attention
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 300, 2, 32)).astype(np.float32) for _ in range(3))
print(hashlib.sha256(attention(q, k, v).tobytes()).hexdigest())
"""

# Forty steps of two sequences: every phase of the fused step, over more than one piece of keys.
DECODING = """
import hashlib
import numpy as np
from ttr_kernels.decode_step import Architecture, FusedStep
shape = Architecture(
    embed_dim=88, hidden_dim=120, heads=4, kv_heads=2, dim=22, blocks=2, vocabulary=61, features=6, kinds="both",
    time_bias="log", time_scale=3.0, time_span=500.0, rope_base=10000.0, norm_eps=1e-6,
)
rng = np.random.default_rng(0)
vectors = rng.standard_normal(61 * 88 + 500).astype(np.float32)
matrices = (0.1 * rng.standard_normal(150_000)).astype(np.float32)
names = ("absolute.frequency", "absolute.phase", "gap.frequency", "gap.phase", "final_norm")
model = {"table": 0, "project": 0, "head": 2000} | {name: 61 * 88 + 20 * at for at, name in enumerate(names)}
block = {"attention_norm": 0, "qkv": 8000, "output": 30_000, "feed_forward_norm": 99, "up": 50_000, "down": 90_000}
keys, values = np.zeros((2, 2, 2, 150, 2, 22), np.float32)
step = FusedStep(shape, vectors, matrices, model, [block, block], keys, values, np.zeros((2, 2, 150)), span=150)
rate, tau = np.full((2, 2, 4), [[[0.5]], [[3.0]]], np.float32)
digest = hashlib.sha256()
for position in range(40):
    # As if 120 positions had come before: two pieces of keys.
    for array in step(
        np.array([position, 3], np.int32), np.array([2.0, 3.0]) * position, np.array([2.0, 3.0]),
        np.full(2, 120 + position), np.arange(2), rate, tau,
    ):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("script", [ATTENTION, DECODING], ids=["attention", "decoding"])
def test_kernels_read_from_disk_give_the_bits_of_those_just_compiled(script, tmp_path):
    """What kernels call on a row is inlined: of a function with a copy in each kernel, either might run."""
    environment = {**os.environ, "TTR_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=600
        )
        for _ in range(2)
    ]
    assert "compiling kernels" in runs[0].stderr
    assert "compiling kernels" not in runs[1].stderr
    assert runs[0].stdout == runs[1].stdout
