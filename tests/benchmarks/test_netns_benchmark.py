"""The benchmark of two hosts: a cable lets through no more than it is told, and every row says what was predicted."""

import json
import os
import shutil

import pytest
from click.testing import CliRunner

from benchmarks import namespaces
from benchmarks.__main__ import main
from benchmarks.namespaces import Hosts


@pytest.fixture
def can_make_hosts():
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    try:
        with Hosts() as hosts:
            hosts.mpirun()
    except RuntimeError as error:
        pytest.skip(f"no two hosts here: {error}")


def test_the_cable_limits_sums(can_make_hosts, tmp_path):
    before = set(os.listdir("/run/netns"))
    output = tmp_path / "netns.json"
    done = CliRunner().invoke(
        main, ["netns", "--preset", "pico", "--rounds", "2", "--megabits", "100", "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    limited, free = found["rows"]
    assert (limited["megabits"], free["megabits"]) == (100, None)
    # Headers take some of it, the bucket's first bytes are free.
    assert 0 < limited["bandwidth"] < 1.1 * 100e6 / 8
    for row in found["rows"]:
        for mode in ("none", "after", "during"):
            assert row[mode]["seconds"]["median"] > 0
            assert row[mode]["predicted_seconds"] > 0
        none, during, after = (row[mode]["predicted_seconds"] for mode in ("none", "during", "after"))
        # Up to the rounding of what is added in another order.
        assert none <= during * (1 + 1e-9) <= after * (1 + 1e-9) ** 2
    assert output.with_suffix(".png").stat().st_size > 1000
    assert set(os.listdir("/run/netns")) <= before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda patch: patch.setattr(os, "geteuid", lambda: 1000), "need root"),
        (lambda patch: patch.setattr(shutil, "which", lambda name: None), "there is no `ip`: apt install iproute2"),
        (lambda patch: patch.setattr(namespaces, "CABLE", "a name that is too long for a device"), "failed: "),
    ],
)
def test_what_is_refused_is_said_and_nothing_left(spoil, message, monkeypatch):
    if message != "need root" and os.geteuid() != 0:
        pytest.skip("needs root")
    spoil(monkeypatch)
    done = CliRunner().invoke(main, ["netns"])
    assert done.exit_code == 1
    assert message in done.output
    assert not os.path.exists("/run/netns") or not [
        name for name in os.listdir("/run/netns") if name.startswith(f"ttr{os.getpid()}-")
    ]
