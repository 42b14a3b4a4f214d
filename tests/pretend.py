"""A pretended GPU, for machines without one: what runs on "cuda" here meets a GPU's rules.

    python tests/pretend.py sft.py --steps 3 …    # a script on "cuda"; prints where a step waits

A tensor on "cuda" is a shell around a CPU tensor, which holds the numbers; autograd and autocast
take it for CUDA's. What a GPU refuses raises here too: tensors of two devices in one operation,
single numbers and indices excepted. Gpu.waits counts where the host would wait for the device:

    read      a number of the device's is asked for: item(), bool()
    shape     the size of a result depends on the device's numbers: nonzero(), x[mask]
    download  tolist(), cpu()
    upload    a copy to the device from memory that is not pinned, or a blocking one

Nothing is learned here about kernels, memory, torch.compile and several GPUs.
Import it before torch: a CPU build looks for a GPU once, while it is loaded.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import linecache
import os
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

assert "torch" not in sys.modules, "import pretend before torch"
ROOT = Path(__file__).parent.parent

# The engine of autograd asks for streams and devices of a kind that a CPU build does not have.
DRIVER = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

const c10::Device gpu(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return gpu.type(); }
  c10::Device getDevice() const override { return gpu; }
  c10::Device exchangeDevice(c10::Device) const override { return gpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, gpu);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
};
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard);

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
"""


def load_driver():
    """Loads the driver, which is compiled once for each torch; that takes a few seconds."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    name = f"{importlib.metadata.version('torch')}{torch_folder}{DRIVER}"
    name = f"driver-{hashlib.sha256(name.encode()).hexdigest()[:16]}.so"
    built, library = Path(__file__).with_name("__pycache__") / name, torch_folder / "lib"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        flags = ["-std=c++20", "-w", "-shared", "-fPIC", "-xc++", "-"]
        flags += [f"-I{torch_folder / 'include'}", f"-L{library}", f"-Wl,-rpath,{library}"]
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            new = f"{folder}/{name}"
            command = ["g++", *flags, "-ltorch_cpu", "-lc10", "-o", new]
            subprocess.run(command, input=DRIVER, text=True, check=True)
            os.replace(new, built)
    ctypes.CDLL(built, ctypes.RTLD_GLOBAL)


load_driver()

import torch  # noqa: E402
import torch.utils._foreach_utils as foreach  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

aten, CPU = torch.ops.aten, torch.device("cpu")
READS = {aten._local_scalar_dense.default, aten.equal.default}
SHAPES = {aten.nonzero.default, aten.masked_select.default, aten.masked_scatter_backward.default}
SHAPES.add(aten.repeat_interleave.Tensor)
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING.add(aten._index_put_impl_.default)
COPIES = {aten._to_copy.default, aten.copy_.default}
# beside those with the tag pointwise, these take a number that lies on the CPU
TAKE_NUMBERS = {aten.where.self, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
TAKE_NUMBERS |= {aten.fill_.Tensor, aten._foreach_mul_.Tensor} | INDEXING


class Shell(torch.Tensor):
    """A tensor on the pretended GPU; its numbers are those of the tensor that it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset())
        layout |= dict(dtype=held.dtype, device="cuda:0")
        shell = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout)
        shell.held = held
        return shell

    @classmethod
    def __torch_dispatch__(cls, op, *_):
        raise RuntimeError(f"{op}: the pretended GPU is no longer active")

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        marks = {name: mark for name, mark in vars(self).items() if name != "held"}
        vars(copy).update(marks)  # that it is a parameter
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol):  # as torch.load(map_location="cpu") would give it back
        return self.held.__reduce_ex__(protocol)

    def __format__(self, spec):
        return format(self.item() if self.dim() == 0 else self.held, spec)

    def tolist(self):  # torch refuses it to subclasses
        return self.cpu().tolist()


def pin_memory(x):
    pinned = x.clone()
    pinned.is_in_pinned_memory = True
    return pinned


def line_of_ours():
    """ "file:line" of the innermost frame of the project, or "backward": that thread has none."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path != __file__ and path.startswith(str(ROOT)):
            return f"{os.path.relpath(path, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


class Gpu(TorchDispatchMode):
    def __init__(self, refused):
        super().__init__()
        self.refused, self.waits = refused, Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_gpu = any(isinstance(x, Shell) for x in tree_leaves((args, kwargs)))
        if on_gpu and op not in COPIES:
            self.check_devices(op, args, kwargs)
        makes_shells = on_gpu
        if device := kwargs.get("device"):
            makes_shells, kwargs["device"] = device.type == "cuda", CPU
        if kind := self.kind_of_wait(op, args, kwargs, on_gpu, makes_shells):
            where = line_of_ours().replace("backward", f"backward of {op.overloadpacket}")
            self.waits[kind, where] += 1

        known = {id(x.held): x for x in tree_leaves((args, kwargs)) if isinstance(x, Shell)}
        args, kwargs = tree_map_only(Shell, lambda x: x.held, (args, kwargs))

        def outer(x):
            if x.dtype in self.refused and makes_shells:
                raise TypeError(f"{op}: the device has no {x.dtype}, at {line_of_ours()}")
            if id(x) in known:  # an operation in place gives back what it got
                return known[id(x)]
            return Shell(x) if makes_shells else x

        return tree_map_only(torch.Tensor, outer, op(*args, **kwargs))

    def check_devices(self, op, args, kwargs):
        """Raises if the operation has tensors of both devices, as CUDA does."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cpu = [x for x in tensors if not isinstance(x, Shell)]
        if op in INDEXING and isinstance(args[0], Shell):
            on_cpu = [x for x in on_cpu if not any(x is index for index in args[1])]
        takes_numbers = op in TAKE_NUMBERS or torch.Tag.pointwise in op.tags
        if any(x.dim() or not takes_numbers for x in on_cpu):
            shapes = [tuple(x.shape) for x in on_cpu]
            raise RuntimeError(f"{op}: tensors {shapes} are on the CPU, at {line_of_ours()}")

    def kind_of_wait(self, op, args, kwargs, on_gpu, makes_shells):
        if op in COPIES:
            in_place = op is aten.copy_.default
            source = args[1] if in_place else args[0]
            to_gpu = isinstance(args[0], Shell) if in_place else makes_shells
            if isinstance(source, Shell):
                return None if to_gpu else "download"
            is_blocking = not (kwargs.get("non_blocking") or in_place and args[2:] == (True,))
            is_pinned = getattr(source, "is_in_pinned_memory", False)
            return "upload" if to_gpu and (is_blocking or not is_pinned) else None
        if not on_gpu:
            return None
        if op in INDEXING:
            indices = [x for x in args[1] if x is not None]
            if any(isinstance(x, Shell) and x.dtype == torch.bool for x in indices):
                return "shape"
            return "upload" if any(not isinstance(x, Shell) for x in indices) else None
        return "read" if op in READS else "shape" if op in SHAPES else None


@contextlib.contextmanager
def active(refused=()):
    """torch has a CUDA device while this is open; one without the refused dtypes."""
    cuda = dict(device_count=lambda: 1, current_device=lambda: 0)
    cuda |= dict(get_device_name=lambda *_: "Pretended H100", max_memory_allocated=lambda: 0)
    properties = SimpleNamespace(total_memory=80 * 10**9)
    cuda |= dict(get_device_properties=lambda *_: properties, reset_peak_memory_stats=lambda: None)
    for name in ("is_available", "is_initialized", "is_bf16_supported"):
        cuda[name] = lambda *_, **__: True  # a function each, or dynamo takes them for one
    for name in ("_lazy_init", "manual_seed_all", "synchronize", "set_device"):
        cuda[name] = lambda *_: None
    stream = mock.Mock(query=lambda: False)
    cuda["current_stream"] = lambda *_: stream
    types = [*foreach._foreach_supported_types, Shell]
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(…, device="cuda") comes by
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(torch.accelerator, "synchronize", lambda *_: None),
        mock.patch.object(torch.Tensor, "pin_memory", pin_memory),
        mock.patch.object(foreach, "_foreach_supported_types", types),
        # in model.to("cuda"): tied weights stay one
        mock.patch.object(torch.__future__, "_swap_module_params_on_conversion", True),
        Gpu(refused) as gpu,
    ):
        yield gpu


@contextlib.contextmanager
def counted_steps(gpu):
    """A list that gets the waits of each step of a training run, a Counter."""
    from train.loop import Run

    steps, real = [], Run.__iter__

    def counting(run):
        for step in real(run):
            gpu.waits = Counter()
            steps.append(gpu.waits)
            yield step
            gpu.waits = Counter()

    with mock.patch.object(Run, "__iter__", counting):
        yield steps


def main():
    sys.argv = [*sys.argv[1:], "--device", "cuda"]
    sys.path.insert(0, str(ROOT))
    with active() as gpu, counted_steps(gpu) as steps:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    for number, waits in enumerate(steps, 1):
        print(f"step {number}: {waits.total()} waits")
        for (kind, where), n in sorted(waits.items(), key=lambda item: item[0][1]):
            file, _, line = where.partition(":")
            text = linecache.getline(str(ROOT / file), int(line)).strip() if line else ""
            print(f"    {n:3} {kind:9} {where:22} {text}")


if __name__ == "__main__":
    main()
