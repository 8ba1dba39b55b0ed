"""Tensors that claim to be on a GPU and are computed on the CPU, so that what waits for a GPU is counted without one.

A GPU works through a queue. Whoever wants a number from it, or brings it memory that is not pinned, waits until the
queue is empty; from then on the GPU waits for the host. One such wait in a step costs more than the step's launches.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
MEMORY = 64 * 2**30
ASKING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return (FakeDevice.current or FakeDevice()).run(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """Computes for ``OnDevice`` and keeps lists of (operation, place in the code): what waited, what was float64.

    Apple's, Intel's and DirectML's devices have no float64. ``brought`` is the types of what came from the host.
    """

    current = None

    def __init__(self, innermost=False):
        super().__init__()
        self.waits, self.doubles, self.brought, self._innermost = [], [], [], innermost

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """One operation: noted if it waits, computed on the CPU."""
        # Inference mode hands on whole compositions, such as to(); what they are made of is what counts.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        given, _ = tree_flatten((args, kwargs))
        here = {id(t.inner): t for t in given if isinstance(t, OnDevice)}
        asked = kwargs.get("device")
        onto = bool(here) if asked is None else torch.device(asked).type == DEVICE.type
        if self._waits(func, args, kwargs, bool(here), onto):
            self.waits.append((func.overloadpacket.__name__, _caller(self._innermost)))
        if onto and not here and given and isinstance(given[0], torch.Tensor):
            self.brought.append(given[0].dtype)
        if asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func.overloadpacket.__name__ == "_fused_sdp_choice":
            return 0
        into_host = func.overloadpacket.__name__ == "copy_" and not isinstance(args[0], OnDevice)
        # A view of an ordinary tensor is an ordinary one in inference mode too, so all wrappers are.
        with torch.inference_mode(False), torch.no_grad():
            made = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
            if onto and any(
                isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in tree_flatten(made)[0]
            ):
                self.doubles.append((func.overloadpacket.__name__, _caller(self._innermost)))
            return args[0] if into_host else tree_map(lambda value: _outer(value, here, onto), made)

    def _waits(self, func, args, kwargs, involved, onto):
        name = func.overloadpacket.__name__
        if name in ASKING:
            return involved
        if name in INDEXING and isinstance(args[0], OnDevice):
            rows = [row for row in args[1] if row is not None]
            return any(not isinstance(row, OnDevice) or row.dtype in (torch.bool, torch.uint8) for row in rows)
        if name == "_to_copy":
            return isinstance(args[0], OnDevice) != onto and not kwargs.get("non_blocking")
        if name == "copy_":
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and blocking
        return name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None


def on_device(value):
    """A tensor, or a network of them, as if it were on a GPU."""
    if isinstance(value, torch.Tensor):
        return OnDevice(value)
    for module in value.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(OnDevice(weight.data), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return value


@contextmanager
def fake_device(innermost=False):
    """A GPU that is not there: ``with fake_device() as gpu: ...; gpu.waits``.

    A place is the last of the engine's or the nodes' that was on the way; ``innermost``: the last of anybody's.
    """
    with ExitStack() as stack:
        for name, answer in (
            ("_lazy_init", lambda: None),
            ("mem_get_info", lambda device=None: (MEMORY, MEMORY)),
            ("memory_reserved", lambda device=None: 0),
            ("memory_allocated", lambda device=None: 0),
            ("empty_cache", lambda: None),
            ("synchronize", lambda device=None: None),
            ("current_device", lambda: 0),
            ("Event", Event),
        ):
            stack.enter_context(patch.object(torch.cuda, name, answer))
        torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing, where there is no CUDA device
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        device = FakeDevice.current = stack.enter_context(FakeDevice(innermost))
        stack.callback(setattr, FakeDevice, "current", None)
        yield device


class Event:
    """A mark in the queue; whoever waits for it waits for what came before it alone."""

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


def _inner(value):
    return value.inner if isinstance(value, OnDevice) else value


def _outer(value, here, onto):
    if not isinstance(value, torch.Tensor):
        return value
    known = here.get(id(value))
    return known if known is not None else OnDevice(value) if onto else value


def _caller(innermost):
    """Where in the engine, the nodes or a host something was asked for."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__ and "contextlib" not in frame.filename]
    own = [frame for frame in frames if "/ip2p_engine/" in frame.filename or "/nodes/" in frame.filename]
    frame = (frames if innermost else own or frames)[-1]
    return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}"
