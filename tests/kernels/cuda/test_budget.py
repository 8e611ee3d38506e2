"""Every instantiation of every kernel compiles for three architectures and takes no more than budget.json allows."""

import budget
import pytest

pytestmark = pytest.mark.skipif(bool(budget.missing()), reason=str(budget.missing()))

KERNELS = budget.instantiations()


@pytest.mark.parametrize("folder", sorted({kernel.source.parent.name for kernel in KERNELS}))
def test_kernels_stay_within_their_budget(folder):
    measured = budget.measure(kernel for kernel in KERNELS if kernel.source.parent.name == folder)
    print(budget.text_of(measured))
    allowed = budget.budget()
    for name, by_arch in measured.items():
        assert name in allowed, f"{name} has no budget: python tests/kernels/cuda/budget.py --update"
        for arch, taken in by_arch.items():
            limit = allowed[name][arch]
            # Registers are allocated eight at a time.
            assert taken["registers"] <= -(-limit["registers"] // 8) * 8, f"{name}, {arch}: registers"
            for resource in ("spills", "stack", "shared"):
                assert taken[resource] <= limit[resource], f"{name}, {arch}: {resource}"
            assert taken["blocks"] >= limit["blocks"], f"{name}, {arch}: blocks per multiprocessor"


def test_every_budget_belongs_to_a_kernel():
    assert set(budget.budget()) == {budget.name_of(kernel) for kernel in KERNELS}
