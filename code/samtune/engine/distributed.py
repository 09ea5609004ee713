"""Many processes as one: the only file that knows `torch.distributed`.

`torchrun` says through the environment how many processes there are; without it there is one, and
every function here then does the obvious thing without a process group. Tensors on a GPU travel by
NCCL; Python objects, flags and tensors on the CPU travel by gloo.

Every function called *collective* must be reached by all ranks, in the same order.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import time
import uuid
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from samtune.activity import now
from samtune.errors import Lost, UserError

_REPEATED_SECONDS = 1.0  # two signals closer than this are one Ctrl-C, told twice by torchrun
_BOARD_PATIENCE = timedelta(seconds=60)
_board: dist.Store | None = None


@dataclass(frozen=True)
class Process:
    """Who this process is among the others. local_rank counts within one machine."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one that speaks and writes files."""
        return self.rank == 0


def start(timeout_minutes: float = 60) -> Process:
    """Join the processes that torchrun started, or be the only one.

    timeout_minutes: after which `watchdog` ends a run in which nothing moves. A collective waits
    for twice as long: rank 0 may be at work that it announces, one piece of it after another.
    Raises UserError if a machine runs more processes than it has GPUs; Lost if not all come.
    """
    if timeout_minutes <= 0:
        raise UserError(f"--timeout {timeout_minutes}: must be at least 1 minute")
    rank, world, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', world)} processes were started for "
                f"{torch.cuda.device_count()} GPU(s); lower NGPU (torchrun's --nproc_per_node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        _meet(backend, world, timedelta(minutes=2 * timeout_minutes + 1))
    return Process(rank, world, local_rank, device)


def _meet(backend: str, world: int, timeout: timedelta) -> None:
    global _board
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        name = _name_of_this_start(store, rank, world, timeout.total_seconds())
        dist.init_process_group(
            backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world,
            timeout=timeout,
        )  # fmt: skip
        connection = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            wait_for_workers=False, timeout=_BOARD_PATIENCE,
        )  # fmt: skip
        _board = dist.PrefixStore(f"{name} board", connection)
    except RuntimeError as error:
        if not is_broken(error):
            raise
        raise Lost(
            f"the {world} processes of this run did not all meet; is every machine started, with "
            f"the same MASTER_ADDR and MASTER_PORT? ({str(error).splitlines()[0]})"
        ) from None


def _name_of_this_start(store: dist.Store, rank: int, world: int, seconds: float) -> str:
    """Collective. A name that is new and the same on all ranks.

    torchrun starts processes again over the same store, in which those before them left their
    addresses: who is early would connect to a dead process and wait for it. Nor does its count of
    restarts tell starts apart: machines count differently. So each rank asks in a name that it has
    made up, and rank 0 answers each with its own.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    if rank > 0:
        store.set(f"asks {rank}", mine)
        name = store.get(f"answer to {mine}").decode()  # waits
        store.add(f"{name} heard", 1)
        return name
    while store.add(f"{mine} heard", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"asks {other}"]):
                store.set(f"answer to {store.get(f'asks {other}').decode()}", mine)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"waited for {seconds:g} s")
        time.sleep(0.01)
    return mine


def board() -> dist.Store | None:
    """Where ranks leave notes for each other, by a connection that any thread may use; None where
    there is one process. What is asked of it raises RuntimeError where the others are gone."""
    return _board


def is_broken(error: BaseException) -> bool:
    """Whether this is what a rank sees of another one's end, or of a wait that took too long."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def shutdown() -> None:
    """Leave the process group. Not collective: a failing rank may call it alone."""
    global _board
    _board = None
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """True on exactly one rank: the first that asks. It prints its error; the others keep quiet.

    When a rank fails, the others see only broken connections, whose tracebacks would bury the
    cause. Call this before `shutdown`. Not collective.
    """
    if _board is None:
        return True
    try:
        return _board.add("failed", 1) == 1
    except RuntimeError:  # it went down with the launcher, or with a rank that has spoken
        return dist.get_rank() == 0


def seed_everything(seed: int, rank: int = 0, deterministic: bool = False) -> None:
    """Give this rank its own random numbers; choose between bitwise repeatable and fast kernels.

    Ranks get different seeds, so that no two of them draw the same noise. cuDNN either tries which
    algorithm is fastest or is deterministic, never both: trying them makes the choice random.
    """
    torch.manual_seed(seed + rank)  # every CUDA device too
    np.random.seed((seed + rank) % 2**32)
    random.seed(seed + rank)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


@now.waiting()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Collective. The sum over all ranks, on every rank; `tensor` itself stays as it is."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


@now.waiting()
def gather_objects(value: Any) -> list | None:
    """Collective. Every rank's picklable `value` in the order of ranks on rank 0, else None."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


@now.waiting()
def all_gather_objects(value: Any) -> list:
    """Collective. Every rank's picklable `value` in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@now.waiting()
def broadcast_object(value: Any) -> Any:
    """Collective. Rank 0's `value`, on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


@now.waiting()
def barrier() -> None:
    """Collective. Wait until every rank is here; says nothing about work queued on a GPU."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU: NCCL's own barrier would occupy a GPU


def agree(error: UserError | None) -> None:
    """Collective. If any rank brings an error, every rank raises all of them as one UserError."""
    messages = all_gather_objects(None if error is None else str(error))
    if said := [message for message in messages if message is not None]:
        raise UserError("\n".join(dict.fromkeys(said))) from error


@contextmanager
def together() -> Iterator[None]:
    """Collective. A UserError that any rank raises inside is raised on every rank at the end."""
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    agree(error)


def once_per_machine(process: Process, prepare: Callable[[], object]) -> None:
    """Collective. Let rank 0 make files, then one rank of each machine: it finds them in a folder
    that machines share, or makes its own. A UserError is raised on all ranks."""
    for mine in (process.is_main, process.local_rank == 0):
        with together():
            if mine:
                prepare()


def wrap(model: nn.Module, process: Process, shard_by: Sequence[nn.Module] = ()) -> nn.Module:
    """Collective. The model on its device, in DDP or sharded; as it is where there is one process.

    The one legal order: built, loaded and frozen on the CPU -> this function (device, synchronised
    BatchNorm, DDP or shards) -> optimizer. Training must call what is returned: gradients are
    averaged only if its own forward ran.

    shard_by: parts of the model that are whole in turn, the rest being one part more; none: DDP.
    Raises UserError if this torch cannot shard.
    """
    model = model.to(process.device)
    if process.world == 1:
        return model
    synchronise_batch_norm(model, process.device)
    if shard_by:
        return _shard(model, shard_by, process)
    # static_graph=True would bring nothing here: it spares the search for unused parameters, which
    # is off, and buckets are rebuilt in the order of the gradients without it too. It would forbid
    # what differs from step to step (mixed prompts, the number of micro-batches in the last one).
    wrapped = DistributedDataParallel(
        model,
        device_ids=[process.device] if process.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=False,  # what no loss reads is frozen
    )
    # Buffers were made equal just now and stay so: frozen, or of a synchronised BatchNorm. Set here
    # because the argument's name depends on torch's version, and may skip that first time too.
    wrapped.broadcast_buffers = False
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP: for saving and evaluation, never for training.

    A sharded model is sharded in place, so it is its own inside.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_sync(model: nn.Module, active: bool) -> AbstractContextManager:
    """Forward and backward passes inside leave the gradients unaveraged if `active`."""
    if active and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if active and is_sharded(model):
        return _whole_gradients(model)
    return nullcontext()


# FSDP2. Its classes are told by what they can do: to import them takes seconds, which a run
# without shards need not spend.


def _shard(model: nn.Module, units: Sequence[nn.Module], process: Process) -> nn.Module:
    """The model, changed in place: each rank keeps its part of each parameter, and of all that
    belongs to it (gradient, optimizer state). A unit is whole only while it computes.

    Parameters stay float32 and precision is autocast's affair, as in DDP: FSDP's own policy hands
    bf16 parameters to every part, also to those that must compute in float32 (prompts, norms).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if process.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(f"--shard without a GPU needs torch 2.7 or newer, not {torch.__version__}")
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:  # as DDP does: all start from rank 0's
        dist.broadcast(tensor.detach(), 0)
    plain = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    # A true warning that concerns nobody here: what a part returns is not changed in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(process.device.type, (process.world,))
    for module in (*units, model):
        fully_shard(module, mesh=mesh)
    _empty(plain)
    model.plain = lambda: plain  # as a plain attribute it would be a part of the model
    return model


def _empty(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def is_sharded(module: nn.Module) -> bool:
    """Whether `wrap` sharded the model."""
    return hasattr(module, "set_requires_gradient_sync")


@contextmanager
def _whole_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, each rank adds up gradients of its own, unsharded: memory for speed, as in DDP."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def evaluated(model: nn.Module) -> nn.Module:
    """The module that evaluation calls, inside `gathered`: one without DDP and without shards."""
    return model.plain() if is_sharded(model) else unwrap(model)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Collective. Inside, every rank's `evaluated(model)` has all parameters of a sharded model.

    It computes without the others, so that a rank may have a batch more than another. Where nothing
    is sharded, nothing happens.
    """
    if not is_sharded(model):
        yield
        return
    plain = model.plain()
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        mine.data = whole(theirs.detach())
    for mine, theirs in zip(plain.modules(), model.modules(), strict=True):
        mine._buffers = theirs._buffers
    try:
        yield
    finally:
        _empty(plain)


@contextmanager
def alone(model: nn.Module) -> Iterator[nn.Module]:
    """Collective. Inside, a rank may train with what it is given without the other ranks: the
    `evaluated(model)`, whose synchronised BatchNorms see the batch of this process only.
    """
    with gathered(model):
        inner, replaced = evaluated(model), []
        for parent in list(inner.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (SyncedBatchNorm, nn.SyncBatchNorm)):
                    setattr(parent, name, _LoneBatchNorm.replacing(child))
                    replaced.append((parent, name, child))
        try:
            yield inner
        finally:
            for parent, name, child in replaced:
                setattr(parent, name, child)


def whole(tensor: Tensor) -> Tensor:
    """Collective for a sharded tensor: all of it, on every rank. Others stay as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_tensors(tensors: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor] | None:
    """Copies on the CPU, whole, on rank 0; None on the others. Collective if any is sharded."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    copies = {}
    for name, tensor in tensors.items():  # one at a time: no rank's device holds them all
        tensor = whole(tensor.detach())
        if is_main:
            copies[name] = tensor.to("cpu", copy=True).contiguous()
    return copies if is_main else None


def shard_like(tensor: Tensor, ours: Tensor) -> Tensor:
    """This rank's part of a whole `tensor`, as `ours` of the same shape is sharded; else all."""
    if not hasattr(ours, "full_tensor") or tensor.shape != ours.shape:
        return tensor
    from torch.distributed.tensor import DTensor

    mesh, rank = ours.device_mesh, ours.device_mesh.get_local_rank()
    parts = tensor.chunk(mesh.size())  # as FSDP deals rows; the last ranks may get none
    part = parts[rank] if rank < len(parts) else tensor[:0]
    return DTensor.from_local(
        part.to(ours.device), mesh, ours.placements, run_check=False, shape=tensor.shape,
        stride=tensor.stride(),
    )  # fmt: skip


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace each *trainable* BatchNorm in place by one that sees the batch of all ranks.

    Parameters and buffers stay the same objects, so do their names. A frozen one runs in eval mode
    and needs no company. On a GPU torch's own layer is used; it refuses the CPU.
    """
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if device.type != "cuda":
        convert = SyncedBatchNorm.replacing
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_trainable_batch_norm(child):
                setattr(parent, name, convert(child))


def is_trainable_batch_norm(layer: nn.Module) -> bool:
    """Whether what the layer computes for an image depends on the others of its batch."""
    trains = any(p.requires_grad for p in layer.parameters(recurse=False))
    return isinstance(layer, _BatchNorm) and trains


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm over the joined batch of all ranks, in plain torch, for the CPU."""

    @classmethod
    def replacing(cls, layer: _BatchNorm) -> SyncedBatchNorm:
        new = cls(layer.num_features, layer.eps, layer.momentum, layer.affine)
        new.track_running_stats, new.training = layer.track_running_stats, layer.training
        new._parameters, new._buffers = layer._parameters, layer._buffers
        return new

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...)."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        given, x = x.dtype, x.to(self.weight.dtype)  # statistics of bf16 need float32
        others = [axis for axis in range(x.dim()) if axis != 1]
        count = all_reduce_sum(torch.tensor(x.numel() / x.shape[1]))
        mean = _SumOverRanks.apply(x.sum(others)) / count  # (C,)
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = x - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(others)) / count  # (C,)
        self._update_statistics(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(given)

    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # a plain average over all batches so far
            share = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _LoneBatchNorm(SyncedBatchNorm):
    """BatchNorm over the batch of this process, with the parameters of a synchronised one."""

    forward = _BatchNorm.forward


class _SumOverRanks(torch.autograd.Function):
    """y = sum over ranks of x; each rank's x moves every rank's y, so gradients are summed too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


class StopSignal(AbstractContextManager):
    """A polite end: SIGTERM, SIGINT or SIGUSR1 on any rank stops all ranks after the same step.

    While entered, a signal only raises a flag. `agreed`, called by every rank between two steps,
    starts a reduction of the flags over gloo and reads the one it started a step earlier, which has
    long arrived: no rank waits for another, and no GPU is asked. A second SIGINT aborts at once.
    The same reduction carries what any rank finds `due`, such as a save.
    """

    def __init__(self):
        self.due = False  # what the last call of `agreed` found, the same on all ranks
        self._requested = False
        self._first_interrupt = 0.0
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is not None and is_broken(error):
            # torchrun ends all ranks when one is gone; who saw it go is to say so first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _receive(self, number: int, frame) -> None:
        self._requested = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_interrupt and now - self._first_interrupt > _REPEATED_SECONDS:
            raise KeyboardInterrupt
        self._first_interrupt = self._first_interrupt or now

    @property
    def requested(self) -> bool:
        """Has this rank been signalled?"""
        return self._requested

    def agreed(self, due: bool = False) -> bool:
        """Collective, between two steps. Had any rank been signalled by the last such call? And had
        any brought something due: `self.due` says so, once."""
        if not dist.is_initialized():
            self.due = due
            return self._requested
        stops, self.due = self._collect()
        if stops:
            return True
        flags = torch.tensor([float(self._requested), float(due and not self.due)])
        self._pending = dist.all_reduce(flags, async_op=True), flags
        return False

    def settle(self) -> bool:
        """Collective. Has any rank been signalled by now? Waits for all; leaves nothing pending."""
        earlier, _ = self._collect()
        now = all_reduce_sum(torch.tensor([float(self._requested)]))
        return earlier or bool(now.item())

    def _collect(self) -> tuple[bool, bool]:
        """The outcome of the reduction under way, if any: is there a signal, is anything due?"""
        if self._pending is None:
            return False, False
        work, flags = self._pending
        self._pending = None
        with now.waiting():
            work.wait()
        return bool(flags[0]), bool(flags[1])
