"""What the launchers of every operation need: the device's limits and sizes of blocks."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

# Whether a product and a sum become one instruction, of every launch: said aloud, as Triton 3.10
# changes what it takes unasked, and with it the results' bits.
FP_FUSION = True


@dataclass(frozen=True)
class DeviceLimits:
    """What tile sizes depend on. The defaults stand for the interpreter."""

    name: str = "interpreter"
    capability: int = 90
    multiprocessors: int = 4
    shared_memory: int = 232_448  # bytes per block
    bandwidth: float = 3.3e12  # bytes per second, of the device's memory

    @property
    def multiplies_shared_memory(self) -> bool:
        """Whether the matrix units read tiles where copies put them (wgmma, tcgen05).

        Elsewhere, the cards for desktops and their like included, mma.sync takes registers.
        """
        return 90 <= self.capability < 120

    @property
    def threads(self) -> int:
        """Threads that one multiprocessor holds."""
        return 2048 if self.capability in (80, 90, 100, 103) else 1536


@functools.cache
def limits_of(device: torch.device) -> DeviceLimits:
    if device.type == "cpu":
        return DeviceLimits()
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        name=properties.name,
        capability=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
        bandwidth=_bandwidth_of(properties),
    )


def _bandwidth_of(properties) -> float:
    """Two transfers of the bus in each cycle; what a torch that does not say is likely to be on."""
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    if kilohertz and bits:
        return 2e3 * kilohertz * bits / 8
    return 2e12 if properties.major in (8, 9, 10) and properties.minor == 0 else 8e11


class Tile:
    """The sizes of a kernel's blocks, and how it is compiled; subclasses are frozen dataclasses."""

    @functools.cached_property
    def options(self) -> dict[str, int | bool]:
        """What a launch takes of a tile: the kernel's constants, in capitals, and the compiler's
        options."""
        taken = {
            name: value
            for name, value in vars(self).items()
            if name.isupper() or name.startswith("num_")
        }
        return {**taken, "enable_fp_fusion": FP_FUSION}


def on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: torch's switch for TF32 decides, as for its own GEMMs."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def padded_rows(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty ``[P, Q]`` whose rows begin at multiples of 16 bytes. The padding is never read."""
    rows, columns = shape
    unit = 16 // dtype.itemsize
    return like.new_empty((rows, cdiv(columns, unit) * unit), dtype=dtype)[:, :columns]


@dataclass(frozen=True)
class PipelineBytes:
    """Shared memory of a pipelined loop, in bytes: no less than what Triton's pipeliner takes.

    What the matrix units read in place is busy while they do. What is read into registers first
    (to be cast, masked, or for mma.sync) is free one stage earlier.
    """

    read_in_place: int  # per stage
    through_registers: int  # per stage
    besides: int = 0  # tiles on their way back from registers, and what the epilogue needs
    one_stage: bool = False  # no pipeline: see narrow_loop

    def of(self, stages: int, limits: DeviceLimits) -> int:
        in_place = stages if limits.multiplies_shared_memory else stages - 1
        return in_place * self.read_in_place + (stages - 1) * self.through_registers + self.besides


# Warps of a product whose left operand is masked as it is read: four on a multiprocessor do not
# hide the hundred instructions that eight elements of the mask take (reasoned, not measured).
DRAWING_WARPS = 8


# Barriers and scratch memory of reductions.
_SPARE = 2048


def narrow_loop(
    wide: int,  # bytes of a stage of the activation
    narrow: int,  # bytes of a stage of the other operand
    cast: int,  # bytes of that in the activation's dtype; 0 where it has it
    limits: DeviceLimits,
    *,
    masked: bool,  # the activation, by the dropout
    ieee: bool,  # no matrix units
) -> PipelineBytes:
    """The loop of a product with the rank as one side.

    What is masked is written back to be a matrix unit's operand anywhere; what is cast only where
    those read shared memory.

    On sm_90 a masked operand stays in registers. Where nothing is cast, Triton leaves the product
    that reads them in flight over the next step of a pipeline, and ptxas before 13.3 overwrites
    them (triton#9433; seen in the machine code of Triton 3.6 and 3.7): one stage there. The mask's
    instructions and other blocks hide the memory.
    """
    if ieee:
        return PipelineBytes(0, wide + narrow, wide + (cast or narrow))
    masked_wide = wide if masked else 0
    if not limits.multiplies_shared_memory:
        return PipelineBytes(0, wide + narrow, masked_wide)
    in_place = (0 if masked else wide) + (0 if cast else narrow)
    one_stage = masked and limits.capability == 90 and not cast
    return PipelineBytes(in_place, wide + narrow - in_place, masked_wide + cast, one_stage)


def pipeline_stages(wanted: int, loop: PipelineBytes, limits: DeviceLimits) -> int:
    """As many pipeline stages as fit, at most ``wanted``."""
    if loop.one_stage:
        return 1
    fits = (n for n in range(wanted, 1, -1) if loop.of(n, limits) + _SPARE <= limits.shared_memory)
    return next(fits, 1)


def blocks_at_once(num_warps: int, registers: int, shared: int, limits: DeviceLimits) -> int:
    """Blocks that one multiprocessor holds, by its 65,536 registers, threads and shared memory.

    It has 1 KiB more than one block may ask for, and every block takes 1 KiB for itself.
    """
    threads = 32 * num_warps
    by_memory = (limits.shared_memory + 1024) // (shared + 1024)
    return max(1, min(65_536 // (threads * registers), limits.threads // threads, by_memory))


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def clamp(number: int, low: int, high: int) -> int:
    return max(low, min(number, high))
