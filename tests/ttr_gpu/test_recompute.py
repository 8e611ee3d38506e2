"""Recomputed activations: the same gradients to the bit, and memory as it was estimated."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from model_batches import packed

from ttr_gpu.config import DropoutConfig, ModelConfig
from ttr_gpu.errors import UserError
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import DropoutKey
from ttr_gpu.nn.recompute import Dropped, Policy, Recompute, drop
from ttr_gpu.train.config import RunConfig, TrainConfig
from ttr_gpu.train.memory_plan import in_bytes, step_memory

KEY = DropoutKey(5, 8)
POLICIES = [policy for policy in get_args(Policy) if policy != "none"]


def model_of(**changes):
    fields = {
        "vocabulary_size": 11, "embed_dim": 32, "hidden_dim": 48, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
        "time_scale": 3.0, "time_span": 500.0, "time_features_dim": 6, "window": 9,
        "dropout": DropoutConfig(attention=0.2, feed_forward=0.1, residual=0.3),
    }  # fmt: skip
    return TransformerModel(ModelConfig(**{**fields, **changes}), seed=3)


def gradients(model, recompute, key=KEY):
    model.zero_gradients()
    loss, saved = model.loss_forward(packed([40, 3, 21], 11), key, recompute=recompute)
    model.loss_backward(1.0, saved)
    return float(loss), model.flat.gradients.copy()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_the_same_bits(policy, every, precision):
    model = model_of(precision=precision)
    loss, expected = gradients(model, Recompute())
    again, got = gradients(model, Recompute(policy, every))
    assert loss == again
    np.testing.assert_array_equal(got, expected)
    assert np.abs(expected).max() > 0


def test_without_dropout_too():
    model = model_of(dropout=DropoutConfig(), time_bias="none")
    for policy in POLICIES:
        np.testing.assert_array_equal(
            gradients(model, Recompute(policy), None)[1], gradients(model, Recompute(), None)[1]
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_other_masks_would_be_noticed(policy, monkeypatch):
    model = model_of()
    _, expected = gradients(model, Recompute())

    def drop_with_another_key(policy, x, saved, sequences, rope, dropout):
        kept = drop(policy, x, saved, sequences, rope, dropout)
        return replace(kept, dropout=DropoutKey(5, 9)) if isinstance(kept, Dropped) else kept

    monkeypatch.setattr("ttr_gpu.model.drop", drop_with_another_key)
    assert not np.array_equal(gradients(model, Recompute(policy))[1], expected)


def test_every_kth_block():
    assert [Recompute("block", 2).of_block(index) for index in range(5)] == ["block", "none", "block", "none", "block"]


# In a process of its own: what other tests have left in scratch memory would count.
MEASURE = """
import json, sys, tracemalloc
tracemalloc.start()
from ttr_gpu.config import ModelConfig
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import DropoutKey
from ttr_gpu.train.config import RunConfig, TrainConfig
from ttr_gpu.train.memory_plan import full_batch, policy_costs
from ttr_gpu.train.optimizer import Optimizer
from ttr_kernels.common.arena import Arena
from ttr_kernels.common.parallel import set_threads

set_threads(1)  # what another thread keeps could not be told from what a step allocates
changes = {"dropout": {"residual": 0.1}, **json.loads(sys.argv[1])}
shape = ModelConfig(**{"vocabulary_size": 500, "embed_dim": 64, "hidden_dim": 256, "num_layers": 5, "num_heads": 4,
                       **changes})
config = RunConfig(model=shape, train=TrainConfig(tokens_per_batch=1024, max_length=256))

def step(recompute):
    loss, saved = model.loss_forward(batch, DropoutKey(0, 1), recompute=recompute)
    model.loss_backward(1.0, saved)
    optimizer.update(1, 1e-3, optimizer.gradient_norm())

import numba, threadpoolctl
batch = full_batch(config)
before = tracemalloc.get_traced_memory()[0]
model = TransformerModel(shape)
optimizer = Optimizer(model, config.train)
costs = policy_costs(model, config, batch, 1.0, program=0, data=0)
held = tracemalloc.get_traced_memory()[0] - before
step(costs[0].recompute)
held_now = held + sum(p._cast.nbytes for p in model.parameters if p._cast is not None)
# Objects of the interpreter's that the first step left (imports, compiled kernels) are none of a step's arrays.
from ttr_kernels.common import scratch
kept = sum(buffer.nbytes for buffer in vars(scratch._local).values())
# Panels and tiles that fit a cache, which each thread has for itself, are left out of the plan.
unplanned = sum(
    buffer.nbytes for name, buffer in vars(scratch._local).items() if name in ("tile", "product", "matmul onednn")
)
assert unplanned < 2 << 20
left = tracemalloc.get_traced_memory()[0] - before - held_now - kept
found = []
for cost in costs:
    tracemalloc.reset_peak()
    step(cost.recompute)
    peak = tracemalloc.get_traced_memory()[1] - before - left - unplanned
    arena = Arena()
    with arena.step():
        step(cost.recompute)
    memory = cost.memory
    # No checkpoint is written here, of which a run would hold a copy.
    found.append([cost.recompute.policy, cost.recompute.every, memory.total - memory.checkpoint, memory.activations,
                  memory.activations + memory.scratch, peak, arena.extent, peak - held_now])
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bfloat16", "dropout": {}},
        {"precision": "float16", "num_kv_heads": 2},
        {"time_components": 16},
        {"precision": "bfloat16", "time_components": 16},
        {"time_components": 64, "time_given_type": True, "time_pace": 1.0},
        {"attention": "performer", "time_bias": "linear", "attention_features": 64},
        {"precision": "float16", "attention": "performer", "time_bias": "linear", "attention_features": 64},
    ],
    ids=lambda changes: ", ".join(f"{key} {value}" for key, value in changes.items()) or "float32",
)
def test_memory_is_as_estimated(changes):
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(changes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    activations = {(policy, every): arena for policy, every, _, _, _, _, arena, _ in found}
    for policy, every, total, estimate, with_scratch, peak, arena, measured in found:
        assert total == pytest.approx(peak, rel=0.1), (policy, every, "all memory")
        assert estimate == pytest.approx(arena, rel=0.1), (policy, every, "activations")
        assert with_scratch == pytest.approx(measured, rel=0.1), (policy, every, "activations and scratch")
    assert activations["block", 1] < 0.6 * activations["none", 1]
    assert activations["block", 1] < activations["block", 2] < activations["block", 4] < activations["none", 1]


def test_sizes_are_read():
    assert [in_bytes(text) for text in ("4GiB", "1.5 GB", "512mib", "8e9", "100K")] == [
        4 * 2**30, 1_500_000_000, 512 * 2**20, 8_000_000_000, 100_000,
    ]  # fmt: skip
    for text in ("", "much", "4GiBs", "-1GB", "0"):
        with pytest.raises(UserError, match=r"--memory-limit: got .*expected a size such as 4GiB"):
            in_bytes(text)


def test_ranks_share_the_moments():
    model = model_of()
    config = RunConfig(model=model.config, train=TrainConfig(shard_optimizer=True))
    alone, first = (step_memory(model, config, Recompute(), ranks=ranks) for ranks in (1, 4))
    assert alone.optimizer == 4 * first.optimizer
    # The first rank saves them all.
    assert first.checkpoint == alone.checkpoint
    assert first.total == alone.total - 3 * first.optimizer
