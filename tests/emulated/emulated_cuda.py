"""A CUDA device that is not there: tensors say cuda:0 and hold real values on the CPU.

For tests of the CUDA path where there is no GPU. The device lies below autograd and autocast, so
that CUDA's own rules of bf16 apply, and any program runs as it is. What a GPU would refuse is
refused: an operation that mixes devices, NumPy's view of a CUDA tensor, and while a graph is
captured any wait, copy to or from the host, or mask as an index. A graph's replay repeats the
recorded operations and nothing of Python; its capture changes no tensor. A copy that does not wait
is not there before somebody has waited: its host memory holds NaN or the least integer until then,
and host memory that is written while it is still to be read is an error. tally.py counts events.

What it cannot see: kernels (existence, alignment, speed), cuDNN's and cuBLAS's choices, NCCL,
races between streams, memory, code of Inductor and Triton: torch.compile gives back its function,
so the launches are those of eager mode. Attention counts as one launch, by flash or, under a mask,
by cuDNN. A module's parameters are other objects after .to("cuda"), which here is true of no GPU.

The library must be loaded before torch is imported, so this module imports torch itself:
`PYTHONPATH=tests/emulated python …` (sitecustomize.py) does it for a process and its children.
EMULATED_CUDA_HOLDS=meta: tensors of the device hold no values, for counts of large models.
"""

import atexit
import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib.util
import itertools
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tally import add_work, note, place, works

HERE = Path(__file__).resolve().parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent
HOLDS = os.environ.get("EMULATED_CUDA_HOLDS", "cpu")


def build() -> Path:
    """-> the shared library, compiled once for each torch and source, in two seconds; needs g++."""
    source = HERE / "emulated_cuda.cpp"
    parts = source.read_bytes(), bytes(TORCH), (TORCH / "version.py").read_bytes()
    key = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"emulated_cuda_{os.getuid()}_{key}.so")
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.partial")
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}"]
        command += [source, "-o", partial, f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}"]
        subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
        partial.rename(library)
    return library


assert "torch" not in sys.modules, "torch looks for CUDA once, while it is imported"
ctypes.CDLL(str(TORCH / "lib/libtorch_global_deps.so"), ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(build()))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.attention.varlen  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812
from torch.optim import optimizer as optimizer_module  # noqa: E402
from torch.utils import _foreach_utils as foreach_utils  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

aten = torch.ops.aten


class EmulatedError(RuntimeError):
    """What a GPU would refuse, or get wrong in silence."""


def refuse(what: str) -> None:
    raise EmulatedError(f"{what}, in {' at '.join(place())}")


# -----------------------------------------------------------------------------
# Tensors


class Cuda(torch.Tensor):
    """A tensor of the device; `held` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> "Cuda":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=device,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Cuda({self.held!r}, device={str(self.device)!r})"

    def numpy(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        made = Cuda(self.held.detach().clone(), self.device)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        else:
            made.requires_grad_(self.requires_grad)
        memo[id(self)] = made
        if self.grad is not None:
            made.grad = copy.deepcopy(self.grad, memo)
        return made

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """As torch's own: this tensor lies where `value` does from here on."""
        if not isinstance(value, Cuda) or value.shape != self.shape or value.dtype != self.dtype:
            refuse(f"data of {value!r} for a {self!r}")
        self.held = value.held.view(self.shape)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()


def held(value: Any) -> Any:
    """An argument with the held tensors in it."""
    if isinstance(value, Cuda):
        return value.held
    if type(value) in (list, tuple):
        return type(value)(held(x) for x in value)
    return value


def tensors_in(values: Any, found: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Of arguments or a result, in order."""
    found = [] if found is None else found
    for value in values if type(values) in (list, tuple) else (values,):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            tensors_in(value, found)
    return found


# -----------------------------------------------------------------------------
# What kind an operation is

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# The host must learn something of the values; masks as indices do so, too.
WAITING = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "equal"}
WAITING |= {"unique_consecutive", "_unique", "_unique2", "unique_dim", "allclose", "bincount"}
READING = {"_local_scalar_dense", "is_nonzero", "item"}  # a copy and no more
# Neither a view nor work.
IDLE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
IDLE |= {"_unsafe_view", "_reshape_alias", "record_stream", "detach_", "set_", "alias"}
# Of their first tensor they read as much as they write.
GATHERING = {"embedding", "index", "gather", "index_select", "take", "_unsafe_index"}
# Into it they write as much as they are given.
SCATTERING = {"index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_add_"}
# What they write into they do not read; nor does an operation with out=.
FILLING = {"fill_", "zero_", "copy_", "normal_", "uniform_", "_foreach_zero_", "_foreach_copy_"}
# torch's multi_tensor_apply: lists of tensors -> tensors a launch; blocks, and elements of one.
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS = 320
BLOCK = 65536


class Traits:
    """Of an operation, from its schema."""

    def __init__(self, func: Any):
        schema = func._schema
        self.name = schema.name.rpartition("::")[2]
        self.collective = func.namespace == "c10d"
        self.idle = func.is_view or self.name in IDLE or self.name in READING
        self.indexing = self.name in INDEXING
        self.waits = self.name in WAITING or str(func) == "aten.repeat_interleave.Tensor"
        writes = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        self.written = [i for i, write in enumerate(writes) if write]
        self.names = [a.name for a in schema.arguments]
        self.listed = self.name.startswith(("_foreach_", "_fused_adam", "_fused_sgd"))
        self.flops = flop_registry.get(func.overloadpacket)

    def targets(self, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        """What the operation writes into."""
        found = [args[i] if i < len(args) else kwargs.get(self.names[i]) for i in self.written]
        return tensors_in(found)


traits_of = functools.cache(Traits)


def launches(lists: list[list[torch.Tensor]]) -> int:
    """Of an operation on lists of tensors, all of the same shapes. Where dtypes or strides differ,
    or memory has gaps, torch takes them one by one."""
    tensors = [each for each in lists if not each or isinstance(each[0], torch.Tensor)]
    tensors = [each for each in tensors if [*map(shape_of, each)] == [*map(shape_of, lists[0])]]
    one_type = len({tensor.dtype for tensor in itertools.chain(*tensors)}) == 1
    if not one_type or not all(map(alike, zip(*tensors, strict=True))):
        return len(lists[0])
    most = TENSORS_A_LAUNCH.get(len(lists), 30)
    blocks = sum(-(-tensor.numel() // BLOCK) for tensor in lists[0])
    return max(1, -(-len(lists[0]) // most), -(-blocks // BLOCKS))


def shape_of(tensor: torch.Tensor) -> torch.Size:
    return tensor.shape


def alike(tensors: tuple[torch.Tensor, ...]) -> bool:
    """One of each list: of the same strides, without gaps."""
    strides = {tensor.stride() for tensor in tensors}
    return len(strides) == 1 and torch.ops.aten.is_non_overlapping_and_dense(tensors[0])


def size_of(tensor: torch.Tensor) -> int:
    """Bytes in memory; what is expanded is there once."""
    shape = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n for n, stride in shape if stride or not n)


def traffic(traits: Traits, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes that an operation on held tensors reads and writes, each tensor once."""
    given = tensors_in((args, *kwargs.values()))
    targets = traits.targets(args, kwargs)
    written = sum(map(size_of, targets or tensors_in(out)))
    if traits.name in GATHERING:
        return 2 * written + sum(map(size_of, given[1:]))
    if traits.name in SCATTERING:
        return sum(map(size_of, given[1:])) + size_of(given[-1])
    read = sum(map(size_of, given))
    if traits.name in FILLING or "out" in kwargs:
        read -= written
    return written + read


# -----------------------------------------------------------------------------
# Copies that do not wait


class Transfers:
    """Those under way, in order: each is settled once somebody has waited for it."""

    def __init__(self) -> None:
        self.begun = 0
        self.pending: list[tuple[int, Callable]] = []

    def add(self, settle: Callable) -> None:
        self.begun += 1
        self.pending.append((self.begun, settle))

    def settle(self, last: float = math.inf) -> None:
        """All up to that number."""
        while self.pending and self.pending[0][0] <= last:
            self.pending.pop(0)[1]()

    def to_device(self, target: Cuda, source: torch.Tensor, quick: bool) -> None:
        quick = quick and source.is_pinned()
        note_copy("h2d", source, quick)
        put(target, source)
        if not quick:
            return self.settle()
        seen = source.clone()
        where = " at ".join(place())

        def check() -> None:
            if not torch.equal(seen, source):
                raise EmulatedError(f"host memory changed while it was copied, from {where}")

        self.add(check)

    def to_host(self, target: torch.Tensor, source: torch.Tensor, quick: bool) -> None:
        """source: held"""
        quick = quick and target.is_pinned()
        note_copy("d2h", target, quick)
        if not quick:
            self.settle()
            return put(target, source)
        values = source.clone()
        spoil(target)
        self.add(lambda: put(target, values))


def put(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        held(target).copy_(torch.zeros(source.shape) if source.is_meta else source)


def spoil(tensor: torch.Tensor) -> None:
    """What nobody takes for a result."""
    if tensor.is_floating_point():
        tensor.fill_(math.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).min)


def note_copy(way: str, tensor: torch.Tensor, quick: bool) -> None:
    if Graph.recording:
        refuse(f"{way} copy of {tuple(tensor.shape)} in a captured graph")
    note(f"{way} {'async' if quick else 'blocking'}", "copy")


def wait(what: str, last: float = math.inf) -> None:
    """The host stands until the device has done all, or the transfers up to that number."""
    if Graph.recording:
        refuse(f"{what} in a captured graph, which must not wait")
    note("wait", what)
    TRANSFERS.settle(last)


TRANSFERS = Transfers()

# -----------------------------------------------------------------------------
# Operations


def dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation of which a tensor is the device's."""
    traits = traits_of(func)
    if traits.name == "copy_":
        if not isinstance(args[1], Cuda):
            TRANSFERS.to_device(args[0], args[1], (*args, False)[2] or "non_blocking" in kwargs)
            return args[0]
        if not isinstance(args[0], Cuda):
            TRANSFERS.to_host(args[0], args[1].held, (*args, False)[2] or "non_blocking" in kwargs)
            return args[0]
    elif traits.name == "_to_copy" and torch.device(kwargs.get("device") or "cuda").type == "cpu":
        return copied_to_host(args[0], kwargs)
    given = tensors_in((args, *kwargs.values()))
    device = check_devices(traits, args, kwargs, given)
    if traits.waits:
        wait(traits.name)
        if HOLDS == "meta" and traits.name in READING:
            return 1.0
    held_args = held(args)
    held_kwargs = {name: held(value) for name, value in kwargs.items()}
    if "device" in held_kwargs:
        held_kwargs["device"] = HOLDS
    if Graph.recording and traits.written:
        Graph.recording.keep(traits.targets(held_args, held_kwargs))
    function = SPECIAL.get(func, func)
    out = function(*held_args, **held_kwargs)
    if not traits.idle:
        count(traits, held_args, held_kwargs, out)
        if Graph.recording:
            Graph.recording.record(function, held_args, held_kwargs, out)
    if traits.written:
        for tensor in traits.targets(args, kwargs):
            if tensor.shape != tensor.held.shape:
                refuse(f"{func} gives a tensor another shape")
    return wrapped(out, {id(x.held): x for x in given if isinstance(x, Cuda)}, device)


def wrapped(out: Any, known: dict[int, Cuda], device: torch.device) -> Any:
    """The result as the device's; a tensor that was given is the one that was given."""
    if isinstance(out, torch.Tensor):
        return known.get(id(out)) if id(out) in known else Cuda(out, device)
    if type(out) in (list, tuple):
        return type(out)(wrapped(x, known, device) for x in out)
    return out


def count(traits: Traits, args: tuple, kwargs: dict, out: Any) -> None:
    """A launch, or several, and its work, where somebody asks. args, kwargs and out: held"""
    kernels = 1
    if traits.listed:
        kernels = launches([x for x in args if type(x) is list and x] or [[]])
    work = None
    if works():
        flops = traits.flops(*args, **kwargs, out_val=out) if traits.flops else 0
        work = kernels, traffic(traits, args, kwargs, out), flops
    if Graph.recording:
        Graph.recording.work.append((traits.name, place()[0], work))
    else:
        note("collective" if traits.collective else "launch", traits.name, kernels)
        if work:
            add_work(traits.name, place()[0], *work)


def check_devices(traits: Traits, args: tuple, kwargs: dict, given: list) -> torch.device:
    """-> the device. Refused are two of them, and a generator of the host. Numbers may come from
    the host; indices, too, but these are copied."""
    device = None
    strange = False
    for tensor in given:
        if isinstance(tensor, Cuda):
            strange |= device not in (None, tensor.device)
            device = tensor.device
        else:
            strange |= tensor.dim() > 0 or traits.collective
    if traits.indexing:
        strange = check_index(traits, args)
    if strange:
        places = [f"{tensor.device} {tuple(tensor.shape)}" for tensor in given]
        refuse(f"{traits.name} on different devices: {', '.join(places)}")
    if traits.collective and Graph.recording:
        refuse(f"{traits.name} in a captured graph")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        refuse(f"{traits.name} on CUDA by a generator of the CPU")
    return device


def check_index(traits: Traits, args: tuple) -> bool:
    """Copies of indices from the host, and the wait for a mask. -> whether devices are mixed"""
    for index in args[1]:
        if isinstance(index, torch.Tensor) and not isinstance(index, Cuda):
            note_copy("h2d", index, False)
            TRANSFERS.settle()
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            if not is_fill(traits, args):
                wait(f"{traits.name} by a mask")
    values = [x for x in tensors_in(args[2:]) if x.dim() and not isinstance(x, Cuda)]
    return bool(values) or not isinstance(args[0], Cuda)


def is_fill(traits: Traits, args: tuple) -> bool:
    """x[mask] = number, which torch makes a masked_fill."""
    values = args[2] if "put" in traits.name else None
    return values is not None and values.numel() == 1 and not isinstance(values, Cuda)


def copied_to_host(source: Cuda, kwargs: dict) -> torch.Tensor:
    """.cpu(), .to("cpu"): into pinned memory where it need not wait, as torch does"""
    quick = bool(kwargs.get("non_blocking"))
    dtype = kwargs.get("dtype") or source.dtype
    empty = torch.empty_strided(source.shape, source.stride(), dtype=dtype, pin_memory=quick)
    TRANSFERS.to_host(empty, source.held, quick)
    return empty


# What a GPU has kernels of its own for, and a CPU none.


def flash_attention(
    q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, scale=scale
    )
    none = q.new_zeros(0)
    return out, logsumexp, none, none, q.shape[2], k.shape[2], none, none, none


def flash_attention_backward(grad, q, k, v, out, logsumexp, *more, scale=None):
    dropout_p, is_causal = more[4:6]  # behind sequence lengths, which only varlen has
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, logsumexp, dropout_p, is_causal, scale=scale)


def masked_attention(q, k, v, bias, *_, scale=None):
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=scale
    )
    none = q.new_zeros(0)
    return out, logsumexp, none, none, q.shape[2], k.shape[2], none, none, none


def masked_attention_backward(grad, q, k, v, out, logsumexp, *more, scale=None):
    bias = more[2]  # behind the seed and offset of dropout
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, logsumexp, 0.0, False, attn_mask=bias, scale=scale)


def lane_attention(q, k, v, edges_q, edges_k, max_q, max_k, *more):
    """torch.nn.attention.varlen's, of one query a sequence: rows of q (B, H, d), keys and values
    (B * max_k, G, d), of which each sequence has as many as `seqused_k` says."""
    enable_gqa, filled = more[3:5]
    keys, values = (x.unflatten(0, (-1, max_k)).transpose(1, 2) for x in (k, v))
    mask = torch.arange(max_k, device=filled.device) < filled.unsqueeze(1)
    how = dict(attn_mask=mask[:, None, None], enable_gqa=enable_gqa)
    out = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, **how).squeeze(2)
    none = q.new_zeros(0)
    return out, none, none


def rms_norm(x, shape, weight, eps):
    wide = x.float()
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).type_as(x), scale


def rms_norm_backward(grad, x, shape, scale, weight, mask):
    wide = x.float()
    grad_wide = grad.float()
    along = (grad_wide * wide).mean(-1, keepdim=True)
    return (scale * (grad_wide - wide * scale.square() * along)).type_as(x), None


SPECIAL = {
    aten._scaled_dot_product_flash_attention.default: flash_attention,
    aten._scaled_dot_product_flash_attention_backward.default: flash_attention_backward,
    aten._scaled_dot_product_cudnn_attention.default: masked_attention,
    aten._scaled_dot_product_cudnn_attention_backward.default: masked_attention_backward,
    torch.ops.torch_attn._varlen_attn.default: lane_attention,
    aten._fused_rms_norm.default: rms_norm,
    aten._fused_rms_norm_backward.default: rms_norm_backward,
}


def choose_attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """F.scaled_dot_product_attention: by a kernel, as on a GPU; each has its own backward."""
    if attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = q.new_zeros(()).masked_fill(~attn_mask, -math.inf)
    return aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, False, scale=scale)[0]


class FusedNorm(torch.autograd.Function):
    """F.rms_norm without a weight: on a GPU a kernel, and one for its gradient."""

    @staticmethod
    def forward(ctx, x, shape, eps):
        out, scale = dispatch(aten._fused_rms_norm.default, (x, shape, None, eps), {})
        ctx.save_for_backward(x, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        backward = aten._fused_rms_norm_backward.default
        args = grad, x, x.shape[-1:], scale, None, [True, False]
        return dispatch(backward, args, {})[0], None, None


def choose_norm(x, normalized_shape, weight=None, eps=None):
    if weight is not None or len(normalized_shape) != 1:
        refuse("rms_norm with a weight, or of more than one dimension")
    return FusedNorm.apply(x, normalized_shape, eps)


# -----------------------------------------------------------------------------
# New tensors


def device_of(name: Any) -> torch.device:
    index = torch.device(name).index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    made = torch.empty(size, dtype=dtype, device=HOLDS, memory_format=memory_format)
    return new(made, device, "empty")


def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return new(torch.empty_strided(size, stride, dtype=dtype, device=HOLDS), device, "empty")


def arange(*numbers, dtype=None, layout=None, device=None, pin_memory=None):
    overload = ("", "default", "start", "start_step")[len(numbers)]
    func = getattr(aten.arange, overload)
    known = dict(dtype=dtype, device=HOLDS)
    out = func(*numbers, **known)
    count(traits_of(func), numbers, known, out)
    if Graph.recording:
        Graph.recording.record(func, numbers, known, out)
    return Cuda(out, device_of(device))


def new(made: torch.Tensor, device: Any, what: str) -> Cuda:
    if Graph.recording:
        Graph.recording.own(made)
    return Cuda(made, device_of(device))


def copy_(target, source, non_blocking=False):
    """Where torch calls it past __torch_dispatch__"""
    return dispatch(aten.copy_.default, (target, source, non_blocking), {})


LIBRARY = torch.library.Library("aten", "IMPL")
KERNELS = {
    "CUDA": {
        "empty.memory_format": empty,
        "empty_strided": empty_strided,
        "arange": arange,
        "arange.start": arange,
        "arange.start_step": arange,
        "copy_": copy_,
    },
    "AutogradCUDA": {"scaled_dot_product_attention": choose_attention, "rms_norm": choose_norm},
}

# -----------------------------------------------------------------------------
# Graphs


class Graph:
    """torch.cuda.CUDAGraph: operations on held tensors, in order."""

    recording: "Graph | None" = None

    def __init__(self, *_: Any, **__: Any):
        self.operations: list[tuple] = []
        self.work: list[tuple] = []  # of a replay
        self.owned: dict[int, torch.Tensor] = {}  # made in the capture, by address
        self.kept: dict[
            int, tuple
        ] = {}  # what others own and the capture has written: storage, copy
        self.ready = False

    def own(self, tensor: torch.Tensor) -> None:
        self.owned[tensor.untyped_storage().data_ptr()] = tensor

    def keep(self, targets: list[torch.Tensor]) -> None:
        """Before it is written: on a GPU the capture runs nothing."""
        for tensor in targets:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in self.owned and address not in self.kept:
                self.kept[address] = storage, storage.clone()

    def record(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        given = {id(tensor) for tensor in tensors_in((args, *kwargs.values()))}
        fresh = [x for x in tensors_in(out) if id(x) not in given]
        for tensor in fresh:
            self.own(tensor)
        self.operations.append((func, args, kwargs, out, fresh))

    def restore(self) -> None:
        """What others own, as it was."""
        for storage, before in self.kept.values():
            storage.copy_(before)

    def finish(self) -> None:
        """As a GPU leaves it: its own tensors have no values yet."""
        for *_, fresh in self.operations:
            for tensor in fresh:
                if tensor.is_floating_point():
                    spoil(tensor)
        self.ready = True

    @torch.no_grad()
    def replay(self) -> None:
        if not self.ready:
            refuse("replay of a graph that was not captured")
        note("launch", "graph")
        if works():
            for name, function, work in self.work:
                add_work(name, function, *work)
        for func, args, kwargs, out, fresh in self.operations:
            again = func(*args, **kwargs)
            if fresh:
                for old, now in zip(tensors_in(out), tensors_in(again), strict=True):
                    if old is not now:
                        old.copy_(now)

    def reset(self) -> None:
        self.__init__()

    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextlib.contextmanager
def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph"""
    wait("capture begins")
    graph.__init__()
    Graph.recording = graph
    try:
        yield
    finally:
        Graph.recording = None
        graph.restore()
    graph.finish()


# -----------------------------------------------------------------------------
# torch.cuda


class Stream:
    """All work is in one order, whatever stream it is given to."""

    def __init__(self, *_: Any, **__: Any):
        self.cuda_stream = 0

    def synchronize(self) -> None:
        wait("Stream.synchronize")

    def query(self) -> bool:
        return not TRANSFERS.pending

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record()
        return event

    def wait_stream(self, _: "Stream") -> None:
        """The device waits, not the host."""

    wait_event = wait_stream

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Event:
    """torch.cuda.Event: stands behind the transfers that had begun when it was recorded."""

    def __init__(self, *_: Any, **__: Any):
        self.last = -1
        self.time = 0.0

    def record(self, _: Any = None) -> None:
        self.last = TRANSFERS.begun
        self.time = time.perf_counter()

    def query(self) -> bool:
        """Asked, it is done: nothing else would ever bring a loop on it to its end."""
        TRANSFERS.settle(self.last)
        return True

    def synchronize(self) -> None:
        wait("Event.synchronize", self.last)

    def wait(self, _: Any = None) -> None:
        """The device waits, not the host."""

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.time - self.time)


THREAD = threading.local()
STREAM = Stream()
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    total_memory=80 * 10**9,
    major=9,
    minor=0,
    multi_processor_count=132,
)
DEVICES = 8


def set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    THREAD.device = index or 0


STAND_INS = dict(
    _lazy_init=lambda: None,
    _lazy_call=lambda *_, **__: None,
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: DEVICES,
    current_device=lambda: getattr(THREAD, "device", 0),
    set_device=set_device,
    get_device_name=lambda *_: PROPERTIES.name,
    get_device_properties=lambda *_: PROPERTIES,
    get_device_capability=lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    is_bf16_supported=lambda *_, **__: True,
    synchronize=lambda *_: wait("synchronize"),
    current_stream=lambda *_: STREAM,
    default_stream=lambda *_: STREAM,
    stream=lambda stream: stream or STREAM,
    Stream=Stream,
    Event=Event,
    CUDAGraph=Graph,
    graph=capture,
    graph_pool_handle=lambda: (0, 0),
    is_current_stream_capturing=lambda: Graph.recording is not None,
    mem_get_info=lambda *_: (PROPERTIES.total_memory, PROPERTIES.total_memory),
    memory_allocated=lambda *_: 0,
    memory_reserved=lambda *_: 0,
    max_memory_allocated=lambda *_: 0,
    max_memory_reserved=lambda *_: 0,
    reset_peak_memory_stats=lambda *_: None,
    empty_cache=lambda: None,
    manual_seed=lambda _: None,
    manual_seed_all=lambda _: None,
    set_sync_debug_mode=lambda _: None,
)


def plain_compile(function: Callable | None = None, **_: Any) -> Callable:
    """torch.compile that compiles nothing"""
    return function if function else lambda later: later


def with_gloo(function: Callable) -> Callable:
    """A process group that was asked for NCCL, too, has gloo for all."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if isinstance(x, str) and "nccl" in x else x for x in args)
        if "nccl" in str(kwargs.get("backend", "")):
            kwargs["backend"] = "gloo"
        return function(*args, **kwargs)

    return called


def install() -> None:
    """Put the device into torch, for the rest of the process."""
    for key, kernels in KERNELS.items():
        for name, function in kernels.items():
            LIBRARY.impl(name, function, key, allow_override=True)
    for name, value in STAND_INS.items():
        setattr(torch.cuda, name, value)
    torch.compile = plain_compile
    dist.init_process_group = with_gloo(dist.init_process_group)
    dist.new_group = with_gloo(dist.new_group)
    for module in (foreach_utils, optimizer_module):
        module._foreach_supported_types.append(Cuda)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # Autograd's thread of a device lets go of its last tensors, which here are Python's, a moment
    # after backward() has returned: at the interpreter's end it would find none.
    atexit.register(time.sleep, 0.1)
