"""The layer of prompt tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from growthring.adapters._common import WrappingLayer, change_first
from growthring.errors import ConfigError

from .config import PromptTokensConfig

__all__ = ["PromptTokensLayer"]


class PromptTokensLayer(WrappingLayer):
    """Wraps the module that makes the sequence, and puts learned tokens into it; see :class:`PromptTokensConfig`.

    Several active prompts stand one after another, in the order in which they were activated.

    Attributes:
        prompt_tokens: Adapter name to the learned vectors ``(L, d)``.
    """

    adapter_layer_names = ("prompt_tokens",)
    other_param_names = ("_placement", "_start")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.prompt_tokens = nn.ParameterDict()
        self._placement: dict[str, str] = {}
        self._start: dict[str, int] = {}

    def update_layer(self, adapter_name: str, config: PromptTokensConfig) -> None:
        """Add a prompt.

        Args:
            adapter_name: Its name.
            config: Its config.

        Raises:
            ConfigError: If prompts of another placement or start are there already, or the width is unknown.
        """
        if config.placement is None:
            raise ConfigError("PromptTokensConfig: say placement='insert' or 'replace'")
        self._same("placement", config.placement, self._placement)
        self._same("start", config.start, self._start)
        values = torch.empty(config.num_tokens, self._width(), **self._like())
        nn.init.normal_(values, std=config.init_std)
        self.prompt_tokens[adapter_name] = nn.Parameter(values)
        self._placement[adapter_name], self._start[adapter_name] = config.placement, config.start
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _same(self, field: str, mine: Any, others: dict[str, Any]) -> None:
        for name, theirs in others.items():
            if theirs != mine:
                raise ConfigError(
                    f"PromptTokensConfig({field}={mine!r}): adapter {name!r} has {field}={theirs!r}; prompts of one "
                    "model share it, as they stand one after another"
                )

    def _width(self) -> int:
        base = self.get_base_layer()
        if isinstance(base, nn.Embedding):
            return base.embedding_dim
        for module in base.modules():  # the projection of the patches, or the table of the tokens
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                return module.out_channels
            if isinstance(module, nn.Embedding):
                return module.embedding_dim
            if isinstance(module, nn.Linear):
                return module.out_features
        raise ConfigError(
            f"{self.name} is a {type(base).__name__} that makes no embeddings; choose another target module"
        )

    @property
    def prompt_start(self) -> int:
        """Position of the first learned token in the sequence; 1 by default."""
        return next(iter(self._start.values()), 1)

    @property
    def active_prompt(self) -> Tensor | None:
        """Learned vectors of all active adapters ``(L, d)``; ``None`` if there are none."""
        active = [self.prompt_tokens[name] for name in self._active(self.prompt_tokens)]
        return torch.cat(active) if active else None

    @property
    def inserts(self) -> bool:
        """True if the sequence grows by the active prompts, False if they stand in place of other tokens."""
        return "replace" not in self._placement.values()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module and put the active prompts into the sequence that it returns.

        Args:
            *args: Arguments of the wrapped module.
            **kwargs: The same, by name.

        Returns:
            What the wrapped module returns; its first tensor ``(batch, tokens, width)`` with the prompts in it.

        Raises:
            ConfigError: If that is no sequence of the prompts' width, or too short to hold them.
        """
        output = self.base_layer(*args, **kwargs)
        prompt, start = self.active_prompt, self.prompt_start
        if prompt is None:
            return output

        def change(x: Tensor) -> Tensor:
            need = start if self.inserts else start + len(prompt)
            if x.dim() != 3 or x.shape[-1] != prompt.shape[-1] or x.shape[1] < need:
                raise ConfigError(
                    f"{self.name}: a sequence of at least {need} tokens of width {prompt.shape[-1]} is needed for "
                    f"{len(prompt)} prompt tokens from position {start}; (batch, tokens, width) was {tuple(x.shape)}. "
                    "Use fewer tokens or longer inputs"
                )
            rows = prompt.to(x.dtype).expand(len(x), -1, -1)
            return torch.cat([x[:, :start], rows, x[:, start if self.inserts else need :]], dim=1)

        return change_first(output, change, self.name)

    def __repr__(self) -> str:
        return "prompt_tokens." + super().__repr__()
