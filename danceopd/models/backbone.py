"""`Backbone`: one frozen transformer on which student and teachers are LoRA adapters that can be switched in no time.

Adapted Linears become LoRA layers (lora.py), in which only the active adapter changes, never `requires_grad`: a
teacher's forward between the student's forward and backward cannot remove the student's gradient. Under gradient
checkpointing the recompute runs with the adapter of its forward. `merged` swaps in weights W + BA, so a rollout costs
what the bare base costs; there is one buffer for them, which never moves (a CUDA graph stays valid) and is computed
anew when another adapter is merged. `merged_with_grad` computes W + BA with a gradient, which is cheaper than LoRA
layers where the rank is large.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from danceopd.common.messages import few
from danceopd.errors import UserError
from danceopd.models.lora import Adapter, LoraLinear
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.family import Family


class ActiveAdapter(NamedTuple):
    """Which adapter is active, and how: in LoRA layers, in merged weights, or in weights merged with a gradient; or one
    for each row of the batch, in LoRA layers."""

    adapter: str | None = None
    merged: str | None = None
    merged_with_grad: str | None = None
    by_rows: tuple[tuple[str | None, int], ...] = ()  # adapters, and how many rows each has


class _Switched:
    """A context in which `active` is active. Reentrant: a retained graph recomputes more than once."""

    def __init__(self, backbone: Backbone, active: ActiveAdapter) -> None:
        self.backbone, self.active, self.before = backbone, active, list[ActiveAdapter]()

    def __enter__(self) -> None:
        self.before.append(self.backbone._active)
        self.backbone._switch(self.active)

    def __exit__(self, *error: object) -> None:
        self.backbone._switch(self.before.pop())


class Backbone:
    """A frozen transformer with named adapters. Outside the contexts below it is the bare base.

    Freezes `transformer` in place and puts it in eval mode; `family` says which modules a student adapts and how a
    velocity is computed. Adapters are fp32, on their layer's device. UserError when the transformer carries a LoRA.
    """

    def __init__(self, transformer: nn.Module, family: Family) -> None:
        self.transformer: Any = transformer.requires_grad_(False).eval()
        self.family = family
        if any(isinstance(module, LoraLayer | LoraLinear) for module in transformer.modules()):
            raise UserError("the transformer already carries a LoRA; fuse it or load the base without it")
        self._layers: dict[str, LoraLinear] = {}  # module path -> its LoRA layer, in the transformer's order
        self._base_weights: dict[str, Tensor] = {}  # module path -> the base weight, while a merged one is in its place
        self._merged: dict[str, Tensor] = {}  # module path -> W + BA of whoever was merged last
        self._merged_from: tuple[str, list[Any]] | None = None  # that adapter and its versions; None: stale
        self._cast_from: dict[str, list[Any]] = {}  # adapter -> the versions that its layers' low copies are of
        self._adapted: dict[str, list[str]] = {}  # adapter -> module paths
        self._parameters: dict[str, list[Parameter]] = {}  # adapter -> A, B of each module
        self._active = ActiveAdapter()
        self.rows_apart: dict[Any, bool] = {}  # kind of call -> whether `acting_by_rows` was seen to be exact there
        self.device: torch.device | None = None  # of adapters; None: where the layer is that they adapt
        if getattr(transformer, "is_gradient_checkpointing", False):
            self.checkpoint_gradients()

    # Adapters

    def add_adapter(self, name: str, adapter: Adapter, scale: float = 1.0, trainable: bool = False) -> None:
        """Add `adapter` under `name`, as `W + scale·BA`; every one of its modules must match.

        UserError when a module does not exist, is no Linear, or has another shape: the transformer is left
        as it was. ValueError when the name is taken or the adapter empty.
        """
        if name in self._adapted or not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"the adapter name {name!r} is taken or not made of letters, digits, - and _")
        if not adapter.tensors:
            raise ValueError(f"adapter {name!r} adapts nothing")
        linears = self._linears()
        unknown = [path for path in adapter.tensors if path not in linears]
        if unknown:
            raise UserError(
                f"adapter {name!r}: {len(unknown)} of {len(adapter.tensors)} modules are not in this transformer "
                f"({few(unknown)}); use a LoRA made for this base"
            )
        wrong = []
        for path, (a, b) in adapter.tensors.items():
            out_features, in_features = linears[path].out_features, linears[path].in_features
            if a.shape[1] != in_features or b.shape[0] != out_features or a.shape[0] != b.shape[1]:
                wrong.append(f"{path}: A {tuple(a.shape)} B {tuple(b.shape)} on {out_features}x{in_features}")
        if wrong:
            raise UserError(
                f"adapter {name!r}: {len(wrong)} of {len(adapter.tensors)} modules have another shape "
                f"({few(wrong)}); use a LoRA made for this base"
            )
        self._inject(name, adapter, scale, trainable)

    def new_student(
        self, name: str = "student", rank: int = 32, seed: int = 0, init: Adapter | None = None
    ) -> list[Parameter]:
        """Add a trainable adapter on every target of the family, and return its parameters (A, B per module).

        A is Kaiming-uniform from `seed`, B zero. `init` is copied into the first ranks, so that the student equals
        `init` at step 0, and its modules join the targets; UserError if its rank exceeds `rank`.
        """
        if rank < 1:
            raise UserError(f"the student's rank is {rank}; give 1 or more")
        start = {} if init is None else init.tensors
        largest = max((a.shape[0] for a, _ in start.values()), default=0)
        if largest > rank:
            raise UserError(
                f"the student's rank {rank} cannot hold its init of rank {largest}; raise rank to {largest}"
            )
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for path, layer in self._linears().items():
            if not re.fullmatch(self.family.lora_targets, path) and path not in start:
                continue
            out_features, in_features = layer.out_features, layer.in_features
            a = (2 * torch.rand(rank, in_features, generator=generator) - 1) * in_features**-0.5
            b = torch.zeros(out_features, rank)
            if path in start:
                first_a, first_b = start[path]
                if first_a.shape[1] == in_features and first_b.shape[0] == out_features:
                    a[: len(first_a)], b[:, : len(first_a)] = first_a, first_b
                else:
                    a, b = first_a, first_b  # add_adapter refuses it with the shapes
            tensors[path] = (a, b)
        tensors.update({path: pair for path, pair in start.items() if path not in tensors})
        self.add_adapter(name, Adapter(tensors), trainable=True)
        return self.parameters(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, in the order they were added."""
        return list(self._adapted)

    def modules(self, name: str) -> list[str]:
        """Paths of the modules that one adapter adapts, in the order of `parameters`."""
        return list(self._paths(name))

    def parameters(self, name: str) -> list[Parameter]:
        """The fp32 parameters of one adapter: A, B of each module, in the transformer's order."""
        self._paths(name)
        return list(self._parameters[name])

    @torch.no_grad()
    def adapter(self, name: str) -> Adapter:
        """The current weights of one adapter, scale folded into B: detached fp32 copies on the CPU."""
        tensors = {}
        for path in self._paths(name):
            lora = self._layers[path].loras[name]
            tensors[path] = (lora.a.cpu().clone(), lora.b.cpu() * lora.scale)
        return Adapter(tensors)

    @torch.no_grad()
    def assign(self, name: str, adapter: Adapter) -> None:
        """Overwrite an adapter's weights in place (resume, EMA); ValueError unless modules and ranks are equal."""
        loras = {path: self._layers[path].loras[name] for path in self._paths(name)}
        shapes = {path: (lora.a.shape, lora.b.shape) for path, lora in loras.items()}
        if shapes != {p: (a.shape, b.shape) for p, (a, b) in adapter.tensors.items()}:
            raise ValueError(f"the weights do not fit adapter {name!r}: other modules or other ranks")
        for path, (a, b) in adapter.tensors.items():
            loras[path].a.copy_(a)
            loras[path].b.copy_(b / loras[path].scale)

    def remove_adapter(self, name: str) -> None:
        """Take one adapter that is not active out again; its layers stay LoRA layers."""
        for path in self._paths(name):
            self._layers[path].remove(name)
        del self._adapted[name], self._parameters[name]
        self._cast_from.pop(name, None)
        self._merged_from = None

    def remove_adapters(self) -> None:
        """Take every adapter and all merged weights out: the transformer is the bare base again, without our layers."""
        if self._active != ActiveAdapter():
            raise RuntimeError("adapters are removed while none is active: outside of acting_as and merged")
        for path, layer in self._layers.items():
            parent, _, child = path.rpartition(".")
            setattr(self.transformer.get_submodule(parent), child, layer.base_layer)
        self._layers, self._adapted, self._parameters = {}, {}, {}
        self._merged, self._merged_from, self._cast_from = {}, None, {}

    # Which adapter is active

    def acting_as(self, name: str | None) -> AbstractContextManager[None]:
        """A context in which adapter `name` is active in the LoRA layers (None: the bare base). May be nested.

        KeyError for an adapter that is not there.
        """
        if name is not None:
            self._paths(name)
        return _Switched(self, ActiveAdapter(adapter=name))

    def acting_by_rows(self, names: Sequence[tuple[str | None, int]]) -> AbstractContextManager[None]:
        """A context in which the first rows of a batch have the first adapter (None: the bare base), and so on.

        `names` are adapters and how many rows each has. Without a gradient. A forward raises `RowsNotTold` where a
        layer's input does not tell the rows; KeyError for an adapter that is not there.
        """
        for name, _ in names:
            if name is not None:
                self._paths(name)
        return _Switched(self, ActiveAdapter(by_rows=tuple(names)))

    @contextmanager
    def overlaid(self, names: Sequence[str]) -> Iterator[None]:
        """Inside `acting_as`: layers that one of these adapters has run with it, and not with the active one."""
        each = [(self._layers[path], name) for name in names for path in self._paths(name)]
        for layer, name in each:
            layer.loras[name].cast(layer.compute_dtype)
            layer.activate(name)
        try:
            yield
        finally:
            for layer, _ in each:
                layer.activate(self._active.adapter)

    def merged(self, name: str) -> AbstractContextManager[None]:
        """A context in which the base weights are W + BA of `name` and no LoRA layer runs. May be nested.

        For rollouts. Run no backward of a merged forward: its weights are gone after the context. One adapter is merged
        at a time, into the same memory: on entry it is merged again where another one was since, or where its weights
        changed, except those written through `.data`, which need `refresh`. So enter once for many forwards.
        """
        if self._active.merged == name:
            self._merge(name)
        self._paths(name)
        return _Switched(self, ActiveAdapter(merged=name))

    def merged_with_grad(self, name: str) -> AbstractContextManager[None]:
        """A context in which the weights are W + BA of `name`, with a gradient to A and B; no LoRA layer runs.

        Computed on entry. Under gradient checkpointing this is `acting_as`: each block's recompute would otherwise
        merge all weights again.
        """
        if getattr(self.transformer, "is_gradient_checkpointing", False):
            return self.acting_as(name)
        self._paths(name)
        return _Switched(self, ActiveAdapter(merged_with_grad=name))

    def merging_is_cheaper(self, name: str) -> bool:
        """Whether `merged` and `merged_with_grad` cost less than the LoRA layers of `name`, and are exact."""
        layers = map(self._layers.__getitem__, self._paths(name))
        adapted = [(layer.weight, len(layer.loras[name].a)) for layer in layers]
        return may_copy_weights(self.transformer) and merging_costs_less(adapted)

    @torch.no_grad()
    def refresh(self, name: str) -> None:
        """Recompute the merged weights of `name`, in place, from the base weights (so rounding does not add up)."""
        if self._active.merged not in (None, name):
            raise RuntimeError(f"{name!r} would be merged into the weights that {self._active.merged!r} runs on")
        if any(self._layers[path].quantised for path in self._paths(name)):
            raise RuntimeError(f"{name!r} cannot be merged into quantised weights")
        self._merged_from = None
        for path in self._paths(name):
            layer, lora = self._layers[path], self._layers[path].loras[name]
            weight = self._base_weights.get(path, layer.weight.data)
            if path not in self._merged or self._merged[path].device != weight.device:
                self._merged[path] = torch.empty_like(weight)
            if weight.dtype == torch.float32:
                torch.addmm(weight, lora.b, lora.a, alpha=lora.scale, out=self._merged[path])
            else:  # the sum is fp32 and rounded once
                torch.add(weight, lora.b @ lora.a, alpha=lora.scale, out=self._merged[path])
        self._merged_from = name, self._versions(name)

    def velocity(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity `v = ε − x0` with the active adapter: `x (B, …)`, `sigma (B,)` -> shape of `x`, fp32."""
        for name in (self._active.adapter, *(name for name, _ in self._active.by_rows)):
            self._cast(name)
        if getattr(self.transformer, "gradient_checkpointing", False) and torch.is_grad_enabled():
            self.checkpoint_gradients()
        return self.family.velocity(self.transformer, x, sigma, condition)

    def checkpoint_gradients(self, enable: bool = True) -> None:
        """Gradient checkpointing: blocks recompute in backward, each with the adapter of its forward."""
        if not enable:
            self.transformer.disable_gradient_checkpointing()
        elif getattr(self.transformer, "_gradient_checkpointing_func", None) != self._checkpoint:
            self.transformer.enable_gradient_checkpointing(self._checkpoint)

    # Inside

    def _checkpoint(self, block: Callable, *args: Any) -> Any:
        active = self._active
        both = lambda: (nullcontext(), _Switched(self, active))  # noqa: E731
        return checkpoint(block, *args, use_reentrant=False, context_fn=both)

    def _switch(self, new: ActiveAdapter) -> None:
        """Make `new` the active adapter; only what differs from the one before is changed."""
        old = self._active
        if new.merged != old.merged:
            for path, weight in self._base_weights.items():
                self._layers[path].base_layer.weight.data = weight
            self._base_weights, self._active = {}, old._replace(merged=None)
            if new.merged:
                self._merge(new.merged)
            for path in self._paths(new.merged) if new.merged else ():
                parameter = self._layers[path].base_layer.weight
                self._base_weights[path], parameter.data = parameter.data, self._merged[path]
        if new.merged_with_grad or old.merged_with_grad:
            self._merge_with_grad(old.merged_with_grad, new.merged_with_grad)
        if new.adapter != old.adapter:
            self._cast(new.adapter)
            for layer in self._layers.values():
                layer.activate(new.adapter)
        if new.by_rows != old.by_rows:
            ends = list(accumulate((count for _, count in new.by_rows), initial=0))
            slices = [slice(*ends[i : i + 2]) for i in range(len(new.by_rows))]
            for layer in self._layers.values():
                mine = [layer.loras.get(name or "") for name, _ in new.by_rows]
                layer.by_rows = list(zip(slices, mine)) if any(mine) else []
        self._active = new

    def _merge(self, adapter: str) -> None:
        """Merge an adapter unless it is the one that was merged last, and has not changed since."""
        if self._merged_from != (adapter, self._versions(adapter)):
            self.refresh(adapter)

    def _cast(self, adapter: str | None) -> None:
        """Bring the LoRA layers' copies in the base's dtype up to date with an adapter's fp32 weights."""
        if adapter and self._cast_from.get(adapter) != (versions := self._versions(adapter)):
            for layer in map(self._layers.__getitem__, self._paths(adapter)):
                layer.loras[adapter].cast(layer.compute_dtype)
            self._cast_from[adapter] = versions

    def _merge_with_grad(self, old: str | None, new: str | None) -> None:
        """Put W + BA in front of the layer's own parameter, which stays where it is and as it is."""
        for layer in (self._layers[path] for path in (self._paths(old) if old else ())):
            layer.base_layer.__dict__.pop("weight", None)
        for layer in (self._layers[path] for path in (self._paths(new) if new else ())):
            base, lora = layer.base_layer, layer.loras[new or ""]
            base.__dict__["weight"] = torch.addmm(base.weight, lora.b, lora.a, alpha=lora.scale)

    def _inject(self, name: str, adapter: Adapter, scale: float, trainable: bool) -> None:
        if self._active != ActiveAdapter():
            raise RuntimeError("an adapter is added while none is active: outside of acting_as and merged")
        linears = self._linears()
        for path, pair in adapter.tensors.items():
            if path not in self._layers:
                parent, _, child = path.rpartition(".")
                self._layers[path] = LoraLinear(linears[path]).eval()
                setattr(self.transformer.get_submodule(parent), child, self._layers[path])
            self._layers[path].add(name, *pair, float(scale), trainable, self.device)
        order = (path for path, _ in self.transformer.named_modules() if path in self._layers)
        self._layers = {path: self._layers[path] for path in order}
        self._adapted[name] = [path for path in self._layers if path in adapter.tensors]
        loras = [self._layers[path].loras[name] for path in self._adapted[name]]
        self._parameters[name] = [half for lora in loras for half in (lora.a, lora.b)]

    def _linears(self) -> dict[str, nn.Linear]:
        """Module path -> the Linear there (the base layer where a LoRA layer already wraps it)."""
        found: dict[str, nn.Linear] = {}
        for path, module in self.transformer.named_modules():
            module = module.base_layer if isinstance(module, LoraLinear) else module
            if isinstance(module, nn.Linear) and not path.endswith(".base_layer"):
                found[path] = module
        return found

    def _paths(self, name: str) -> list[str]:
        try:
            return self._adapted[name]
        except KeyError:
            raise KeyError(f"no adapter {name!r}; there are {sorted(self._adapted)}") from None

    def _versions(self, name: str) -> list[Any]:
        return [self._parameters[name][0].device, *(p._version for p in self._parameters[name])]


MAX_COPIED_PARAMETERS = 1_000_000_000
"""Larger transformers get no copy of their weights that only serves speed."""


def may_copy_weights(transformer: nn.Module) -> bool:
    """Whether the transformer is small enough to hold merged copies of its weights for speed alone."""
    return sum(p.numel() for p in transformer.parameters()) <= MAX_COPIED_PARAMETERS


def merging_costs_less(adapted: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether the ranks of `adapted` (weight, rank) are so large that W + BA costs less than the LoRA layers.

    False for sharded (FSDP) weights and for half precision, where merging would round.
    """
    if any(type(weight) is not nn.Parameter or weight.dtype != torch.float32 for weight, _ in adapted):
        return False
    return sum(weight.numel() for weight, _ in adapted) < sum(3 * rank * sum(weight.shape) for weight, rank in adapted)
