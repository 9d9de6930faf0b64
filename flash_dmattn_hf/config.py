"""The settings of Dynamic Mask Attention in a model, as stored in `config.flash_dmattn`."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from flash_dmattn_hf.forms import DEFAULT_FORM, FORMS

SECTION = "flash_dmattn"
"""The attribute of a model config that holds the settings as a dict."""

_NUMBERS = {"keep_window_size": 1, "num_sink_tokens": 0, "local_window_size": 0}
IMPORTANCE_HEADS = ("kv", "query", "shared")
IMPORTANCE_INPUTS = ("value", "hidden")
_CHOICES = {"importance": FORMS, "importance_heads": IMPORTANCE_HEADS, "importance_input": IMPORTANCE_INPUTS}
_SWITCHES = ("add_importance_bias", "dt_proj_bias")
_MOST_KEYS = 2**31 - 1

_load_time_values: ContextVar[dict[str, Any] | None] = ContextVar("flash_dmattn_load_time_values", default=None)


class Windows(NamedTuple):
    """Which keys of one layer stay visible: the arguments of `flash_dmattn.select_visible` of these names."""

    keep_window_size: int
    num_sink_tokens: int
    local_window_size: int
    sliding_window: int | None


@dataclass(frozen=True)
class DynamicMaskConfig:
    """Which keys stay visible and how their importance is computed.

    keep_window_size: w, the most keys that a query sees, per importance head.
    num_sink_tokens: s, leading tokens of a sequence that are always seen; None: min(4, w // 4) for a dense
        checkpoint, 0 for a model trained with dynamic masks.
    local_window_size: r, most recent tokens that are always seen; None: 3w // 4 and 0, in the same way.
    importance: the name of one of `forms.FORMS`: "log_zoh" for A * softplus(dt), "zoh" for its exponential.
    importance_heads: "kv" for one importance per key and kv head, "query" for one per query head, "shared" for one per
        key, so that all heads of a layer see the same keys.
    add_importance_bias: add the importance to the logits; without it only a soft selection trains the importance.
    dt_proj_bias: whether the projection of a token to its importance has a bias.
    initializer_std: A starts at 0, where all keys tie, or spreads around it with this standard deviation.
    layers: indices of the layers to attach to; None: all that are eligible.
    importance_input: what the importance of a token is computed from: "value" for the values of all its kv heads,
        "hidden" for the hidden state that the query, key and value projections of the layer read.
    window_shares: layer index -> the multiple of w, rounded, that this layer keeps instead; its sinks and its local
        window stay as they are, so the rest goes to its contested keys. None: every layer keeps w.

    Raises ValueError for a value outside these ranges, for s + r > w, and for a share that leaves less than s + r.
    """

    keep_window_size: int = 2048
    num_sink_tokens: int | None = None
    local_window_size: int | None = None
    importance: str = DEFAULT_FORM
    importance_heads: str = "kv"
    add_importance_bias: bool = True
    dt_proj_bias: bool = False
    initializer_std: float = 0.0
    layers: tuple[int, ...] | None = None
    importance_input: str = "value"
    window_shares: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, smallest in _NUMBERS.items():
            size = getattr(self, name)
            if size is None and name != "keep_window_size":
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {size!r}")
        if (self.num_sink_tokens or 0) + (self.local_window_size or 0) > self.keep_window_size:
            raise ValueError(
                "num_sink_tokens + local_window_size must not exceed keep_window_size, got "
                f"{self.num_sink_tokens or 0} + {self.local_window_size or 0} > {self.keep_window_size}"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        std = self.initializer_std
        if isinstance(std, bool) or not isinstance(std, int | float) or not 0 <= std < float("inf"):
            raise ValueError(f"initializer_std must be a finite number of at least 0, got {std!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", _layer_indices(self.layers))
        object.__setattr__(self, "window_shares", read_shares(self.window_shares))
        self._check_shares()

    def _check_shares(self) -> None:
        sinks, local = self.num_sink_tokens or 0, self.local_window_size or 0
        for layer, share in (self.window_shares or {}).items():
            if share * self.keep_window_size > _MOST_KEYS:
                raise ValueError(f"window_shares must keep at most {_MOST_KEYS} keys, got {share!r} for layer {layer}")
            if self.window_of(layer) < max(1, sinks + local):
                raise ValueError(
                    f"window_shares must leave every layer its num_sink_tokens + local_window_size = {sinks} + {local} "
                    f"keys, and one at least, got {share!r} * {self.keep_window_size} = {self.window_of(layer)} for "
                    f"layer {layer}"
                )

    def window_of(self, layer: int) -> int:
        """Returns how many keys the layer with this index keeps at most, per importance head."""
        if self.window_shares is None or layer not in self.window_shares:
            return self.keep_window_size
        return round(self.window_shares[layer] * self.keep_window_size)

    @property
    def smallest_window(self) -> int:
        """The fewest keys that a layer may keep: keep_window_size, or that of a layer with a smaller share."""
        return min(self.keep_window_size, *map(self.window_of, self.window_shares or (0,)))

    @property
    def largest_window(self) -> int:
        """The most keys that a layer may keep: keep_window_size, or that of a layer with a larger share."""
        return max(self.keep_window_size, *map(self.window_of, self.window_shares or (0,)))

    def resolve(self, *, dense: bool = True) -> "DynamicMaskConfig":
        """Returns the config with its None sizes filled in.

        dense: True for a checkpoint trained with dense attention, which needs sinks and a local window.
        """
        size, sinks, local = self.keep_window_size, self.num_sink_tokens, self.local_window_size
        if sinks is None:
            sinks = min(4, size // 4, size - (local or 0)) if dense else 0
        if local is None:
            local = min(3 * size // 4, size - sinks) if dense else 0
        return replace(self, num_sink_tokens=sinks, local_window_size=local)

    def updated(self, values: dict[str, Any]) -> "DynamicMaskConfig":
        """Returns the config with single values changed, by name.

        Sinks and local window of before may not fit into a smaller keep_window_size, or what a window_share of before
        makes of it: the local window then keeps its share, unless one of them is among the values. Raises ValueError
        for unknown names and what does not fit.
        """
        merged, window = {**self.to_values(), **values}, values.get("keep_window_size")
        sinks, local = self.num_sink_tokens or 0, self.local_window_size or 0
        is_given = "num_sink_tokens" in values or "local_window_size" in values
        if isinstance(window, int) and 0 < window and not is_given:
            room = window if "window_shares" in values else self.without_places(window).smallest_window
            if room < sinks + local:
                sinks = min(sinks, room)
                merged["num_sink_tokens"] = sinks
                merged["local_window_size"] = min(local * window // self.keep_window_size, room - sinks)
        return type(self).from_dict(merged)

    def without_places(self, window: int) -> "DynamicMaskConfig":
        """Returns the config with another keep_window_size, all of which is contested."""
        return replace(self, keep_window_size=window, num_sink_tokens=0, local_window_size=0)

    def to_values(self) -> dict[str, Any]:
        """Returns all settings by name, as values that JSON can hold."""
        section = asdict(self)
        section["layers"] = None if self.layers is None else list(self.layers)
        if self.window_shares is not None:  # JSON has strings for keys
            section["window_shares"] = {str(layer): share for layer, share in self.window_shares.items()}
        return section

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as a section of a model config holds them: `to_values`, window_shares only if set."""
        section = self.to_values()
        if self.window_shares is None:
            del section["window_shares"]
        return section

    def chosen(self) -> dict[str, Any]:
        """Returns the settings that are not the defaults, as `flash_dmattn={...}` takes them."""
        defaults = type(self)().to_values()
        return {name: value for name, value in self.to_values().items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> "DynamicMaskConfig":
        """Reads a section of a model config. Raises ValueError naming the keys it does not know."""
        if not isinstance(section, dict):
            raise ValueError(f"config.{SECTION} must be a dict, got {type(section).__name__}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(key) for key in section if key not in known):
            raise ValueError(f"config.{SECTION} must only have the keys {known}, got {unknown}")
        return cls(**section)


def settings_in(config: Any) -> DynamicMaskConfig | None:
    """Returns the settings in a model config's section, None without a section."""
    section = getattr(config, SECTION, None)
    return None if section is None else DynamicMaskConfig.from_dict(section)


def read_values(values: Any) -> dict[str, Any]:
    """Returns the settings given as `flash_dmattn=...`, by name.

    values: a dict, a `DynamicMaskConfig`, or a JSON object as a string, for tools that pass on strings. Such a string
        may have ";" where JSON has ",", because some tools split their arguments at commas.

    Raises ValueError for anything else.
    """
    given = values
    if isinstance(values, DynamicMaskConfig):
        return values.to_values()
    if isinstance(values, str):
        try:
            values = json.loads(values.replace(";", ","))
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{SECTION} must be a JSON object if it is a string, such as {{"keep_window_size": 512}}, got '
                f'{given!r}; write ";" between its settings where a tool splits arguments at commas'
            ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{SECTION} must be a dict of settings, got {type(values).__name__} {given!r}")
    return values


def _layer_indices(layers: Any) -> tuple[int, ...]:
    if isinstance(layers, str | bytes) or not hasattr(layers, "__iter__"):
        raise ValueError(f"layers must be None or layer indices, got {layers!r}")
    indices = tuple(layers)
    if not indices or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
        raise ValueError(f"layers must be None or layer indices of at least 0, got {layers!r}")
    return tuple(sorted(set(indices)))


def read_shares(shares: Any) -> dict[int, float] | None:
    """Returns window_shares with integers for layers, in their order; None for None and for no layer.

    shares: a mapping; its layers may be strings, as in JSON. Raises ValueError for anything else.
    """
    if shares is None:
        return None
    if not isinstance(shares, Mapping):
        raise ValueError(f"window_shares must be None or a mapping from layer index to a number, got {shares!r}")
    found = {}
    for layer, share in shares.items():
        index = int(layer) if isinstance(layer, str) and layer.isascii() and layer.isdecimal() else layer
        if isinstance(index, bool) or not isinstance(index, int) or index < 0 or index in found:
            raise ValueError(f"window_shares must name layers by their index, each once, got {layer!r}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf"):
            raise ValueError(f"window_shares must be finite numbers above 0, got {share!r} for layer {index}")
        found[index] = share
    return dict(sorted(found.items())) or None


@contextmanager
def dynamic_mask_config(**values: Any) -> Iterator[None]:
    """Gives the models made inside the block these settings; they change those of a config's own section.

    values: fields of `DynamicMaskConfig`, as in its `updated`. Raises ValueError for an unknown one.
    """
    DynamicMaskConfig.from_dict({"keep_window_size": DynamicMaskConfig.keep_window_size, **values})
    token = _load_time_values.set({**(_load_time_values.get() or {}), **values})
    try:
        yield
    finally:
        _load_time_values.reset(token)


def load_time_values() -> dict[str, Any] | None:
    """Returns the values of the enclosing `dynamic_mask_config` block, None outside of one."""
    return _load_time_values.get()
