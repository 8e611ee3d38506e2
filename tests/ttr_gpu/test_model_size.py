"""Sizes that follow from a configuration are those of the model that is made of it."""

import pytest
from model_batches import packed

from ttr_gpu.config import PRESETS, ModelConfig
from ttr_gpu.model import TransformerModel
from ttr_gpu.model_size import ModelOutline, model_size
from ttr_gpu.nn.recompute import Recompute
from ttr_gpu.train.config import RunConfig, TrainConfig
from ttr_gpu.train.memory_plan import policy_costs, step_memory
from ttr_gpu.train.muon import hidden_matrices
from ttr_gpu.train.plan import full_batch

VARIANTS = [
    {},
    {"tied_head": True},
    {"num_kv_heads": 2, "num_layers": 5, "window": 7},
    {"time_features": "none", "time_bias": "none"},
    {"time_features": "gap", "time_pace": 2.0, "time_components": 5},
    {"time_components": 3, "time_given_type": True, "tied_head": True},
    {"attention": "performer", "time_bias": "linear", "attention_features": 8},
    {"embed_dim": 64, "hidden_dim": 8, "mup_base_width": 32, "vocabulary_size": 500},
]


def made(changes):
    fields = {"vocabulary_size": 11, "embed_dim": 32, "hidden_dim": 48, "num_layers": 3, "num_heads": 4}
    return TransformerModel(ModelConfig(**{**fields, "time_features_dim": 6, **changes}))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_are_counted(changes):
    model = made(changes)
    size = model_size(model.config)
    matrices = [p for p in model.parameters if p.value.ndim == 2]
    assert size.total == len(model.flat.values)
    assert size.matrices == sum(p.value.size for p in matrices)
    assert size.largest == max(p.value.size for p in matrices)
    assert size.table == model.embedding.table.value.size
    assert size.block_matrices * model.config.num_layers == sum(p.value.size for p, _ in hidden_matrices(model))
    looked_up = 0 if model.head.tied else size.table
    assert size.multiplied == sum(p.value.size for p in model.parameters if p.decay) - looked_up


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_plan_needs_no_model(changes, precision):
    model = made({**changes, "precision": precision})
    outline, batch = ModelOutline(model.config), packed([9, 4], 11)
    assert outline.flops(batch) == model.flops(batch)
    for optimizer in ("adamw", "muon"):
        train = TrainConfig(optimizer=optimizer, tokens_per_batch=64, max_length=32, ema=0.9)
        config = RunConfig(model=model.config, train=train)
        of_model, of_outline = (step_memory(each, config, Recompute("block", 2)) for each in (model, outline))
        assert of_model == of_outline
        assert of_model.parameters - of_model.gradients == sum(
            p.value.size * 2 for p in model.parameters if p.value.ndim == 2 and copied(model, p)
        ) * (precision == "bfloat16")
        one, other = (
            policy_costs(each, config, full_batch(config), 1.0, program=0, data=0) for each in (model, outline)
        )
        assert one == other


def copied(model, parameter):
    return parameter is not model.embedding.table or model.head.tied


@pytest.mark.parametrize(("preset", "parameters"), [("gpt2", 124e6), ("gpt2-xl", 1558e6)])
def test_presets_named_after_gpt2_have_its_parameters(preset, parameters):
    size = model_size(ModelConfig(vocabulary_size=50257, **PRESETS[preset]))
    assert size.total == pytest.approx(parameters, rel=0.01)
