"""The configuration of a model: what its architecture is, and nothing of how it is trained."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DropoutConfig(BaseModel):
    """Dropout probabilities: of attention weights, inside the feed-forward, and on a block's two residual branches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: float = Field(default=0.0, ge=0.0, lt=1.0)
    feed_forward: float = Field(default=0.0, ge=0.0, lt=1.0)
    residual: float = Field(default=0.0, ge=0.0, lt=1.0)


class ModelConfig(BaseModel):
    """The architecture of a `TransformerModel`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary_size: int = Field(ge=1, description="number of token or event types")
    embed_dim: int = Field(default=256, ge=1, description="width C of the residual stream")
    hidden_dim: int = Field(default=1024, ge=1, description="width F of the gated feed-forward")
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=8, ge=1, description="query heads H")
    num_kv_heads: int | None = Field(default=None, ge=1, description="key/value heads; default: num_heads")
    attention: Literal["softmax", "performer"] = Field(
        default="softmax", description="exact, or approximated in linear time by random features (FAVOR+)"
    )
    attention_features: int = Field(default=256, ge=1, description="random features of performer attention")
    window: int | None = Field(default=None, ge=1, description="sliding-window attention span in positions")
    rope: Literal["position", "time"] = Field(
        default="position", description="rotary angles follow the position in the sequence, or the time / time_scale"
    )
    rope_base: float = Field(default=10000.0, gt=1.0)
    time_bias: Literal["none", "linear", "log"] = Field(
        default="log", description="how attention decays with age: not, exponentially (Hawkes), or by a power (Omori)"
    )
    time_features: Literal["none", "absolute", "gap", "both"] = Field(
        default="both", description="Time2Vec of the timestamp, of the gap since the event before, or both"
    )
    time_pace: float = Field(
        default=0.0,
        ge=0.0,
        description="mean gap, in the data set's time unit: embeds how far a sequence is behind this pace; 0: not",
    )
    time_features_dim: int = Field(default=32, ge=2, description="Time2Vec features of each kind")
    time_scale: float = Field(default=1.0, gt=0.0, description="typical gap, in the data set's time unit")
    time_span: float = Field(default=1000.0, gt=0.0, description="longest span of time, in the data set's time unit")
    time_components: int = Field(
        default=0,
        ge=0,
        description="log-normals in the distribution of the gap to the next event; 0: times not modelled",
    )
    time_given_type: bool = Field(
        default=False, description="the distribution of the gap depends on the type of the event at its end, too"
    )
    time_log_mean: float = Field(default=0.0, description="mean of log gap, the gap in the data set's time unit")
    time_log_std: float = Field(default=1.0, gt=0.0, description="standard deviation of log gap")
    time_min_sigma: float = Field(
        default=0.005, gt=0.0, description="floor of a log-normal's sigma: the relative precision that is believed in"
    )
    time_zero_gap: float = Field(default=1.0, gt=0.0, description="what a gap of zero is scored as")
    tied_head: bool = Field(default=False, description="the token head shares the embedding's matrix")
    mup_base_width: int | None = Field(
        default=None,
        ge=1,
        description="width at which learning rates were tuned: initial sizes and rates then follow embed_dim (muP)",
    )
    norm_eps: float = Field(default=1e-6, gt=0.0)
    dropout: DropoutConfig = DropoutConfig()
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of weights, activations and matrix products; masters stay in float32"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim: got {self.embed_dim}, expected a multiple of num_heads ({self.num_heads})")
        if (self.embed_dim // self.num_heads) % 2:
            raise ValueError(f"embed_dim / num_heads: got {self.embed_dim // self.num_heads}, expected an even number")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads: got {self.num_kv_heads}, expected a divisor of num_heads ({self.num_heads})"
            )
        return self

    @model_validator(mode="after")
    def _width_is_free(self) -> ModelConfig:
        if self.mup_base_width is not None and self.tied_head:
            raise ValueError(
                "tied_head: got true, expected false with mup_base_width: an embedding's rate does not follow the "
                "width, a head's does"
            )
        return self

    @model_validator(mode="after")
    def _performer_can(self) -> ModelConfig:
        if self.attention == "performer":
            if self.time_bias == "log":
                raise ValueError(
                    "time_bias: got 'log', expected 'linear' or 'none' with attention 'performer': only an exponential "
                    "decay factorises"
                )
            if self.window is not None:
                raise ValueError(f"window: got {self.window}, expected none with attention 'performer'")
            if self.dropout.attention:
                raise ValueError(
                    f"dropout.attention: got {self.dropout.attention}, expected 0 with attention 'performer', whose "
                    "weights are never formed"
                )
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Width D of one head."""
        return self.embed_dim // self.num_heads


class Preset(TypedDict):
    """What a preset fixes of a `ModelConfig`."""

    embed_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    tied_head: NotRequired[bool]


# Everything else keeps its default. With GPT-2's vocabulary of 50,257 `gpt2` has its 124 M parameters and `gpt2-xl` the
# 1.56 B of its largest: a gated feed-forward has three matrices, so it is two thirds as wide.
PRESETS: dict[str, Preset] = {
    "pico": {"embed_dim": 32, "hidden_dim": 128, "num_layers": 2, "num_heads": 4},
    "nano": {"embed_dim": 64, "hidden_dim": 256, "num_layers": 2, "num_heads": 4},
    "tiny": {"embed_dim": 256, "hidden_dim": 1024, "num_layers": 4, "num_heads": 8},
    "small": {"embed_dim": 512, "hidden_dim": 1536, "num_layers": 8, "num_heads": 8},
    "gpt2": {"embed_dim": 768, "hidden_dim": 2048, "num_layers": 12, "num_heads": 12, "tied_head": True},
    "gpt2-xl": {"embed_dim": 1600, "hidden_dim": 4288, "num_layers": 48, "num_heads": 25, "tied_head": True},
}
