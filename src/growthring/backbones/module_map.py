"""What :func:`map_modules` returns: blocks, attention, projections, MLP, norms and embeddings, by qualified name."""

from __future__ import annotations

from dataclasses import dataclass

from growthring.errors import ConfigError, nearest

__all__ = ["ROLES", "Attention", "Block", "Mlp", "ModuleMap", "Stack"]

ROLES = {
    "query": "query projections",
    "key": "key projections",
    "value": "value projections",
    "self_query": "query projections of self-attention",
    "self_value": "value projections of self-attention",
    "cross_query": "query projections of cross-attention (a decoder that attends to an encoder)",
    "cross_value": "value projections of cross-attention",
    "attention_input": "query, key and value projections, fused or not",
    "attention_output": "projections of the attended values back to the width of the model",
    "attention": "all of attention's linear layers",
    "mlp_up": "linear layers into the MLP, gates included",
    "mlp_gate": "linear layers whose activation multiplies the rest of a gated MLP",
    "mlp_down": "linear layers out of the MLP",
    "mlp": "all of the MLP's linear layers",
    "all": "all of attention's and the MLP's linear layers",
}
"""Roles that :meth:`ModuleMap.linears` knows, and what each of them means."""


@dataclass(frozen=True)
class Attention:
    """One attention of a block.

    Attributes:
        module: Innermost module in which queries meet keys.
        query: Query projection; several attributes name the same module where projections are fused.
        key: Key projection.
        value: Value projection.
        output: Projection of the attended values back to the model's width; ``None`` if there is none.
        cross: True when keys come from somewhere else than queries (the second attention of a decoder block).
        thirds: True when one fused projection gives ``[query | key | value]`` in this order along its last axis.
    """

    module: str
    query: str
    key: str
    value: str
    output: str | None
    cross: bool = False
    thirds: bool = False

    @property
    def fused(self) -> bool:
        """True when one projection serves more than one of query, key and value."""
        return len(self.inputs) < 3

    @property
    def inputs(self) -> tuple[str, ...]:
        """Input projections, each once, in the order query, key, value."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))


@dataclass(frozen=True)
class Mlp:
    """One MLP of a block.

    Attributes:
        up: Linear layers that read the MLP's input; two of them in a gated MLP.
        down: Linear layer that gives its output.
        gate: The one of ``up`` whose activation multiplies the other's output; ``None`` in an MLP without a gate, or
            with both in one fused layer.
    """

    up: tuple[str, ...]
    down: str
    gate: str | None = None


@dataclass(frozen=True)
class Block:
    """One of the repeated layers.

    Attributes:
        name: Qualified name.
        attentions: Attentions in the order of execution.
        mlps: MLPs in the order of execution; empty where they hold no linear layers (fused experts).
        norms: Normalisation layers inside the block.
    """

    name: str
    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """Blocks that follow one another: an encoder, a decoder, one tower of a dual encoder.

    Attributes:
        name: Qualified name of the container of the blocks.
        modality: ``"text"``, ``"image"`` or ``"other"``, from the model's input that reaches the first block.
        blocks: The blocks in order.
        embeddings: Module that makes the sequence ``(batch, tokens, width)`` out of the model's input; ``None`` if
            no module's output is that sequence.
        token_embedding: The ``nn.Embedding`` that reads the token ids; ``None`` for images.
    """

    name: str
    modality: str
    blocks: tuple[Block, ...]
    embeddings: str | None
    token_embedding: str | None


@dataclass(frozen=True)
class ModuleMap:
    """The parts of a model.

    Attributes:
        model: Name of the model's class.
        stacks: Stacks in the order of execution.
        shared_inputs: Groups of linear layers that read the very same tensor, in the order of execution.
    """

    model: str
    stacks: tuple[Stack, ...]
    shared_inputs: tuple[tuple[str, ...], ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks of all stacks."""
        return tuple(block for stack in self.stacks for block in stack.blocks)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities of the stacks, each once."""
        return tuple(dict.fromkeys(stack.modality for stack in self.stacks))

    def tower(self, modality: str) -> ModuleMap:
        """The part of the map that reads one modality.

        Args:
            modality: ``"text"`` or ``"image"``.

        Raises:
            ConfigError: If no stack reads it.
        """
        stacks = tuple(stack for stack in self.stacks if stack.modality == modality)
        if not stacks:
            raise ConfigError(
                f"{self.model} has no {modality!r} tower; it has {', '.join(map(repr, self.modalities))}"
            )
        return ModuleMap(self.model, stacks, self.shared_inputs)

    def linears(self, role: str) -> tuple[str, ...]:
        """Linear layers of one role, as ``target_modules`` of any PEFT config take them.

        Args:
            role: One of :data:`ROLES`.

        Returns:
            Qualified names in the order of the blocks, each once.

        Raises:
            ConfigError: For an unknown role, or one that no layer of the model has.
        """
        if role not in ROLES:
            raise ConfigError(f"role {role!r} is unknown; {nearest(role, ROLES)}")
        names: list[str | None] = []
        for block in self.blocks:
            for part in block.attentions:
                kind, _, projection = role.rpartition("_")
                if projection in ("query", "key", "value") and kind in ("", "cross" if part.cross else "self"):
                    names.append(getattr(part, projection))
                if role in ("attention_input", "attention", "all"):
                    names += part.inputs
                if role in ("attention_output", "attention", "all"):
                    names.append(part.output)
            for mlp in block.mlps:
                if role in ("mlp_up", "mlp", "all"):
                    names += mlp.up
                if role == "mlp_gate":
                    names.append(mlp.gate)
                if role in ("mlp_down", "mlp", "all"):
                    names.append(mlp.down)
        found = tuple(dict.fromkeys(name for name in names if name is not None))
        if not found:
            raise ConfigError(f"{self.model} has no linear layers of role {role!r} ({ROLES[role]})")
        return found
