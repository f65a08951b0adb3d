"""Methods that keep a fine-tuned model near the pretrained one, for the sake of what lies outside the training data.

The three LARGO-style readings are our derivation from the paper's abstract: its method section is not public in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from ._method import Method, Paper

__all__ = ["LARGO", "robust_methods"]

LARGO = "largo-d"
"""The LARGO-style reading that the method ``"largo"`` stands for."""

_LARGO = Paper(
    "LARGO: Low-Rank Regulated Gradient Projection for Robust Parameter Efficient Fine-Tuning", "2506.12394"
)
_PISSA = Paper(
    "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", "2404.02948"
)
_MILORA = Paper("MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", "2406.09044")
_L2_SP = Paper("Explicit Inductive Bias for Transfer Learning with Convolutional Networks", "1802.01483")
_FTP = Paper("Fast Trainable Projection for Robust Fine-Tuning", "2310.19182")
_TPGM = Paper("Trainable Projected Gradient Method for Robust Fine-tuning", "2303.10720")
_SPD = Paper("Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", "2411.01713")
_DIGRAP = Paper("Directional Gradient Projection for Robust Fine-Tuning of Foundation Models", "2502.15895")

_DEFAULT = f"The LARGO-style reading that is taken by default, {LARGO}."
_WEIGHTS_ONLY = "That is about weights: accuracy elsewhere, or on earlier tasks, is promised by none of it."
_NOTHING = "None: the deviation from the pretrained weights is not bounded."
_OURS = "LARGO-style: our derivation from the abstract, whose method section is not public in full."
_SVD = "An SVD of every adapted weight, once, kept on disk."
_ANCHORED = "A whole model to train and to store, and a copy of the pretrained weights while it trains"


def _readings() -> Iterator[Method]:
    shared: dict[str, Any] = {"adapter": "largo", "paper": _LARGO, "learning_rate": 1e-3}
    yield Method(
        name="largo-f",
        title="LARGO-style, a radius for each factor",
        summary="Low-rank changes around the principal singular vectors of each weight, every factor kept within a "
        f"radius that is trained along by its own gradient. {_OURS}",
        guard="radius",
        guarantee="Each factor stays within its radius of where the task began after every step, which bounds how far "
        f"a weight can be from the pretrained one; bound and distance are measured and certified. {_WEIGHTS_ONLY}",
        cost=f"That of LoRA, one more low-rank branch and a few small kernels a step. {_SVD}",
        use_when="The model must stay near the pretrained one by a dial (mu), and rank 2r is affordable.",
        avoid_when="A small learning rate or an interpolation of plain LoRA already does it: compare with both.",
        choices=MappingProxyType({"adapter.form": ("delta", "residual")}),
        **shared,
    )
    yield Method(
        name="largo-p",
        title="LARGO-style, a radius for the product",
        summary="One factor over the principal input directions of each weight, which stay fixed; the change of the "
        f"weight is kept within a radius that is trained along by its own gradient. {_OURS}",
        guard="radius",
        guarantee="After every step no weight is further from where the task began, in Frobenius norm, than its "
        "radius, and so from the pretrained one than the sum over the tasks; radius and distance are measured and "
        f"certified. {_WEIGHTS_ONLY}",
        cost=f"Less than LoRA: one factor trains; a few small kernels a step. {_SVD}",
        use_when="The distance from the pretrained weights has to be bounded exactly, at the least cost.",
        avoid_when="The task needs input directions that the pretrained weights hardly read.",
        choices=MappingProxyType({"adapter.form": ("product",), "guard.granularity": ("layer",)}),
        **shared,
    )
    yield Method(
        name="largo-d",
        title="LARGO-style, directional",
        summary="Low-rank changes around the principal singular vectors of each weight; what of a gradient leads "
        f"straight away from the start is taken out by a strength that is trained along, one a factor. {_OURS}",
        guard="directional",
        guarantee=f"{_NOTHING} The distance is measured.",
        cost=f"That of LoRA, one more low-rank branch and a few small kernels a step. {_SVD}",
        use_when="To compare with the radius readings.",
        avoid_when="The distance from the pretrained weights has to be bounded: take largo-f or largo-p.",
        **shared,
    )


def _starts() -> Iterator[Method]:
    for name, paper, init, which in (
        ("pissa", _PISSA, "principal", "largest"),
        ("milora", _MILORA, "minor", "smallest"),
    ):
        yield Method(
            name=name,
            title=f"{'PiSSA' if name == 'pissa' else 'MiLoRA'} start",
            summary=f"LoRA that starts from the {which} singular values and vectors of each weight, beside what is "
            "left of the weight.",
            adapter="largo",
            paper=paper,
            guarantee=_NOTHING,
            cost=f"That of LoRA, and a copy of each adapted weight. {_SVD}",
            use_when="As the baseline for the LARGO-style readings: the same start, nothing regulated.",
            avoid_when="The distance from the pretrained weights matters: nothing bounds it.",
            learning_rate=1e-3,
            choices=MappingProxyType({"adapter.init": (init,), "adapter.form": ("residual",)}),
        )


def _family() -> Iterator[Method]:
    shared: dict[str, Any] = {"adapter": "linear", "learning_rate": 1e-4}
    norm = MappingProxyType({"guard.norm": ("rows", "tensor")})
    yield Method(
        name="l2-sp",
        title="L2-SP (linear weights)",
        summary="Every linear weight; a term of the loss pulls toward the pretrained weights.",
        guard="l2-sp",
        paper=_L2_SP,
        guarantee=f"{_NOTHING} It is weighed against the loss, and measured.",
        cost=f"{_ANCHORED}; one pass over the weights a batch.",
        use_when="As the plainest pull toward the pretrained model.",
        avoid_when="The result has to be a small adapter, or the distance has to be bounded.",
        **shared,
    )
    yield Method(
        name="ftp",
        title="FTP (linear weights)",
        summary="Every linear weight, projected after each step into a ball around the pretrained one, whose radius "
        "is trained along by the next batch's gradient. Unlike the published code, rows inside the ball do not count "
        "for the radius's gradient, and the state is kept from task to task.",
        guard="ftp",
        paper=_FTP,
        guarantee="After every step no row (or tensor) is further from the pretrained one than its radius. "
        f"{_WEIGHTS_ONLY}",
        cost=f"{_ANCHORED} and of the direction each weight was projected along; one projection a step.",
        use_when="To compare with FTP; radii need no validation data.",
        avoid_when="The result has to be a small adapter.",
        choices=norm,
        **shared,
    )
    yield Method(
        name="tpgm",
        title="TPGM (linear weights, once after training)",
        summary="Every linear weight, trained freely; when a task ends, each is projected into a ball around the "
        "pretrained one, whose radius is trained on validation rows. The radii are trained on validation rows, so "
        "accuracy on these is no longer a fair choice between settings of this method.",
        guard="tpgm",
        paper=_TPGM,
        guarantee="When a task ends no row (or tensor) is further from the pretrained one than its radius. "
        f"{_WEIGHTS_ONLY}",
        cost=f"{_ANCHORED}; a few hundred forward and backward passes when a task ends.",
        use_when="Validation rows are plenty: each layer gets the distance that generalises.",
        avoid_when="Validation rows are few, or choose between settings too.",
        choices=norm,
        **shared,
    )
    yield Method(
        name="spd",
        title="SPD (linear weights)",
        summary="Every linear weight; where the gradient already leads back toward the pretrained weight, the step "
        "away from it is undone.",
        guard="spd",
        paper=_SPD,
        guarantee=f"{_NOTHING} At weight 1 a tensor whose gradient leads back is no further away after the step.",
        cost=f"{_ANCHORED}; a few passes over the weights a step.",
        use_when="As a selective weight decay with one setting.",
        avoid_when="The result has to be a small adapter, or the distance has to be bounded.",
        **shared,
    )
    yield Method(
        name="digrap",
        title="DiGraP (linear weights)",
        summary="Every linear weight; what of a gradient leads straight away from the pretrained weight is taken out "
        "by a strength that is trained along, one a tensor.",
        guard="directional",
        paper=_DIGRAP,
        guarantee=f"{_NOTHING} The distance is measured.",
        cost=f"{_ANCHORED} and of the part taken out; a few passes over the weights a step.",
        use_when="To compare with DiGraP.",
        avoid_when="The result has to be a small adapter, or the distance has to be bounded.",
        **shared,
    )


def robust_methods() -> Iterator[Method]:
    """The LARGO-style readings and the default among them, SVD starts, and the robust family on linear weights."""
    readings = {method.name: method for method in _readings()}
    default = readings[LARGO]
    yield dataclasses.replace(
        default, name="largo", title=f"LARGO-style (as {LARGO})", summary=f"{_DEFAULT} {default.summary}"
    )
    yield from readings.values()
    yield from _starts()
    yield from _family()
