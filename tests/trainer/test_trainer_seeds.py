"""One seed for everything."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from trainer_helpers import differing, stream_of, weights

import growthring as gr


@pytest.mark.parametrize("head", ["label-text", "linear"])
@pytest.mark.parametrize("guarded", [False, True])
def test_the_same_seed_gives_the_same_run_bit_for_bit(build, lora, head, guarded):
    def once(noise):
        torch.manual_seed(noise)  # what was drawn before is of no account
        random.seed(noise)
        np.random.seed(noise)
        guards = [gr.PEGP(energy=0.9, samples=16)] if guarded else []
        trainer = build(adapter=lora(lora_dropout=0.2), head=head, guards=guards)
        start = weights(trainer)
        torch.rand(noise + 1)  # nor what was drawn in between
        run = trainer.fit()
        return start, weights(trainer), run

    (start, end, run), (start2, end2, run2) = once(3), once(7)
    assert differing(start, start2) == []
    assert differing(end, end2) == []
    assert run.matrix == run2.matrix
    assert [c.to_dict() for c in run.certificates] == [c.to_dict() for c in run2.certificates]


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_another_seed_gives_another_run(build, head):
    one, two = build(head=head, seed=1), build(head=head, seed=2)
    names = differing(weights(one), weights(two))
    assert any("lora_A" in n for n in names)
    assert ("head.initial" in names) == (head == "linear")
    one.fit()
    two.fit()
    assert any("lora_B" in n for n in differing(weights(one), weights(two)))


def test_the_seed_decides_the_order_of_the_data(build):
    """Full fine-tuning draws nothing at the start: what differs is the order alone."""
    one, two = build(adapter="linear", seed=1), build(adapter="linear", seed=2)
    assert differing(weights(one), weights(two)) == []
    one.fit()
    two.fit()
    assert differing(weights(one), weights(two))


def test_the_first_adapter_does_not_depend_on_the_head(build):
    parts = [{k: v for k, v in weights(build(head=h)).items() if "lora" in k} for h in ("label-text", "linear")]
    assert differing(*parts) == []


def test_the_seed_of_the_arguments_is_the_default(build):
    trainer = build(seed=None, args={"seed": 11})
    assert trainer.seed == 11
    run = trainer.fit()
    assert run.seed == 11
    assert run.to_dict()["seeds"] == {"everything": 11, "stream": 0}
    other = build(seed=11)
    other.fit()
    assert differing(weights(trainer), weights(other)) == []


def test_tasks_are_drawn_with_seeds_of_their_own(build):
    """The second task of one run and the first of another do not see the same random numbers."""
    seen = []

    class Watch(gr.guards.base.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((args.seed, args.data_seed))

    build(stream_of(3), callbacks=[Watch()]).fit()
    assert seen == [(1000, 1000), (1001, 1001), (1002, 1002)]
