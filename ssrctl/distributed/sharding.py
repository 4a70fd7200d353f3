"""A model whose parameters are sharded over the processes of a job, by FSDP2 (torch's ``fully_shard``).

Each process keeps some rows of every parameter, rows of a lower rank before those of a higher. A layer's whole weights
exist only while it computes; its gradients are summed over the processes and cut into the same rows. Updaters see plain
parameters, the rows, which share memory with the model. Files hold whole tensors, gathered one at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ssrctl.core.bits import bits_from_indices, bits_to_indices
from ssrctl.core.mask import BlockMask
from ssrctl.distributed.dealing import deal
from ssrctl.distributed.world import World
from ssrctl.errors import LostProcess, UserError

BITS = "bits"  # in the state of KronosOpt: the touched coordinates, to which its other tensors belong in order
Indexed = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rows:
    """The rows of a parameter that a process keeps.

    Attributes:
        local: the rows, in the memory of the model's shard; a parameter with a gradient of its own.
        shape: of the whole parameter.
        start: flat index, in the whole parameter, of the first coordinate here.
    """

    local: torch.nn.Parameter
    shape: tuple[int, ...]
    start: int

    def own(self, indices: Tensor) -> slice:
        """Return the places of those of the whole parameter's ascending flat indices that lie in these rows."""
        edges = torch.tensor([self.start, self.start + self.local.numel()], device=indices.device)
        first, last = torch.searchsorted(indices, edges).tolist()
        return slice(first, last)


@dataclass(frozen=True)
class ResponseShare:
    """The responses of a question that a process runs.

    Attributes:
        sharded: the model.
        rows: int64, ascending numbers of responses, at least one.
        counts: False where they are another process's, and are run because all processes run the model together.
        num_responses: of the question.
    """

    sharded: ShardedModel
    rows: Tensor
    counts: bool
    num_responses: int

    def whole(self, values: Tensor, width: int) -> Tensor:
        """Return all responses' values ``[num_responses, width]``, from each process's ``[len(rows), w]``; 0 beyond w."""
        found = values.new_zeros(self.num_responses, width)
        if self.counts:
            found[self.rows, : values.shape[1]] = values.detach()
        return self.sharded.world.add_up(found)


class ShardedModel:
    """A causal LM wrapped by ``fully_shard``, layer by layer.

    Args:
        model: whole, on the CPU or on the device of ``world``; it keeps its rows only.
        layers: its modules whose weights are gathered together; the rest is one group more.
        world: the processes, at least two.

    Attributes:
        model: as given, wrapped.
        world: as given.
        group: the processes, for sums of counts.
        rows: by parameter name, in the model's order, a tied one once.

    Raises:
        UserError: a model that cannot be sharded this way.
    """

    def __init__(self, model: Any, layers: Sequence[torch.nn.Module], world: World) -> None:
        self.model, self.world = model, world
        _check_layers(model, layers)
        mesh = init_device_mesh(world.device.type, (world.size,))
        self.group = mesh.get_group()
        try:
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"{type(model).__name__} cannot be sharded: {' '.join(str(error).split())}", "leave out --sharding"
            ) from error
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gradients are sums over responses, not means over processes
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # experts that only some processes' tokens reach
        model.set_reduce_scatter_unused_params(True)
        self.rows: dict[str, Rows] = {}
        self._weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self._holds_whole = False
        model.register_forward_pre_hook(lambda *_: self._count_moves(0 if self._holds_whole else 1))

    def begin(self) -> None:
        """Run the model once, which lets FSDP lay out its shards, and find this process's rows; all processes call it."""
        self._dummy_pass()
        self.model.reshard()
        self._shards = dict(self.model.named_parameters())
        lengths = self.world.gather({name: len(shard.to_local()) for name, shard in self._shards.items()})
        for name, shard in self._shards.items():
            local = torch.nn.Parameter(shard.to_local().detach(), requires_grad=shard.requires_grad)
            above = sum(theirs[name] for theirs in lengths[: self.world.rank])
            self.rows[name] = Rows(local, tuple(shard.shape), above * math.prod(shard.shape[1:]))

    def local_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name, rows) of every parameter."""
        return ((name, rows.local) for name, rows in self.rows.items())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the rows of this process, by name."""
        return {name: tuple(local.shape) for name, local in self.local_parameters()}

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(name, rows) of every trainable parameter, for an optimizer."""
        return [(name, rows.local) for name, rows in self.rows.items() if rows.local.requires_grad]

    # forward and backward passes

    def share(self, lengths: Sequence[float]) -> ResponseShare:
        """Deal a question's responses, of these lengths, to the processes."""
        mine = deal(lengths, self.world.size)[self.world.rank]
        rows = torch.tensor(mine or [0], device=self.world.device)
        return ResponseShare(self, rows, bool(mine), len(lengths))

    def backward(self, outputs: Tensor, gradient: Tensor, *, retain: bool = False) -> None:
        """Backpropagate; all processes call it, and ``take_gradients`` has the sum over them."""
        self._count_moves(2)
        self.model.unshard()  # the root's weights, which the output projection needs; layers gather their own
        outputs.backward(gradient, retain_graph=retain)

    def take_gradients(self) -> None:
        """Move the gradients of the passes since the last call to the rows."""
        for name, parameter in self._shards.items():
            if parameter.grad is not None:
                self.rows[name].local.grad, parameter.grad = parameter.grad.to_local(), None

    def drop_gradients(self) -> None:
        """Drop what failed passes left."""
        for parameter in self._shards.values():
            parameter.grad = None
        self.settle()

    def settle(self) -> None:
        """Free the whole weights that a pass has left, so that the next one gathers them again; before weights change."""
        self.model.reshard()

    @contextlib.contextmanager
    def each_as_often(self, *, whole: bool) -> Iterator[None]:
        """Let the processes run the model without gradients as often as each needs; all enter.

        Args:
            whole: hold the whole weights meanwhile. Otherwise each pass gathers them layer by layer, which takes all
                processes: one that is done runs the model on one token for as long as another runs it.
        """
        with self._whole() if whole else self._in_step():
            yield
        self.settle()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        self._count_moves(1)
        self._holds_whole = True
        try:
            yield
        finally:
            self._holds_whole = False
            for part in parts:
                part.set_reshard_after_forward(part is not self.model, recurse=False)
                part.reshard()

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        def say_so(*_: Any) -> None:
            self.world.any(True)

        hook = self.model.register_forward_pre_hook(say_so, prepend=True)
        try:
            yield
        finally:  # after an error too, which ends the others' passes otherwise
            hook.remove()
            while self.world.any(False):
                self._dummy_pass()

    def _count_moves(self, times: int) -> None:
        """Add to the traffic: the weights gathered, or a gradient of their size scattered, that often."""
        moved = times * self._weight_bytes * (self.world.size - 1) // self.world.size
        self.world.bytes_sent += moved
        self.world.bytes_received += moved

    def _dummy_pass(self) -> None:
        with torch.no_grad():
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.world.device), use_cache=False)

    # whole tensors and rows

    def mask_rows(self, mask: BlockMask | None) -> BlockMask | None:
        """Return the part of a mask that lies in the rows of this process, over tensors of their shapes."""
        if mask is None:
            return None
        indices = {}
        for name, rows in self.rows.items():
            whole = mask.tensors[name].to_indices()
            indices[name] = whole[rows.own(whole)] - rows.start
        return BlockMask.from_indices(self.shapes(), indices)

    def whole_weights(self) -> dict[str, Tensor]:
        """Join the processes' rows on the main one, on the CPU, tensor by tensor; empty on the others."""
        found = {}
        for name, local in self.local_parameters():
            parts = self.world.gather_on_main(local.detach().cpu().clone())
            if parts:
                found[name] = torch.cat(parts)
        return found

    def whole_indices(self, indices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join the processes' flat indices on the main one, tensor by tensor; empty on the others."""
        return {name: whole for name, (whole, _) in self._joined_changes({n: (i, i) for n, i in indices.items()})}

    def whole_changes(self, changes: Indexed) -> dict[str, tuple[Tensor, Tensor]]:
        """Join the processes' (ascending flat indices, values) on the main one, tensor by tensor; empty on the others."""
        return dict(self._joined_changes(changes))

    def _joined_changes(self, changes: Indexed) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        for name, rows in self.rows.items():
            mine = None
            if name in changes:
                indices, values = changes[name]
                mine = (indices.cpu() + rows.start, values.cpu())
            parts = [part for part in self.world.gather_on_main(mine) if part is not None]
            if parts:
                indices, values = (torch.cat(column) for column in zip(*parts, strict=True))
                yield name, (indices, values)

    def whole_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join the processes' optimizer state on the main one, parameter by parameter; empty on the others.

        Args:
            tensors: ``NAME.key``: ``bits`` of the touched coordinates and values for each of these, or values for every
                row; a scalar is the same in all processes.

        Returns:
            The state that one process would have.
        """
        by_name = _by_parameter(tensors)
        found: dict[str, Tensor] = {}
        for name, rows in self.rows.items():
            mine = dict(by_name.get(name, {}))
            if BITS in mine:
                mine[BITS] = bits_to_indices(mine[BITS], rows.local.numel()) + rows.start
            parts = [p for p in self.world.gather_on_main({key: value.cpu() for key, value in mine.items()}) if p]
            for key in parts[0] if parts else ():
                first = parts[0][key]
                whole = first if first.dim() == 0 else torch.cat([part[key] for part in parts])
                found[f"{name}.{key}"] = bits_from_indices(whole, math.prod(rows.shape)) if key == BITS else whole
        return found

    def state_of_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part of an optimizer's whole state that belongs to the rows of this process.

        Raises:
            UserError: the state is of other parameters.
        """
        found: dict[str, Tensor] = {}
        for name, state in _by_parameter(tensors).items():
            rows = self.rows.get(name)
            if rows is None:
                raise UserError(
                    f"the optimizer's state is for another model: it holds {name}", "use another checkpoint"
                )
            width = math.prod(rows.shape[1:])
            mine = slice(rows.start // width, rows.start // width + len(rows.local))
            if BITS in state:
                indices = bits_to_indices(state[BITS], math.prod(rows.shape))
                mine = rows.own(indices)
                if mine.start == mine.stop:
                    continue
                found[f"{name}.{BITS}"] = bits_from_indices(indices[mine] - rows.start, rows.local.numel())
            for key, value in state.items():
                if key != BITS:
                    found[f"{name}.{key}"] = value if value.dim() == 0 else value[mine]
        return found


def _check_layers(model: Any, layers: Sequence[torch.nn.Module]) -> None:
    """Refuse a model without layers to gather one by one, or whose layers share parameters, which FSDP2 cannot divide."""
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers that can be sharded", "leave out --sharding")
    owners: dict[int, int] = {}
    inside = {id(module) for layer in layers for module in layer.modules()}
    rest: Iterable[torch.nn.Module] = (module for module in model.modules() if id(module) not in inside)
    for number, modules in enumerate([*(layer.modules() for layer in layers), rest]):
        for parameter in (p for module in modules for p in module.parameters(recurse=False)):
            if owners.setdefault(id(parameter), number) != number:
                raise UserError(
                    f"{type(model).__name__} uses the same parameter in several layers, which cannot be sharded",
                    "leave out --sharding",
                )


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort tensors named ``NAME.key`` by NAME."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        found.setdefault(name, {})[key] = value
    return found


@contextlib.contextmanager
def noticing_lost_processes(world: World) -> Iterator[None]:
    """Turn the failure of one of FSDP's exchanges into ``LostProcess``."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostProcess(
                f"process {world.rank} of {world.size} lost the others: one of them has ended",
                "see the first error above; a process that was killed leaves none (out of memory?)",
            ) from error
        raise
