"""A private copy of a network and its criterion: batch in, loss out, at whatever tensors are put in their place."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from msam_analysis.objective.examination import ExaminationError
from msam_analysis.objective.nested import map_tensors
from msam_analysis.objective.randomness import RandomStream, same_state

if TYPE_CHECKING:  # which is made of private copies
    from msam_analysis.objective.sharded import Units

LossFunction = Callable[..., Tensor | tuple[Tensor, Tensor | float]]
Slot = tuple[dict[str, Any], str]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A module's own bookkeeping, and the mode, which the objective chooses.
_INTERNAL = {"_parameters", "_buffers", "_modules", "training", "_compiled_call_impl", *_HOOKS}
_INTERNAL |= {"redirect", "reached", "fresh", "units", "whose"}
_RUNNING = threading.local()  # ``losses``: whose losses a thread is inside of
_DEEPEST = 20  # losses that evaluate other objectives


class LossModule(nn.Module):
    """Batch in, loss out: the network's tensors are named ``model.*``, those of a criterion ``loss_fn.*``."""

    # Tensors of the original, by identity, and where their stand-ins lie here: for a loss_fn or a forward that reaches
    # past this copy to the original, as ``reached`` says afterwards.
    redirect: dict[int, Slot] | None = None
    reached = False
    fresh: Attributes | None = None  # attributes to be put back before each pass, for modules that write to them
    units: Units | None = None  # what gathers weights that are divided among processes

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.whose = id(model), id(loss_fn)  # copies are of the same ones

    def forward(self, batch: Any) -> Any:
        """Return what ``loss_fn`` returns.

        Raises ExaminationError: The loss has come back to itself, as where it evaluates its own objective: it would go
        on for ever, at tensors that are not those of this pass.
        """
        running = vars(_RUNNING).setdefault("losses", [])
        if self.whose in running or len(running) > _DEEPEST:
            raise ExaminationError(
                "the loss evaluates an objective of itself: expected a function of model and batch alone; compute what "
                "it needs beforehand, or from the model that it is given"
            )
        running.append(self.whose)
        try:
            return self._forward(batch)
        finally:
            running.pop()

    def _forward(self, batch: Any) -> Any:
        if self.fresh is not None:
            self.fresh.restore()
        if self.redirect is None:
            return self._loss(batch)
        with Redirect(self.redirect) as led:
            try:
                return self._loss(batch)
            finally:
                self.reached = self.reached or led.used

    def _loss(self, batch: Any) -> Any:
        if is_pair(batch):
            return self.loss_fn(self.model(batch[0]), batch[1])
        return self.loss_fn(self.model, batch)

    def private_copy(self, own: Callable[[Tensor], Tensor] | None = None) -> LossModule:
        """Return a copy of the modules that shares every parameter and buffer, or what ``own`` returns in their place.

        A criterion that is no module is the same object. Hooks are not copied: they are the owner's, who did not ask to
        see these passes. Those of :mod:`torch.nn.utils` are copied, since they compute weights (weight norm, pruning).
        """
        tensors = (*self.parameters(), *self.buffers())
        memo: dict[int, Any] = {id(tensor): own(tensor) if own is not None else tensor for tensor in tensors}
        if not isinstance(self.loss_fn, nn.Module):
            memo[id(self.loss_fn)] = self.loss_fn
        for module in self.modules():
            for hooks in _hooks(module):
                memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if _computes_weights(hook))
            for value in vars(module).values():
                if isinstance(value, Tensor):  # a weight that such a hook computed has a history: deepcopy refuses it
                    memo[id(value)] = value.detach().clone()
        units = {module: _blank(module) for module in self.modules() if is_unit(module)}
        memo.update((id(unit), blank) for unit, blank in units.items())
        try:
            copied = copy.deepcopy(self, memo)
            for unit, blank in units.items():
                vars(blank).update(copy.deepcopy(_without_sharding(unit), memo))
        except Exception as error:
            raise ValueError(
                f"the model cannot be copied ({type(error).__name__}: {error}): expected modules that copy.deepcopy "
                "accepts; remove attributes that hold open files, locks or tensors with a history"
            ) from error
        for module in copied.modules():
            if getattr(module, "sparse", None) is True:  # sparse gradients of an embedding have no second derivative
                vars(module)["sparse"] = False
        return copied

    def slots(self) -> dict[str, list[Slot]]:
        """Return where every parameter and buffer lies, by its name; tied ones lie in several places."""
        name_of = {id(t): name for named in (self.named_parameters, self.named_buffers) for name, t in named()}
        found: dict[str, list[Slot]] = {name: [] for name in name_of.values()}
        for module in self.modules():
            for owned in (module._parameters, module._buffers):
                for key, tensor in owned.items():
                    if tensor is not None:
                        found[name_of[id(tensor)]].append((owned, key))
        return found

    @contextlib.contextmanager
    def cut_outputs(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Inside, the model's outputs reach ``loss_fn`` as leaves; the list grows by (output, leaf) at every call."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def cut(tensor: Tensor) -> Tensor:
            if not (tensor.requires_grad and tensor.is_floating_point()):
                return tensor
            leaf = tensor.detach().requires_grad_()
            pairs.append((tensor, leaf))
            return leaf.clone()  # a loss may work in place, which a leaf forbids

        handle = self.model.register_forward_hook(lambda _module, _inputs, output: map_tensors(output, cut))
        try:
            yield pairs
        finally:
            handle.remove()

    @property
    def changing_hooks(self) -> int:
        """Number of hooks that :meth:`private_copy` leaves out and that may change what a forward pass computes."""
        return self._left_out(_HOOKS[:2])

    @property
    def foreign_hooks(self) -> int:
        """Number of hooks that :meth:`private_copy` leaves out."""
        return self._left_out(_HOOKS)

    def _left_out(self, kinds: Sequence[str]) -> int:
        found = (hook for module in self.modules() for hooks in _hooks(module, kinds) for hook in hooks.values())
        return sum(not _computes_weights(hook) and not _of_fsdp(hook) for hook in found)


class Redirect(TorchFunctionMode):
    """Inside, torch's functions get the stand-ins of tensors that belong to somebody else."""

    def __init__(self, table: Mapping[int, Slot]) -> None:
        super().__init__()
        self._table = table
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with the stand-ins."""
        return func(*self._exchanged(args), **{key: self._exchanged(item) for key, item in (kwargs or {}).items()})

    def _exchanged(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            slot = self._table.get(id(item))
            if slot is None:
                return item
            self.used = True
            return slot[0][slot[1]]
        if type(item) in (tuple, list):
            return type(item)(self._exchanged(part) for part in item)
        return item


class Attributes:
    """The attributes of modules as they are now, so that a change is noticed and can be undone."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept = [(vars(part), _attributes(part), _contents(part)) for part in module.modules()]

    def changed(self) -> bool:
        """Whether a module or an attribute has come, gone or become another."""
        parts = list(self._module.modules())
        if len(parts) != len(self._kept):
            return True
        return any(
            vars(part) is not now
            or not _same(_attributes(part), before)
            or any(_unlike(container, kept) for container, kept in contents)
            for part, (now, before, contents) in zip(parts, self._kept, strict=True)
        )

    def restore(self) -> None:
        """Put every attribute back, and the contents of lists, dictionaries and sets."""
        for now, before, contents in self._kept:
            if now.keys() - _INTERNAL != before.keys():
                for key in now.keys() - _INTERNAL - before.keys():
                    del now[key]
            now.update(before)
            for container, kept in contents:
                if _unlike(container, kept):
                    container.clear()
                    (container.extend if isinstance(container, list) else container.update)(kept)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _INTERNAL}


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(
        value is before[key]
        or (type(value) is type(before[key]) and isinstance(value, int | float | str) and value == before[key])
        for key, value in now.items()
    )


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(item, copy.copy(item)) for item in _attributes(module).values() if type(item) in (list, dict, set)]


def _unlike(container: Any, kept: Any) -> bool:
    if len(container) != len(kept):
        return True
    if isinstance(container, dict):
        return any(key not in kept or value is not kept[key] for key, value in container.items())
    if isinstance(container, set):
        return bool(container != kept)
    return any(one is not other for one, other in zip(container, kept, strict=True))


def is_pair(batch: object) -> bool:
    """Whether a batch is ``(input, target)``."""
    return isinstance(batch, list | tuple) and len(batch) == 2


def unwrap(model: Any) -> Any:
    """Return what is inside any nesting of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module) or callable(
            inner := getattr(model, "_torchdynamo_orig_callable", None)
        ):
            model = inner
        else:
            return model


def use_randomness(module: LossModule, run: Callable[[], object], stream: RandomStream) -> list[str]:
    """Put every module that draws random numbers in training mode into it, and only those; return their names.

    One pass in training mode shows them: a module draws by itself if the random stream moved inside of it and outside
    of its children. BatchNorm keeps its policy.
    """
    names = {part: name for name, part in module.named_modules() if not isinstance(part, _BatchNorm)}
    modes = {part: part.training for part in names}
    draws: set[nn.Module] = set()
    open_parts: list[nn.Module] = []
    last = [stream.state]

    def mark(*_: object) -> None:
        if open_parts and not same_state(last[0], stream.state):
            draws.add(open_parts[-1])
        last[0] = stream.state

    def enter(part: nn.Module, *_: object) -> None:
        mark()
        open_parts.append(part)

    def leave(*_: object) -> None:
        mark()
        open_parts.pop()

    handles = [part.register_forward_pre_hook(enter) for part in names]
    handles += [part.register_forward_hook(leave) for part in names]
    try:
        for part in names:
            part.training = True  # train() would reach the BatchNorm layers inside of it
        run()
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes.items():
            part.training = mode or part in draws
    return sorted(names[part] for part in draws)


def _hooks(module: nn.Module, kinds: Sequence[str] = _HOOKS) -> Iterator[dict[int, Any]]:
    return (vars(module)[kind] for kind in kinds if kind in vars(module))


def _computes_weights(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


# --------------------------------------------------------------------------------------- modules that FSDP2 has changed


def is_unit(module: nn.Module) -> bool:
    """Whether :func:`torch.distributed.fsdp.fully_shard` was applied to a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever applied it has imported it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, of a unit that which it had before."""
    classes: list[type[Any]] = list(type(module).__mro__)
    return next(cls for cls in classes if not issubclass(cls, classes[1])) if is_unit(module) else type(module)


def _blank(unit: nn.Module) -> nn.Module:
    """Return an empty module of the class that a unit had before."""
    own = own_class(unit)
    return own.__new__(own)


def _without_sharding(unit: nn.Module) -> dict[str, Any]:
    """Return the attributes of a unit but for FSDP's: its state, its hooks, and methods in which it gathers weights."""
    kept = {key: value for key, value in vars(unit).items() if not _of_fsdp(value)}
    for key, value in kept.items():
        if isinstance(value, dict) and any(_of_fsdp(item) for pair in value.items() for item in pair):
            kept[key] = type(value)((name, item) for name, item in value.items() if not _of_fsdp(name, item))
    return kept


def _of_fsdp(*items: Any) -> bool:
    """Whether one of some attributes was put there by FSDP2."""
    for item in items:
        made = getattr(item, "__globals__", {}).get("__name__", getattr(item, "__module__", None))
        own = str(made).startswith(("torch.distributed.fsdp.", "torch.distributed._composable."))
        if own and not isinstance(item, nn.Module):  # FSDP makes the class of a unit
            return True
    return False
