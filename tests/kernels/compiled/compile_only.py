"""Compiling Triton kernels for GPUs that are not there, and reading off what they would use.

``record_launches`` runs a launcher on meta tensors for an imagined device and notes what it would
have launched; ``compile_launch`` compiles one of these as Triton would on that device, with the
same specialisation of its arguments. So what is checked without a GPU is what runs on one.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_TYPE_OF = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher asked for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]  # every parameter of the kernel
    options: dict[str, int]  # num_warps, num_stages

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses, and its assembly."""

    registers: int  # per thread
    stack: int  # bytes per thread: spills and local arrays
    shared: int  # bytes per block
    assembly: str
    cubin: bytes = field(default=b"", repr=False)  # of NVIDIA's

    @property
    def spills(self) -> bool:
        """Some ptxas keep a few registers in memory, far below the limit, so that one more block
        fits. At the limit none may be touched in a loop that multiplies."""
        if self.registers < 254:
            return self.stack > 32
        return self.stack > 32 or bool(self.stack and stack_accesses_in_loops(self.machine_code()))

    def instructions(self, mnemonic: str) -> int:
        return self.assembly.count(mnemonic)

    def machine_code(self) -> str:
        """NVIDIA's instructions with their addresses, as the assembler left them."""
        return _cuobjdump("-sass", self.cubin)


def instructions(machine_code: str) -> dict[int, str]:
    """address -> instruction, without the braces of those that are issued together."""
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([A-Z@{].*?)\s*;", machine_code)
    return {int(address, 16): instruction.lstrip("{ ") for address, instruction in found}


def stack_accesses_in_loops(machine_code: str) -> list[str]:
    """What reads or writes the stack in an innermost loop that multiplies."""
    code = instructions(machine_code)
    loops = []
    for address, text in code.items():
        jump = re.search(r"\bBRA\S* .*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append(range(int(jump[1], 16), address + 1))
    multiplying = [
        loop
        for loop in loops
        if any(re.search("MMA|FFMA", text) for address, text in code.items() if address in loop)
    ]
    innermost = [
        loop
        for loop in multiplying
        if not any(
            other != loop and other[0] in loop and other[-1] in loop for other in multiplying
        )
    ]
    return [
        text
        for address, text in code.items()
        if re.search(r"\b(LDL|STL)\b", text) and any(address in loop for loop in innermost)
    ]


def record_launches(modules: list, function: Callable[[], object], limits) -> list[Launch]:
    """What ``function`` would launch through ``modules`` on a device with these ``limits``.

    ``modules`` are those that launch: in each the kernels are replaced by recorders and its
    ``limits_of``, if it asks for any, by ``limits``. ``function`` should use meta tensors.
    """
    launches = []
    with ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    recorder = _Recorder(value, launches)
                    stack.enter_context(mock.patch.object(module, name, recorder))
            if hasattr(module, "limits_of"):
                stack.enter_context(mock.patch.object(module, "limits_of", lambda device: limits))
        function()
    return launches


class _Recorder:
    """Stands for a kernel: ``recorder[grid](*args, **kwargs)`` notes instead of launching."""

    def __init__(self, kernel: JITFunction, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        def note(*args, **kwargs):
            names = self.kernel.arg_names
            arguments = dict(zip(names, args, strict=False))
            arguments.update((name, kwargs[name]) for name in names if name in kwargs)
            options = {name: kwargs[name] for name in kwargs if name not in names}
            assert set(arguments) == set(names), set(names) ^ set(arguments)
            self.launches.append(Launch(self.kernel, grid, arguments, options))

        return note


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile for an NVIDIA GPU of that compute capability (80, 90, 100, ...); none is needed."""
    compiled = _compile(launch, GPUTarget("cuda", capability, 32))
    cubin = compiled.asm["cubin"]
    registers, stack = _usage(cubin)
    return Resources(registers, stack, compiled.metadata.shared, compiled.asm["ptx"], cubin)


def compile_launch_for_amd(launch: Launch, architecture: str = "gfx942") -> Resources:
    """Compile for an AMD GPU; registers are the vector registers."""
    compiled = _compile(launch, GPUTarget("hip", architecture, 64))
    assembly = compiled.asm["amdgcn"]

    def noted(pattern: str) -> int:
        return int(re.search(pattern, assembly)[1])

    return Resources(
        noted(r"\.vgpr_count:\s+(\d+)"),
        noted(r"\.private_segment_fixed_size:\s+(\d+)"),
        compiled.metadata.shared,
        assembly,
    )


def _compile(launch: Launch, target: GPUTarget):
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        argument = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, aligned = "constexpr", False
        elif parameter.do_not_specialize:
            kind, aligned = parameter.annotation_type or _type_of(argument), False
        else:
            kind, aligned = _specialise(argument)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = argument
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def _specialise(argument: object) -> tuple[str, bool]:
    """Triton's type of a run-time argument, and whether it counts as divisible by 16."""
    if isinstance(argument, TensorDescriptor):
        block = ", ".join(map(str, argument.block_shape))
        return f"tensordesc<{_TYPE_OF[argument.base.dtype]}[{block}]>", False
    if isinstance(argument, Tensor):
        # Memory that torch allocates is aligned; a view may start anywhere.
        offset = argument.storage_offset() * argument.element_size()
        return f"*{_TYPE_OF[argument.dtype]}", offset % 16 == 0
    if isinstance(argument, float):
        return _type_of(argument), False
    if argument == 1:
        return "constexpr", False
    return _type_of(argument), argument % 16 == 0


def _type_of(number: float) -> str:
    if isinstance(number, float):
        return "fp32"
    return "i32" if -(2**31) <= number < 2**31 else "i64"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and stack bytes of the one kernel in ``cubin``."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", cubin))
    return int(found[1]), int(found[2])


@functools.lru_cache(maxsize=64)
def _cuobjdump(option: str, cubin: bytes) -> str:
    """What the tool that Triton's wheel brings along says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
