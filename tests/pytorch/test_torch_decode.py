"""Our decoding beside the peer's of `benchmarks decode`, from before the ring is full to after it has wrapped twice."""

import numpy as np
import pytest

pytest.importorskip("torch.nn.functional", reason="PyTorch is not installed: pip install torch==2.13.0")

from agreement import assert_close

from benchmarks.peers import torch_decode, torch_model
from ttr_gpu.config import ModelConfig
from ttr_gpu.model import TransformerModel


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 1, "time_bias": "linear"}, {"time_features": "none", "tied_head": True}]
)
# Large weights make the model sensitive: float32 is up to 6e-5 from float64, in the forward too. The peer rounds
# activations to bfloat16, of 8 bits; ours stay float32 within a step.
@pytest.mark.parametrize(("precision", "weights", "allowed"), [("float32", 2.0, 2e-4), ("bfloat16", 1.0, 3e-2)])
def test_the_peer_decodes_what_we_decode(changes, precision, weights, allowed):
    import torch

    fields = {"vocabulary_size": 11, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 2, "window": 9}
    model = TransformerModel(ModelConfig(**{**fields, **changes}), seed=1, precision_name=precision)
    model.flat.values[...] *= weights
    peer = torch_model.TorchModel(model.config)
    torch_model.load_weights(peer, model)
    decoder, cache = torch_decode.Decoder(peer, 3, bfloat16=precision == "bfloat16"), model.new_cache(3)
    rng = np.random.default_rng(0)
    times, ours, theirs = np.zeros(3), [], []
    for _ in range(25):
        tokens, times = rng.integers(0, 11, 3), times + rng.exponential(3.0, 3)
        ours.append(model.decode_step(tokens, times, cache))
        theirs.append(decoder.step(torch.from_numpy(tokens), torch.from_numpy(times)))
    assert_close("logits", np.stack(ours), torch.stack(theirs).float(), allowed)
