"""Every operation that PyTorch has too, forward and gradient, in float32."""

import numpy as np
import pytest
from agreement import assert_close

pytest.importorskip("torch.nn.functional", reason="PyTorch is not installed: pip install torch==2.13.0")
import torch
import torch.nn.functional as F

from ttr_kernels.adamw import adamw, clip_scale, global_norm
from ttr_kernels.attention import TimeBias, attention_backward, attention_forward
from ttr_kernels.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from ttr_kernels.embedding import embedding_backward, embedding_forward
from ttr_kernels.geglu import geglu_backward, geglu_forward
from ttr_kernels.layer_norm import layer_norm_backward, layer_norm_forward
from ttr_kernels.matmul import linear_backward, linear_forward
from ttr_kernels.rms_norm import rms_norm_backward, rms_norm_forward

# Both sides round to float32, in different orders.
ALLOWED = 2e-6


def draw(seed, *shapes):
    """Standard normal float32 arrays, and tensors of the same values that want gradients."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return arrays, [torch.tensor(array, requires_grad=True) for array in arrays]


def assert_agree(y, gradients, expected, dy, tensors):
    """Results, and the gradients of each tensor for the upstream gradient dy."""
    assert_close("y", y, expected, ALLOWED)
    expected.backward(torch.as_tensor(dy))
    for index, (gradient, tensor) in enumerate(zip(gradients, tensors, strict=True)):
        assert_close(f"gradient of input {index}", gradient, tensor.grad, ALLOWED)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(causal, kv_heads):
    (q, k, v, dy), tensors = draw(0, (2, 67, 6, 16), (2, 67, kv_heads, 16), (2, 67, kv_heads, 16), (2, 67, 6, 16))
    y, saved = attention_forward(q, k, v, causal=causal)
    heads_first = [t.transpose(1, 2) for t in tensors[:3]]
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True).transpose(1, 2)
    assert_agree(y, attention_backward(dy, saved)[:3], expected, dy, tensors[:3])


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kind", ["linear", "log"])
def test_attention_with_time_bias(kind, window):
    (q, k, v, dy), tensors = draw(1, *[(2, 67, 6, 16)] * 4)
    rng = np.random.default_rng(2)
    rate, tau = (np.exp(rng.uniform(-2, 1, 6)).astype(np.float32) for _ in range(2))
    times = 1.7e9 + np.cumsum(np.exp(rng.uniform(-3, 1, (2, 67))), axis=1)
    y, saved = attention_forward(q, k, v, times=times, time_bias=TimeBias(rate, tau, kind), window=window)
    dq, dk, dv, dbias = attention_backward(dy, saved)

    rate, tau = (torch.tensor(array, requires_grad=True) for array in (rate, tau))
    age = torch.as_tensor(np.maximum(times[:, :, None] - times[:, None], 0.0)).float()[:, None]
    u = age / tau[:, None, None]
    distance = torch.arange(67)[:, None] - torch.arange(67)
    hidden = (distance < 0) | (distance >= (window or 67))
    mask = (-rate[:, None, None] * (torch.log1p(u) if kind == "log" else u)).masked_fill(hidden, -torch.inf)
    heads_first = [t.transpose(1, 2) for t in tensors[:3]]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    assert_agree(y, (dq, dk, dv, dbias.rate, dbias.tau), expected, dy, [*tensors[:3], rate, tau])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_geglu(approximate):
    (x, bias, dy), tensors = draw(3, (37, 2 * 45), (2 * 45,), (37, 45))
    y, saved = geglu_forward(x, bias, approximate=approximate)
    gate, value = (tensors[0] + tensors[1]).chunk(2, dim=-1)
    expected = F.gelu(gate, approximate=approximate) * value
    assert_agree(y, geglu_backward(dy, saved), expected, dy, tensors[:2])


def test_rms_norm():
    (x, weight, dy), tensors = draw(4, (37, 45), (45,), (37, 45))
    y, saved = rms_norm_forward(x, weight, eps=1e-3)
    expected = F.rms_norm(tensors[0], (45,), tensors[1], eps=1e-3)
    assert_agree(y, rms_norm_backward(dy, saved), expected, dy, tensors[:2])


def test_layer_norm():
    (x, weight, bias, dy), tensors = draw(5, (37, 45), (45,), (45,), (37, 45))
    y, saved = layer_norm_forward(x, weight, bias, eps=1e-3)
    expected = F.layer_norm(tensors[0], (45,), tensors[1], tensors[2], eps=1e-3)
    assert_agree(y, layer_norm_backward(dy, saved), expected, dy, tensors[:3])


def test_linear():
    (x, weight, bias, dy), tensors = draw(6, (37, 45), (29, 45), (29,), (37, 29))
    y, saved = linear_forward(x, weight, bias)
    assert_agree(y, linear_backward(dy, saved), F.linear(*tensors[:3]), dy, tensors[:3])


def test_embedding():
    (table, dy), tensors = draw(7, (11, 45), (37, 45))
    tokens = np.random.default_rng(8).integers(0, 11, 37).astype(np.int32)
    y, saved = embedding_forward(tokens, table)
    expected = F.embedding(torch.as_tensor(tokens), tensors[0])
    assert_agree(y, [embedding_backward(dy, saved)], expected, dy, tensors[:1])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3, "label_smoothing": 0.2}])
def test_cross_entropy(options):
    (x, weight), tensors = draw(9, (37, 45), (29, 45))
    targets = np.random.default_rng(10).integers(0, 29, 37)
    targets[::5] = options.get("ignore_index", -1)
    logits = F.linear(*tensors)
    logits.retain_grad()
    expected = F.cross_entropy(logits, torch.as_tensor(targets), **{"ignore_index": -1, **options})
    expected.backward()

    loss, saved = cross_entropy_forward(x @ weight.T, targets, **options)
    assert_close("loss", loss, expected, ALLOWED)
    assert_close("dlogits", cross_entropy_backward(1.0, saved), logits.grad, 2 * ALLOWED)
    loss, saved = linear_cross_entropy_forward(x, weight, targets, rows_per_chunk=8, **options)
    dx, dweight, _ = linear_cross_entropy_backward(1.0, saved)
    assert_close("loss in chunks", loss, expected, ALLOWED)
    assert_close("dx", dx, tensors[0].grad, 2 * ALLOWED)
    assert_close("dweight", dweight, tensors[1].grad, 2 * ALLOWED)


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_and_clipping(fused):
    (parameter,), (twin,) = draw(11, (37, 45))
    start = parameter.copy()
    moments = np.zeros_like(parameter), np.zeros_like(parameter)
    options = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([twin], lr=1e-2, fused=fused, **options)
    for step in range(1, 11):
        # From far below the largest norm to far above it.
        (gradient,), _ = draw(20 + step, (37, 45))
        gradient *= 10.0 ** (step - 8)
        twin.grad = torch.tensor(gradient)
        expected = torch.nn.utils.clip_grad_norm_([twin], 1.0)
        norm = global_norm([gradient])
        assert_close("norm", norm, expected, ALLOWED)
        optimizer.step()
        adamw(
            parameter, gradient, *moments, learning_rate=1e-2, step=step, beta1=0.9, beta2=0.95, eps=1e-6,
            weight_decay=0.1, gradient_scale=clip_scale(norm, 1.0),
        )  # fmt: skip
    assert_close("movement", parameter - start, twin - torch.as_tensor(start), 1e-5)
    for name, moment, key in (("first", moments[0], "exp_avg"), ("second", moments[1], "exp_avg_sq")):
        assert_close(f"{name} moment", moment, optimizer.state[twin][key], 1e-5)
