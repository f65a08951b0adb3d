"""A dual encoder (CLIP and its like) as a classifier: one prompt per class, read by the text tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from growthring.errors import ConfigError
from growthring.guards.batches import evaluating

from .classifier import StreamClassifier, StreamHead
from .encoders import base_of, text_features

__all__ = ["ClassPrompts", "DualClassifier", "class_prompts"]


def class_prompts(template: str, texts: Sequence[str]) -> list[str]:
    """Class names in a sentence.

    Args:
        template: Text with one ``{}``, where the name goes.
        texts: Names of the classes, in words.

    Raises:
        ConfigError: If there is not exactly one place for the name.
    """
    if template.count("{}") != 1:
        raise ConfigError(f"prompt_template={template!r}: it needs one {{}}, where the class name goes")
    return [template.replace("{}", text) for text in texts]


class ClassPrompts(StreamHead):
    """The prompts of all classes, as token ids; the weights that read them are the encoder's.

    Args:
        tokens: Token ids of each class's prompt, unpadded.
        template: What they were made with.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], template: str) -> None:
        super().__init__()
        self.tokens, self.template = [list(t) for t in tokens], template


class DualClassifier(StreamClassifier):
    """Logits are ``exp(logit_scale) * cos(image, text)``, with the text of every class from its prompt.

    The text tower runs anew whenever it trains, on the prompts of the batch's own tasks alone: so guards see the
    prompts of the classes that are learned and of no others. While it does not change, its vectors are kept. Prompts
    of different lengths run apart, so no padding is ever read.

    Args:
        encoder: A dual encoder, or a PEFT model around one.
        prompts: The class prompts.
        task_classes: As for :class:`~growthring.trainer.classifier.StreamClassifier`.
        classes: Number of classes of all tasks.
    """

    head: ClassPrompts

    def __init__(
        self, encoder: nn.Module, prompts: ClassPrompts, task_classes: Sequence[Sequence[int]], classes: int
    ) -> None:
        super().__init__(encoder, prompts, "own", task_classes, classes)
        self._kept: tuple[object, Tensor] | None = None

    def logits(self, features: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Scores of classes; minus infinity for classes that no task in ``tasks`` has.

        Args:
            features: ``(batch, d)`` image features, normalised or not.
            tasks: ``(batch,)`` task ids; ``None``: all classes.

        Returns:
            ``(batch, classes)``.
        """
        classes = list(range(len(self.head.tokens)))
        if tasks is not None:
            classes = self.allowed[tasks.unique()].any(0).nonzero().flatten().tolist()
        scores = F.normalize(features, dim=-1) @ self.text_vectors(classes, fresh=tasks is not None).T
        scores = scores * base_of(self.encoder).logit_scale.exp().to(scores.dtype)  # type: ignore[operator]
        if len(classes) == len(self.head.tokens):
            return scores
        every = scores.new_full((len(scores), len(self.head.tokens)), float("-inf"))
        return every.index_copy(1, torch.tensor(classes, device=scores.device), scores)

    def text_vectors(self, classes: Sequence[int], *, fresh: bool = False) -> Tensor:
        """Unit vectors ``(len(classes), d)`` of class prompts.

        Args:
            classes: Class ids.
            fresh: Run a text tower that trains even if nothing has changed since, so that hooks in it see the
                prompts.
        """
        parameters = self._text_parameters()
        trains = any(p.requires_grad for p in parameters)
        if trains and (torch.is_grad_enabled() or self.training):
            self._kept = None  # a fused optimizer changes weights without counting it in their version
        if trains and (fresh or torch.is_grad_enabled()):
            return self._read(classes)
        state = self._state(parameters)
        if self._kept is None or self._kept[0] != state:
            with evaluating(self.encoder):
                self._kept = (state, self._read(range(len(self.head.tokens))))
        return self._kept[1][list(classes)]

    def head_settings(self) -> dict[str, Any]:
        """What ``head.json`` says of the head itself."""
        return super().head_settings() | {"prompt_template": self.head.template}

    def head_tensors(self) -> dict[str, Tensor]:
        """The class vectors as they are now."""
        with torch.no_grad():
            return {"vectors": self.text_vectors(range(len(self.head.tokens)))}

    def _read(self, classes: Sequence[int]) -> Tensor:
        by_length: dict[int, list[int]] = {}
        for place, number in enumerate(classes):
            by_length.setdefault(len(self.head.tokens[number]), []).append(place)
        parts, order = [], []
        for places in by_length.values():
            ids = torch.tensor([self.head.tokens[classes[place]] for place in places], device=self.allowed.device)
            parts.append(F.normalize(text_features(self.encoder, ids), dim=-1))
            order += places
        return torch.cat(parts)[torch.tensor(order, device=self.allowed.device).argsort()]

    def _text_parameters(self) -> list[nn.Parameter]:
        base = base_of(self.encoder)
        return [*base.text_model.parameters(), *base.text_projection.parameters()]  # type: ignore[union-attr]

    def _state(self, parameters: Sequence[nn.Parameter]) -> object:
        """Whatever the text vectors depend on: weights (by place and version), and which adapters work how much."""
        layers = [m for m in self.encoder.modules() if isinstance(m, BaseTunerLayer)]
        return (
            tuple((p.data_ptr(), p._version, p.dtype) for p in parameters),
            tuple((layer.disable_adapters, tuple(layer.active_adapters), layer.merged) for layer in layers),
            tuple(tuple(getattr(layer, "scaling", {}).items()) for layer in layers),
        )
