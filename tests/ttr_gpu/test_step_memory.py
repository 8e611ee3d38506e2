"""A training step in its arena: the same bits as without, even where what is given back becomes NaN, and from the
second step on no arrays and no pages of the system's."""

import json
import subprocess
import sys
from contextlib import nullcontext
from typing import get_args

import numpy as np
import pytest
from model_batches import packed

from ttr_gpu.backend import to_host
from ttr_gpu.config import DropoutConfig, ModelConfig
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import DropoutKey
from ttr_gpu.nn.recompute import Policy, Recompute
from ttr_gpu.train.averages import Averages
from ttr_gpu.train.config import TrainConfig
from ttr_gpu.train.optimizer import Optimizer
from ttr_kernels.common.arena import Arena

DROPOUT = DropoutConfig(attention=0.2, feed_forward=0.1, residual=0.3)
# Batches of other sizes than the one before, each twice.
UNEQUAL = [[300, 212, 80, 432], [20] * 40 + [9, 215]]
LENGTHS = ([20, 3, 17], [20, 3, 17], [33, 9, 1, 40], [2, 2], [2, 2], [33, 9, 1, 40])


def trained(arena=None, backend=None, policy="none", optimizer="adamw", scale=1.0, steps=6, **changes):
    """Losses of some steps of two batches each, and the weights after them."""
    fields = {
        "vocabulary_size": 11, "embed_dim": 32, "hidden_dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "time_scale": 3.0, "time_span": 500.0, "time_features_dim": 6, "window": 9, "dropout": DROPOUT,
    }  # fmt: skip
    model = TransformerModel(
        ModelConfig(**{**fields, **changes}), seed=3, **({} if backend is None else {"backend": backend})
    )
    update, averages = Optimizer(model, TrainConfig(optimizer=optimizer)), Averages(model, 0.5)
    losses = []
    for step, lengths in enumerate(LENGTHS[:steps], 1):
        with nullcontext() if arena is None else arena.step():
            model.zero_gradients()
            for half in (0, 1):
                loss, saved = model.loss_forward(
                    packed(lengths, 11, seed=2 * step + half), DropoutKey(5, 2 * step + half), gradient_scale=scale,
                    recompute=Recompute(policy),
                )  # fmt: skip
                model.loss_backward(0.5 * scale, saved)
                losses.append(float(loss))
            update.update(step, 3e-3, update.gradient_norm(), 1 / scale)
            averages.update(step)
    return losses, to_host(model.flat.values), to_host(averages.values)


def assert_same(got, expected):
    for mine, its in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert np.isfinite(expected[1]).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("policy", get_args(Policy))
def test_training_is_the_same_bits(policy, precision):
    changes = {"policy": policy, "precision": precision, "scale": 256.0 if precision == "float16" else 1.0}
    arena = Arena(capacity=4 << 20, poison=True)
    assert_same(trained(arena, **changes), trained(**changes))
    assert arena.misses == 0
    assert arena.peak > 50_000


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"time_bias": "linear", "time_features": "gap", "tied_head": True, "num_kv_heads": 4},
        {"time_bias": "none", "time_features": "none", "window": None},
        {"time_components": 4},
        {
            "attention": "performer", "attention_features": 16, "time_bias": "linear", "window": None,
            "dropout": DropoutConfig(residual=0.3),
        },
    ],
    ids=["muon", "linear bias, tied head", "no time", "gaps predicted", "performer"],
)  # fmt: skip
def test_variants_are_the_same_bits(changes):
    assert_same(trained(Arena(capacity=4 << 20, poison=True), **changes), trained(**changes))


def test_poison_would_be_noticed(monkeypatch):
    """That the tests above can fail: what the feed-forward keeps for the backward is given back too early."""
    take, early = Arena.empty, []

    def empty(arena, shape, dtype):
        while early:
            arena._fill(*early.pop())
        array = take(arena, shape, dtype)
        if array.shape[-1:] == (48,):
            early.extend((at, lease.size) for at, lease in arena._leases.items() if lease() is array)
        return array

    monkeypatch.setattr(Arena, "empty", empty)
    with np.errstate(all="ignore"):
        got = trained(Arena(capacity=4 << 20, poison=True), steps=1)
    assert np.isnan(got[1]).any()


def test_gpu_arrays_come_from_the_arena_too(gpu):
    arena = Arena(gpu.xp, 4 << 20)
    assert_same(trained(arena, gpu, steps=2), trained(backend=gpu, steps=2))
    assert arena.misses == 0
    assert arena.peak > 50_000


MEASURE = """
import json, resource, sys, tracemalloc
import numpy as np
sys.path.insert(0, "tests/ttr_gpu")
from model_batches import packed
from ttr_gpu.config import DropoutConfig, ModelConfig
from ttr_gpu.memory import keep_freed_memory
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import DropoutKey
from ttr_gpu.nn.recompute import Recompute
from ttr_gpu.train.averages import Averages
from ttr_gpu.train.config import RunConfig, TrainConfig
from ttr_gpu.train.memory_plan import step_memory
from ttr_gpu.train.optimizer import Optimizer
from ttr_kernels.common import scratch
from ttr_kernels.common.parallel import limit_blas

changes, policy, optimizer, lengths = json.loads(sys.argv[1])
limit_blas()
keep_freed_memory()
model = TransformerModel(ModelConfig(**{
    "vocabulary_size": 500, "embed_dim": 64, "hidden_dim": 256, "num_layers": 3, "num_heads": 4,
    "dropout": DropoutConfig(residual=0.1), **changes,
}))
train = TrainConfig(optimizer=optimizer, tokens_per_batch=1024, max_length=512)
update, averages = Optimizer(model, train), Averages(model, 0.9)
plan = step_memory(model, RunConfig(model=model.config, train=train), Recompute(policy))
model.arena.reserve(plan.activations * 11 // 10)
batches = [packed(each, 500, seed=seed) for seed, each in enumerate(lengths)]

def step(number):
    with model.arena.step():
        model.zero_gradients()
        loss, saved = model.loss_forward(batches[number % 2], DropoutKey(0, number), recompute=Recompute(policy))
        model.loss_backward(0.5, saved)
        del saved
        update.update(number, 1e-3, update.gradient_norm())
        averages.update(number)

step(1)
step(2)
faults = []
for number in range(3, 13):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(number)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# What the step makes of arrays is traced: how much there was at once, and what of NumPy's is left.
tracemalloc.start()
step(13)
step(14)
tracemalloc.reset_peak()
before = tracemalloc.get_traced_memory()[0]
step(15)
peak = tracemalloc.get_traced_memory()[1] - before
numpy = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]
left = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(numpy).traces)
# The plan leaves out tiles of softmax attention and panels of matrix products, about a megabyte of each thread.
kept = sum(buffer.nbytes for name, buffer in vars(scratch._local).items() if name not in ("tile", "product"))
print(json.dumps([plan.scratch, kept, plan.activations, model.arena.misses, model.arena.extent, faults, peak, left]))
"""


@pytest.mark.parametrize(
    ("changes", "policy", "optimizer", "lengths"),
    [
        ({}, "none", "adamw", UNEQUAL),
        ({"precision": "bfloat16", "dropout": DROPOUT.model_dump()}, "block", "muon", UNEQUAL),
        # Which thread gets the longest sequence is chance, and sequences as long as the plan's are what it is for.
        (
            {"attention": "performer", "time_bias": "linear", "num_kv_heads": 2, "attention_features": 128}, "none",
            "adamw", [[512, 512]] * 2,
        ),
    ],
    ids=["float32", "bfloat16, recomputed, muon", "performer"],
)  # fmt: skip
def test_from_the_second_step_on_nothing_is_allocated(changes, policy, optimizer, lengths):
    arguments = json.dumps([changes, policy, optimizer, lengths])
    done = subprocess.run([sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True, check=True)
    planned_scratch, scratch, planned, misses, extent, faults, peak, left = json.loads(done.stdout)
    assert misses == 0, "arrays that were not in the arena"
    assert extent == pytest.approx(planned, rel=0.1)
    # The plan leaves out what one thread needs for a product of oneDNN's.
    assert scratch == pytest.approx(planned_scratch, rel=0.1, abs=250_000)
    # Numbers, vectors as long as there are heads or sequences, and Python's own objects.
    assert peak < 100_000
    assert left < 1000
    # The first steps touch pages of libraries and threads for the first time.
    assert np.median(faults[4:]) < 20, faults
