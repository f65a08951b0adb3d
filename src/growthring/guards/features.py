"""What protected matrices see: the features of every site, handed over while a model runs."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .attention import Attended, key_jacobian, real_rows, rows_at, watching
from .batches import head_of, mask_of, masks_apply, run_model
from .site import Site, Slots, original_name

__all__ = ["Key", "Sink", "capture", "group_by_input", "jacobians"]

Key = tuple[object, ...]
Sink = Callable[[Site, Tensor, Key], None]


class capture:
    """While open, hands the features of every site to ``sink(site, features, key)``.

    Features of linear maps come as the module sees them, ``(..., d)``; those of prefixes and prompts as rows
    ``(n, d)``, slots and padding left out. Equal keys mean the very same numbers, as long as the features of both are
    kept alive.

    Args:
        model: The model that the sites were found in.
        sites: Sites to listen to.
        batch: What the model is about to be run on; its attention mask says what is padding.
        sink: Called in the forward pass, whenever the site's matrix is used, with its features, detached.
        jacobians: For prompts, from :func:`jacobians`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batch: Any,
        sink: Sink,
        jacobians: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._sink, self._jacobians = model, sink, jacobians or {}
        self._mask = mask_of(batch) if masks_apply(model) else None
        plain = [site for site in sites if site.slots is None]
        self._inputs = _by_module(s for s in plain if s.scales != "output")
        self._outputs = _by_module(s for s in plain if s.scales == "output")
        self._outer = {site.outer for site in plain} - {""}
        self._slots = [(site, site.slots) for site in at_work(model, sites) if site.slots is not None]
        self._latest: dict[str, Tensor] = {}
        self._entered: set[str] = set()  # modules whose prompts have come in; the next attention is theirs
        self._calls = 0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> capture:
        modules = named(self._model)
        self._names = {id(module): name for name, module in modules.items()}
        with contextlib.ExitStack() as stack:
            if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in self._model.modules()):
                # a compiled graph calls no hook that came later
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if any(slots.feature != "token" for _, slots in self._slots):
                stack.enter_context(watching(self._model, self._attention))
            for name in {*self._inputs, *self._outer} & modules.keys():
                stack.callback(modules[name].register_forward_pre_hook(self._input(name), with_kwargs=True).remove)
            for name in self._outputs.keys() & modules.keys():
                stack.callback(modules[name].register_forward_hook(self._output(name)).remove)
            for name in {site.module for site, slots in self._slots if _first_only(site, slots)}:
                enter = self._entered.add
                stack.callback(modules[name].register_forward_pre_hook(lambda *_, n=name, e=enter: e(n)).remove)
            for site, slots in self._slots:
                if slots.feature == "token":
                    stack.callback(self._tokens(modules[site.module], site, slots).remove)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
        self._latest.clear()

    def _input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(first, Tensor):
                return
            if name in self._outer:
                self._latest[name] = first
            for site in self._inputs.get(name, ()):
                self._give(site, self._latest.get(site.outer, first))

        return hook

    def _output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                for site in self._outputs[name]:
                    self._give(site, output)

        return hook

    def _give(self, site: Site, features: Tensor) -> None:
        # the version counts changes in place: nn.ReLU(inplace=True) leaves other numbers at the same address
        version = 0 if features.is_inference() else features._version
        place = (features.data_ptr(), tuple(features.shape), features.stride(), features.dtype)
        self._sink(site, features.detach(), (*place, version))

    def _give_rows(self, site: Site, rows: Tensor) -> None:
        self._calls += 1
        self._sink(site, rows.detach(), (self._calls,))

    def _attention(self, call: Attended) -> None:
        name, layer = self._names.get(id(call.module), ""), getattr(call.module, "layer_idx", None)
        for site, slots in self._slots:
            if slots.feature == "token":
                continue
            if _first_only(site, slots):
                mine = site.module in self._entered
            elif slots.layer is not None:
                mine = slots.layer == layer
            else:
                mine = name.startswith(f"{site.module}.")
            if mine:
                self._give_rows(site, rows_at(call, slots, self._mask, self._jacobians.get(site.name)))
        self._entered.clear()

    def _tokens(self, module: nn.Module, site: Site, slots: Slots) -> Any:
        """Listen to the tokens that stand beside the prompts when these come in."""
        if isinstance(module, PeftModel):  # prompts are put in front of the embedded words
            module, slots = module.get_base_model().get_input_embeddings(), Slots("token", 0, 0, False)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 3:
                real = real_rows(output.shape[0], output.shape[1], slots, self._mask)
                self._give_rows(site, output[real.to(output.device)])

        return module.register_forward_hook(hook)


def named(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that sites use; the root's is empty."""
    return {original_name(n + ".").removesuffix(".") if n else "": module for n, module in model.named_modules()}


def at_work(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Sites without those prefixes and prompts whose adapter is not active: other rows stand in their slots."""
    modules = named(model)
    return [s for s in sites if s.slots is None or s.slots.adapter in _active(modules[s.module])]


def _active(module: Any) -> list[str]:
    if isinstance(module, PeftModel):  # its active_adapters are those of a PeftModel inside, if there is one
        return [module.active_adapter]
    return [] if module.disable_adapters else list(module.active_adapters)


def _by_module(sites: Iterable[Site]) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        found[site.module].append(site)
    return found


def _first_only(site: Site, slots: Slots) -> bool:
    """A prompt belongs to the first attention after it came in; prefixes have a layer or a module of their own."""
    return site.kind.startswith("prompt") and slots.feature != "token"


def jacobians(model: nn.Module, sites: Iterable[Site], batch: Any) -> dict[str, Tensor]:
    """How the first keys follow each prompt that needs it, by site."""
    wanted = [site for site in at_work(model, sites) if site.slots is not None and site.slots.feature == "logit"]
    if not wanted:
        return {}
    modules, one = named(model), head_of(batch, 1)
    parameters = {original_name(n): p for n, p in model.named_parameters()}
    return {s.name: key_jacobian(model, s, modules[s.module], parameters[s.parameter], one) for s in wanted}


def group_by_input(model: nn.Module, sites: list[Site], batch: Any) -> list[list[Site]]:
    """Group sites that see the very same input, so that they share one basis.

    One forward pass is watched; sites belong together when every call gave them the same memory in the same state.
    Query, key and value projections of one attention block are the usual case. Prefixes, prompts and scales each keep
    a basis of their own.

    Args:
        model: The model.
        sites: Sites to group.
        batch: What the model is run on, once.

    Returns:
        Groups in order of first appearance. A matrix that was never used forms a group of its own.
    """
    seen: dict[str, list[Key]] = defaultdict(list)
    alive: list[Tensor] = []  # holding the tensors keeps their addresses from being reused
    shared = [site for site in sites if site.slots is None and not site.scales]

    def sink(site: Site, features: Tensor, key: Key) -> None:
        seen[site.name].append(key)
        alive.append(features)

    if shared:
        with torch.no_grad(), capture(model, shared, batch, sink):
            run_model(model, batch)
    groups: dict[Key, list[Site]] = {}
    for site in sites:
        calls = tuple(seen.get(site.name, ()))
        groups.setdefault((site.dim, calls) if calls else (site.name,), []).append(site)
    return list(groups.values())
