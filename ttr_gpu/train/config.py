"""The configuration of a run: model and training, from defaults, data set, preset, file and --set, in that order."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ..config import PRESETS, ModelConfig
from ..errors import UserError
from ..nn.recompute import Policy, Recompute


class TrainConfig(BaseModel):
    """How a model is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(default=10.0, gt=0, description="passes over the training split")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; overrides epochs")
    tokens_per_batch: int = Field(default=2048, ge=1, description="packed tokens of a batch")
    max_length: int = Field(default=256, ge=1, description="longest window cut from a sequence")
    accumulate: int = Field(default=1, ge=1, description="batches per optimizer step")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate; default 1e-3 sqrt(256/C), <= 2e-3")
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="last learning rate over peak")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="after warm-up: half a cosine; the peak, then down by 1 - sqrt; the peak"
    )
    decay_share: float = Field(default=0.2, gt=0, le=1, description="of all steps, the last ones: wsd's way down")
    warmup_steps: int | None = Field(default=None, ge=0, description="default: a twentieth of all steps")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: of the blocks' matrices, with adamw for the rest"
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of muon")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of adamw, as beta2 and eps")
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices, not of gains, biases and decay rates")
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of an average of the weights, which is then evaluated; such as 0.999",
    )
    time_weight: float = Field(
        default=1.0, ge=0, description="of the gap's loss beside the type's, both in nats per event"
    )
    survival: bool = Field(
        default=False, description="the gap's loss counts that nothing more happened until the end of observation, too"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss: float = Field(default=0.0, ge=0)
    loss_scale: float = Field(default=65536.0, ge=1, description="first factor of the loss in float16; it adapts")
    loss_scale_growth: int = Field(default=2000, ge=1, description="steps without overflow before it doubles")
    recompute: Policy = Field(
        default="none", description="activations that the backward computes again to save memory; same gradients"
    )
    recompute_every: int = Field(default=1, ge=1, description="in blocks 0, this, twice this, ... alone")
    seed: int = Field(default=0, ge=0, description="of weights, order of data, and dropout")
    evaluate_every: int | None = Field(
        default=None, ge=1, description="steps; default: once per epoch, at least 10 times"
    )
    evaluate_tokens: int = Field(default=500_000, ge=1, description="validation tokens looked at each time, at most")
    checkpoint_every: int | None = Field(default=None, ge=1, description="steps; default: with each evaluation")
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept, beside the best one")
    spike_threshold: float = Field(
        default=8.0, ge=0, description="deviations of a loss or gradient norm that is reported with its batch; 0: never"
    )
    cuda_graph: Literal["auto", "off"] = Field(
        default="auto", description="on a GPU: a step's kernels are captured once and replayed, where that is possible"
    )
    shard_optimizer: bool = Field(
        default=False, description="each of several processes keeps its part of adamw's moments alone (ZeRO-1)"
    )
    compare_every: int = Field(
        default=100, ge=1, description="steps after which several processes compare checksums of their weights"
    )
    patience: int = Field(default=5, ge=0, description="evaluations without improvement before stopping; 0: never")


class RunConfig(BaseModel):
    """Everything a run is made of but its data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig
    train: TrainConfig = Field(default_factory=TrainConfig)

    @property
    def recompute(self) -> Recompute:
        """What the backward computes again."""
        return Recompute(self.train.recompute, self.train.recompute_every)

    def with_recompute(self, recompute: Recompute) -> RunConfig:
        """The same run under another policy."""
        changes = {"recompute": recompute.policy, "recompute_every": recompute.every}
        return self.model_copy(update={"train": self.train.model_copy(update=changes)})

    @property
    def lr(self) -> float:
        """The peak learning rate, with the default resolved: wider models want smaller steps, unless muP sees to it."""
        return self.train.lr or min(2e-3, 1e-3 * (256 / (self.model.mup_base_width or self.model.embed_dim)) ** 0.5)


# Keys whose value is that of the data set, unless it is given.
_FROM_DATA = {f"model.time_{name}" for name in ("scale", "span", "components", "log_mean", "log_std", "zero_gap")}

# Small models meet small data, and overfit them without dropout.
_DROPOUT = {"attention": 0.1, "feed_forward": 0.1, "residual": 0.1}
_PRESET_DROPOUT = {"pico": _DROPOUT, "nano": _DROPOUT, "tiny": _DROPOUT}

# Sizes by the number of training events up to which they are chosen.
_EVENT_SIZES = ((60_000, "pico"), (2_000_000, "nano"))
_EVENT_BATCH, _EVENT_STEPS = 1024, 800


def choose_preset(
    kind: str, targets: int, pace: float | None = None, calendar: bool = False
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """Where no preset is named: a size for the data, and settings that belong to it, nested like a run's configuration.

    Those of events are one set for all data (docs/time_modelling.md has what they reach): small steps, enough of them
    also for few data, and an average of the weights against overfitting those. Attention's dropout is off: what an
    average over the past tells drowns in its noise.

    Args:
        kind: of the data set, "events" or "text".
        targets: gaps, or tokens, to be predicted in the training split.
        pace: what sequences keep to (`steady_pace`); None: to none.
        calendar: whether the types of events follow absolute time (`types_follow_calendar`), which is then embedded.
    """
    if kind != "events":
        return "tiny", {}
    preset = next((name for most, name in _EVENT_SIZES if targets <= most), "tiny")
    batch = min(_EVENT_BATCH, max(1, targets // 4))
    width = PRESETS[preset]["embed_dim"]
    return preset, {
        "model": {
            "time_features": "both" if calendar else "gap", "time_pace": pace or 0.0, "window": 128,
            "dropout": {**_DROPOUT, "attention": 0.0},
        },
        "train": {
            "tokens_per_batch": batch, "max_length": batch, "lr": min(4e-3, 2e-3 * (256 / width) ** 0.5), "ema": 0.99,
            "epochs": float(max(10, round(_EVENT_STEPS * batch / max(targets, 1)))),
        },
    }  # fmt: skip


def resolve_config(
    from_data: dict[str, Any], preset: str, file: Path | None, assignments: list[str],
    defaults: dict[str, Any] | None = None,
) -> RunConfig:  # fmt: skip
    """Later ones win: what the data set says, the preset, `defaults`, the TOML file, `--set key=value`.

    Raises UserError for an unknown preset or key (with the nearest one), a value of the wrong type, a broken file.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--preset: got {preset!r}, expected one of {', '.join(PRESETS)}{hint}")
    merged: dict[str, Any] = {"model": {**from_data, **PRESETS[preset]}, "train": {}}
    if preset in _PRESET_DROPOUT:
        merged["model"]["dropout"] = dict(_PRESET_DROPOUT[preset])
    _merge(merged, defaults or {}, "defaults")
    if file is not None:
        _merge(merged, _read_toml(file), f"{file}")
    return override(merged, assignments)


def override(merged: dict[str, Any], assignments: list[str]) -> RunConfig:
    """A configuration as nested dictionaries, changed by `key=value` assignments and validated."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set: got {assignment!r}, expected key=value, such as train.lr=0.001")
        key = key.strip()
        nested: Any = _value(text, optional=key in config_keys() and _is_optional(key))
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(merged, nested, "--set")
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise UserError(readable(error)) from None


def config_keys() -> list[str]:
    """All keys that --set knows, dotted."""
    return list(_keys(RunConfig, ""))


def check_key(key: str, origin: str) -> None:
    """UserError, with the nearest one, if --set does not know a key."""
    known = config_keys()
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.5) or [k for k in known if k.endswith(f".{key}")]
        hint = f"did you mean {near[0]}?" if near else f"keys: {', '.join(known)}"
        raise UserError(f"{origin}: unknown key {key!r}; {hint}")


def key_table() -> list[tuple[str, str, str]]:
    """(key, default, description) of every key that --set knows."""
    rows = []
    for key in config_keys():
        info = _field(key)
        from_data = info.is_required() or key in _FROM_DATA
        default = "from data" if from_data else str(info.default)
        rows.append((key, default, info.description or ""))
    return rows


def _field(key: str) -> FieldInfo:
    model: type[BaseModel] = RunConfig
    *parents, name = key.split(".")
    for parent in parents:
        model = model.model_fields[parent].annotation  # type: ignore[assignment]
    return model.model_fields[name]


def _is_optional(key: str) -> bool:
    """Whether None is a value of this key; of others, such as model.time_bias, "none" may be one."""
    return type(None) in get_args(_field(key).annotation)


def _keys(model: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += _keys(nested, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _merge(target: dict[str, Any], changes: dict[str, Any], origin: str, prefix: str = "") -> None:
    known = config_keys()
    for name, value in changes.items():
        key = prefix + name
        if isinstance(value, dict) and any(k.startswith(f"{key}.") for k in known):
            _merge(target.setdefault(name, {}), value, origin, f"{key}.")
            continue
        check_key(key, origin)
        target[name] = value


def _value(text: str, optional: bool) -> Any:
    """A TOML value; anything that is none is a string, so that quotes may be left out. `optional`: "none" is None."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if optional and text.strip() in ("none", "None", "null") else text.strip()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"--config: {path}: no such file") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {path}: {error}") from None


def readable(error: ValidationError) -> str:
    """The first thing that is wrong, as one line."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: got {first['input']!r}; {message.replace('input should be', 'expected')}"
