"""Configuration of bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from growthring.adapters._common import check_tower, names, peft_type, positive
from growthring.errors import ConfigError, nearest

from .activations import activation

__all__ = ["BottleneckConfig"]

PLACEMENTS = ("attention", "mlp", "both")
MODES = ("parallel", "sequential")


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """A bottleneck adapter: two linear layers with an activation between them, beside or after parts of the model.

    With ``g(z) = up(act(down(z)))``, both linear layers with bias:

    - ``mode="parallel"``: ``h = f(x) + s g(x)`` (He et al. 2022, arXiv 2110.04366; PEGP, arXiv 2405.13383, eq. 5);
    - ``mode="sequential"``: ``h = f(x)``, then ``h + s g(h)`` (Houlsby et al. 2019, arXiv 1902.00751).

    With ``placement``, ``f`` is attention or the MLP of every block, up to its last linear layer, before any residual
    or norm: the last linear layer is wrapped, and in parallel mode ``x`` is what the first linear layer reads. With
    ``target_modules``, ``f`` is the module named and ``x`` its first argument. The adapters of several active names
    are added; all of them read the same ``x`` or ``h``.

    Args:
        r: Width of the bottleneck.
        placement: ``"attention"``, ``"mlp"`` or ``"both"``; parts are found from the model's structure. The default
            is ``"both"`` where no ``target_modules`` are named.
        mode: ``"parallel"`` or ``"sequential"``.
        activation: Name of an element-wise activation of PyTorch: ``relu``, ``gelu``, ``silu``, ``tanh``,
            ``identity`` and others.
        scaling: The factor ``s``; it is not trained.
        dropout: Share of the bottleneck's input that is dropped in training.
        init_weights: ``True`` starts ``up`` at zero, so that the model starts unchanged; ``False`` at random.
        tower: ``"text"`` or ``"image"``: only this tower of a dual encoder; both by default.
        target_modules: Names of modules, or a regex, in place of ``placement``; ``"all-linear"`` works as in PEFT.
        exclude_modules: Names of modules, or a regex, that are left alone.
        layers_to_transform: Numbers of the blocks that get adapters; all by default.
        layers_pattern: Name of the list of blocks, for ``layers_to_transform`` with ``target_modules``.
        modules_to_save: Modules that train and are saved as a whole, such as a new head.
        input_modules: Filled in by ``placement`` and saved: wrapped module to the module whose input it adapts.

    Raises:
        ConfigError: For values out of range, or ``placement`` together with ``target_modules``.
    """

    r: int = field(default=16, metadata={"help": "Width of the bottleneck."})
    placement: str | None = field(default=None, metadata={"help": "'attention', 'mlp' or 'both'."})
    mode: str = field(default="parallel", metadata={"help": "'parallel' or 'sequential'."})
    activation: str = field(default="relu", metadata={"help": "Name of an element-wise activation."})
    scaling: float = field(default=1.0, metadata={"help": "Fixed factor of the adapter's output."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in training."})
    init_weights: bool = field(default=True, metadata={"help": "True: `up` starts at zero. False: at random."})
    tower: str | None = field(default=None, metadata={"help": "'text' or 'image': one tower of a dual encoder."})
    target_modules: set[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regex) of the modules to wrap, in place of `placement`."}
    )
    exclude_modules: set[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regex) of modules that are left alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks that get adapters."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, with `layers_to_transform`."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that train and are saved as a whole."}
    )
    input_modules: dict[str, str] | None = field(
        default=None, metadata={"help": "Filled in by `placement`: wrapped module to the module whose input it reads."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("growthring_bottleneck")
        self.target_modules, self.exclude_modules = names(self.target_modules), names(self.exclude_modules)
        positive(self, "r")
        check_tower(self, self.tower)
        activation(self.activation)
        if self.mode not in MODES:
            raise ConfigError(f"BottleneckConfig(mode={self.mode!r}): {nearest(str(self.mode), MODES)}")
        if self.placement is None and self.target_modules is None:
            self.placement = "both"
        if self.placement is not None and self.placement not in PLACEMENTS:
            raise ConfigError(
                f"BottleneckConfig(placement={self.placement!r}): {nearest(str(self.placement), PLACEMENTS)}"
            )
        if self.input_modules is None:  # not resolved yet
            if self.placement is not None and self.target_modules is not None:
                raise ConfigError("BottleneckConfig: placement and target_modules both say where; give one")
            if self.tower is not None and self.target_modules is not None:
                raise ConfigError("BottleneckConfig: tower goes with placement; target_modules name modules already")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"BottleneckConfig(dropout={self.dropout!r}): give a share in [0, 1)")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.layers_pattern and self.placement is not None:
            raise ConfigError("BottleneckConfig: layers_pattern goes with target_modules; placement knows the blocks")
