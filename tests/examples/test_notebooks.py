"""The notebooks in examples/: every cell runs, at small size; stored results are there and are not errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# As a notebook shows it: a figure is closed, not shown on a screen that is not there.
SHOWN = "import matplotlib; matplotlib.use('Agg')\n"


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path):
    """In a process of its own, from the folder it lies in; what it writes goes to a temporary folder."""
    script = tmp_path / f"{path.stem}.py"
    script.write_text(SHOWN + "\n\n".join("".join(cell["source"]) for cell in cells(path, "code")))
    environment = {**os.environ, "TTR_NOTEBOOK": "small", "TMPDIR": str(tmp_path)}
    search = [str(EXAMPLES.parent / part) for part in ("kernels", "", "cli")]
    environment["PYTHONPATH"] = os.pathsep.join([*search, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, script], cwd=EXAMPLES, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_holds_its_results(path):
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures, "no stored picture: jupyter nbconvert --to notebook --execute --inplace"
    assert path.stat().st_size < 1 << 20
    assert "\n" in path.read_text()[-1:]
