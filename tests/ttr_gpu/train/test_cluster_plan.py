"""Plans for many machines: what they count is what models have; constants, rows, and where sums no longer hide."""

from dataclasses import replace

import numpy as np
import pytest

from ttr_gpu.backend import CPU, Backend
from ttr_gpu.config import ModelConfig
from ttr_gpu.distributed.communicator import LOCAL
from ttr_gpu.distributed.gradients import pieces
from ttr_gpu.distributed.session import Session
from ttr_gpu.distributed.step_time import step_time
from ttr_gpu.errors import UserError
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn.recompute import Recompute
from ttr_gpu.train.cluster_plan import Constant, break_even, gpu_constants, plan_rows, step_work, with_given
from ttr_gpu.train.cluster_report import PlanOptions, cluster_plan
from ttr_gpu.train.config import RunConfig, TrainConfig
from ttr_gpu.train.memory_plan import full_batch, step_memory

GPU = Backend("gpu", np, "planned")
ONE = Session(LOCAL, CPU)


def run_config(**model):
    fields = {"vocabulary_size": 900, "embed_dim": 64, "hidden_dim": 128, "num_layers": 6, "num_heads": 4}
    return RunConfig(model=ModelConfig(**{**fields, **model}), train=TrainConfig(tokens_per_batch=512, max_length=128))


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16", "tied_head": True}, {"num_layers": 40}], ids=str)
def test_work_is_that_of_the_model(changes):
    config = run_config(**changes)
    model, work = TransformerModel(config.model), step_work(config, 512.0, 3.0)
    assert work.products + work.attention == pytest.approx(model.flops(full_batch(config)), rel=1e-12)
    assert work.values == model.flat.values.nbytes
    parts, layers = pieces(model), config.model.num_layers
    assert [size for _, size in work.pieces] == [4.0 * (part.stop - part.start) for _, part in parts]
    assert [done for done, _ in work.pieces] == [layers - low if low >= 0 else layers for low, _ in parts]
    assert 0.0 < work.blocks_backward < 2 / 3
    # Weight, gradient, two moments: read four, written three; the norm reads one, zeroing writes one.
    assert work.update >= 9 * work.values
    half = step_work(config, 256.0)
    assert 2 * half.products == work.products
    assert 2 * half.attention == work.attention


def test_memory_is_that_of_train(tmp_path):
    """What `ttr-gpu train --plan` would say of each rank."""
    config = run_config(precision="bfloat16")
    model = TransformerModel(config.model)
    (row,) = plan_rows(config, gpu_constants("bfloat16"), [1], 4, CPU)
    assert row.memory == step_memory(model, config, Recompute(), ranks=4)
    assert row.memory.optimizer == 2 * model.flat.values.nbytes
    assert row.memory_sharded.optimizer == row.memory.optimizer // 4
    assert row.memory.total - row.memory_sharded.total == row.memory.optimizer * 3 // 4
    on_gpu = plan_rows(config, gpu_constants("bfloat16"), [1], 4, GPU)[0].memory
    assert on_gpu.checkpoint == 0 < row.memory.checkpoint


def test_rows_by_number_of_machines():
    config, constants = run_config(), gpu_constants("float32")
    weak = plan_rows(config, constants, [1, 2, 64], 8, GPU)
    assert [(row.nodes, row.ranks, row.tokens, row.batches) for row in weak] == [
        (1, 8, 8 * 512, 1.0), (2, 16, 16 * 512, 1.0), (64, 512, 512 * 512, 1.0),
    ]  # fmt: skip
    assert weak[0].efficiency > weak[1].efficiency > weak[2].efficiency > 0
    assert weak[0].step.compute == weak[2].step.compute
    # Of 32,768 tokens each of 8 ranks has 8 batches, each of 128 half of one, of 256 one window; 512 have too little.
    strong = plan_rows(config, constants, [1, 16, 32, 64], 8, GPU, global_tokens=32768)
    assert [(row.ranks, row.batches) for row in strong] == [(8, 8.0), (128, 1.0), (256, 1.0)]
    assert (
        strong[0].step.compute
        == pytest.approx(16 * strong[1].step.compute)
        == pytest.approx(32 * strong[2].step.compute)
    )
    assert strong[1].tokens_per_second == pytest.approx(32768 / strong[1].step.total)
    with pytest.raises(UserError, match=r"--global-tokens: got 1000, expected .*128.* for each of 8 ranks"):
        plan_rows(config, constants, [1], 8, GPU, global_tokens=1000)


def test_break_even_is_where_sums_stop_hiding():
    config = run_config(num_layers=40)
    constants = with_given(gpu_constants("float32"), {"link_latency": 0.0, "local_latency": 0.0})
    network = constants.network(64, 8)
    tokens = break_even(config, constants, network)
    last = network.sum_seconds(step_work(config, 1.0).pieces[-1][1])
    # The pieces can only follow each other; with more tokens than that only what is ready last is waited for.
    above, below = (step_time(step_work(config, share * tokens), constants.rates, network) for share in (1.5, 0.5))
    second_to_last = network.sum_seconds(step_work(config, 1.0).pieces[-2][1])
    assert above.exposed <= last + second_to_last * 1.0000001
    assert below.exposed >= 0.5 * (below.sums - last)


def test_given_constants_are_named_so():
    constants = with_given(gpu_constants("bfloat16"), {"products": 1e12, "overlap": None})
    assert constants.products == Constant(1e12, "given")
    assert constants.overlap == gpu_constants("bfloat16").overlap
    for name, constant in vars(gpu_constants("bfloat16")).items():
        assert constant.source.startswith("assumed"), name


def test_a_report_says_where_its_numbers_are_from():
    options = PlanOptions(
        nodes=6, ranks=2, preset="pico", assignments=("train.tokens_per_batch=256", "model.vocabulary_size=50"),
        given={"link_bandwidth": 5e8},
    )  # fmt: skip
    report = cluster_plan(options, ONE)
    assert [row["nodes"] for row in report.described["rows"]] == [1, 2, 4, 6]
    found = report.described["constants"]
    assert found["link_bandwidth"] == {"value": 5e8, "source": "given"}
    for name in ("products", "attention", "memory_bandwidth"):
        assert found[name]["source"] == "measured here"
        assert found[name]["value"] > 0
    assert found["local_bandwidth"]["source"].startswith("assumed")
    (line,) = [line for line in report.lines if line.startswith("link bandwidth")]
    assert line.split() == ["link", "bandwidth", "0.5", "GB/s", "given"]
    row = report.described["rows"][2]
    assert row["step_seconds"] == pytest.approx(row["step"]["compute"] + row["step"]["exposed"] + row["step"]["update"])


def test_what_is_not_measured_is_asked_for():
    options = PlanOptions(preset="pico", measure=False, given={"products": 1e9})
    with pytest.raises(UserError, match=r"--attention: expected a rate with --no-measure"):
        cluster_plan(options, ONE)
    rates = {"products": 1e9, "attention": 1e9, "memory_bandwidth": 1e9}
    report = cluster_plan(replace(options, given=rates), ONE)
    assert {constant["source"].partition(":")[0] for constant in report.described["constants"].values()} == {
        "given", "assumed", "reasoned",
    }  # fmt: skip
    performer = ("model.attention=performer", "model.time_bias=linear", "model.dropout.attention=0")
    with pytest.raises(UserError, match="measures softmax attention alone"):
        cluster_plan(replace(options, measure=True, assignments=performer), ONE)
