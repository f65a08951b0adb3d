"""FSDP2 as accelerate and ``transformers.Trainer`` prepare it: the optimizer is older than its shards."""

from __future__ import annotations

from typing import Any

import torch
from distributed_helpers import LIMIT, Net, equal, farthest, loss_of, on_ranks, optimizer_for, state_of, weights
from distributed_training import train

STEPS, CUT = 12, 5


def prepared(folder: str) -> dict[str, Any]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    # accelerate itself offers FSDP on accelerators only, and on a CPU does the same once it is told to
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",  # accelerate 1.10 loads no shards into an optimizer without a state
    )  # fmt: skip
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    ours = optimizer_for(model := Net(), {"weight_decay": 0.1, "refresh": 6})
    model, optimizer = accelerator.prepare(model, ours)
    assert optimizer.optimizer is ours
    assert all(hasattr(p, "placements") for p in ours.param_groups[0]["params"])
    for step in range(STEPS):
        if step == CUT:
            accelerator.save_state(folder)
            before = weights(model), state_of(ours)
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            optimizer.zero_grad()
            ours.state.clear()
            accelerator.load_state(folder)
            assert equal(before[0], weights(model))
            assert equal(before[1], state_of(ours))
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, step))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return weights(model)


def test_fsdp2_through_accelerate(tmp_path):
    """Steps, clipping, saving and loading; the same weights as one process."""
    options = {"weight_decay": 0.1, "refresh": 6, "side": "right"}
    alone = train(options, steps=STEPS, clip=0.1)["weights"]
    for rank in on_ranks(prepared, 2, str(tmp_path)):
        assert farthest(alone, rank) <= LIMIT
    assert farthest(alone, train(options, steps=STEPS)["weights"]) > 100 * LIMIT
