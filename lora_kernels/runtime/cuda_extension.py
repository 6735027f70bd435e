"""Wraps the CUDA kernels of the compiled extension, and says why they cannot be used.

Dimensions: M tokens, K in_features, N out_features, R rank, D the main reduction of a GEMM, C the
columns of its result, P pairs of a token and an adapter, H the widest rank of a bank.

Three kernels (``csrc/cuda``), for bf16 and fp16 with fp32 accumulation: :func:`decode_linear` and
:func:`decode_routed_` for few tokens, compute capability 8.0 and newer; :func:`gemm_tail` for many,
9.0 only. They run on torch's current stream, launch only and read nothing back, so that they can be
captured in a CUDA graph; a launch that fails raises a RuntimeError with the kernel and its sizes.
The wrappers trust what they are given: :func:`why_not_decode_linear` and its like are asked
before.

In tests the extension may be one in which these kernels run on the CPU (``tests/cuda/emulator``);
then the same wrappers take CPU tensors.
"""

from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.runtime import cpu_extension
from lora_kernels.runtime.device_limits import cdiv, limits_of, on_device

DTYPES = (torch.bfloat16, torch.float16)
# Beyond them a GEMM with a tail reads less. Of these ranks there is room for h in the shared memory
# of every device, at any number of tokens.
MAX_DECODE_TOKENS, MAX_DECODE_PAIRS = 64, 256
MAX_DECODE_RANK, MAX_DECODE_WIDTH = 256, 512
TILES = tuple((columns, cluster) for columns in (128, 256) for cluster in (1, 2))

_NUMBER = {dtype: number for number, dtype in enumerate(cpu_extension.DTYPES)}
_ERROR_FILE = Path(__file__).parents[1] / "_native_cuda_error.txt"


# --- what there is ---------------------------------------------------------------------------


def built_for() -> tuple[str, ...]:
    """The targets: ``("cuda_13.0", "sm_80", "sm_90a", "compute_100")``, say; empty without any."""
    return tuple(getattr(cpu_extension.extension(), "cuda_built_for", "").split())


def emulated() -> bool:
    """Whether these kernels run on the CPU, as in tests."""
    return built_for() == ("emulated",)


def status() -> str:
    """For ``doctor``: a phrase that says whether the CUDA kernels were built, and if not, why."""
    if reason := cpu_extension.missing():
        return reason
    if not built_for():
        return f"not built: {_why_not_built()}"
    if emulated():
        return "emulated on the CPU"
    version, *targets = built_for()
    exact = ", ".join(target for target in targets if target.startswith("sm_"))
    newer = [target.removeprefix("compute_") for target in targets if target.startswith("compute_")]
    text = f"built for {exact}"
    if newer:
        text += f" and, as PTX, for what is newer than sm_{newer[0]}"
    text += f", with CUDA {version.removeprefix('cuda_')}"
    if torch.version.cuda is None:
        return f"{text}; this torch is built without CUDA"
    return text if torch.cuda.is_available() else f"{text}; no driver or no device here"


def _why_not_built() -> str:
    if _ERROR_FILE.exists():
        return _ERROR_FILE.read_text().strip()
    return "the extension is of an installation before there were any"


def missing(device: torch.device) -> str | None:
    """Why none of the kernels can run on ``device``; None when the decode kernels can."""
    if reason := cpu_extension.missing():
        return reason
    if not built_for():
        first, *more = _why_not_built().splitlines()
        more = " (`python -m lora_kernels doctor` shows more)" if more else ""
        return f"the compiled extension was built without its CUDA part: {first}{more}"
    if emulated():
        return None if device.type == "cpu" else "the CUDA kernels are emulated on the CPU here"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"no native kernel of this operation exists for {device.type!r} devices yet"
    capability = limits_of(device).capability
    if capability < 80:
        return f"compute capability 8.0 or newer is needed, this device has {capability / 10}"
    # Where torch does not tell, the first launch will.
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return unserved(built_for(), capability, driver() if driver else None)


def unserved(targets: tuple[str, ...], capability: int, driver: int | None) -> str | None:
    """Why an extension of these targets does not run on a device; None when it does.

    Args:
        capability: of the device, 90 for 9.0.
        driver: the newest CUDA it knows, 13000 for 13.0; None where that is not known.
    """
    version, *architectures = targets
    serving = [target for target in architectures if _runs(target, capability)]
    if not serving:
        built = ", ".join(architectures)
        return f"the CUDA kernels were built for {built}, this device is sm_{capability}"
    # Machine code runs on any driver of its CUDA's major version; PTX needs the minor version too.
    major, minor = map(int, version.removeprefix("cuda_").split("."))
    exact = any(target.startswith("sm_") for target in serving)
    if driver is not None and driver < 1000 * major + (0 if exact else 10 * minor):
        return (
            f"the CUDA kernels were built with CUDA {major}.{minor}, which the driver of this "
            f"machine (CUDA {driver // 1000}.{driver % 1000 // 10}) is too old for"
        )
    return None


def _runs(target: str, capability: int) -> bool:
    """sm_80 on 8.0 to 8.9, sm_90a on 9.0 alone, compute_80 on everything from 8.0 on."""
    kind, name = target.split("_")
    number = int(name.rstrip("af"))
    if kind == "compute":
        return number <= capability
    if name.endswith("a"):
        return number == capability
    return number // 10 == capability // 10 and number <= capability


def missing_gemm_tail(device: torch.device) -> str | None:
    """Why :func:`gemm_tail` cannot run on ``device``, where the decode kernels can."""
    if emulated():
        return None
    capability = limits_of(device).capability
    if capability != 90:
        found = capability / 10
        return f"the GEMM with a tail is for compute capability 9.0, this device has {found}"
    if "sm_90a" not in built_for():
        return "the CUDA kernels were not built for sm_90a"
    return None


# --- few tokens, one adapter -----------------------------------------------------------------


def why_not_decode_linear(
    x: Tensor,  # [..., K]
    weight: Tensor | None,  # [N, K]
    rank: int,
    drops: bool,
    output_scale: Tensor | None,  # [N]
) -> str | None:
    """Why a forward of ``lora_linear`` is not :func:`decode_linear`'s; None when it is."""
    tokens = x.shape[:-1].numel()
    if not 0 < tokens <= MAX_DECODE_TOKENS:
        return f"{tokens} tokens are not 1 to {MAX_DECODE_TOKENS}"
    if weight is None:
        return "there is no base weight"
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        return "the weight's rows are not contiguous"
    if rank > MAX_DECODE_RANK:
        return f"rank {rank} is more than {MAX_DECODE_RANK}"
    if drops:
        return "there is dropout"
    return None if output_scale is None else "there is an output_scale"


def decode_linear(
    x: Tensor,  # [M, K], bf16 or fp16
    weight: Tensor,  # [N, K] in x's dtype, unit stride in K
    lora_a: Tensor,  # [R, K], any floating dtype
    lora_b: Tensor,  # [N, R], any floating dtype
    scaling: Tensor | float,
    bias: Tensor | None = None,  # [N] in x's dtype
    h: Tensor | None = None,  # [M, R] fp32, contiguous; written
) -> Tensor:
    """``y = x W^T + bias + scaling * h B^T`` ``[M, N]`` with ``h = x A^T``."""
    x = cpu_extension.rows_of(x)
    (tokens, in_features), (out_features, rank) = x.shape, lora_b.shape
    lora_a, lora_b = _factors(lora_a, lora_b, x.dtype)
    bias = None if bias is None else bias.contiguous()
    scaling, scaling_at, number = _scaling(scaling, x.device)
    y = x.new_empty((tokens, out_features))
    if tokens == 0:
        return y
    with on_device(x):
        cpu_extension.loaded().cuda_decode_linear(
            *_place(x), _NUMBER[x.dtype], _NUMBER[lora_a.dtype], *_matrix(x), *_matrix(weight),
            *_matrix(lora_a), *_matrix(lora_b), _address(bias), scaling_at, number, *_matrix(y),
            _address(h), tokens, in_features, out_features, rank,
        )  # fmt: skip
    return y


def _factors(lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in x's dtype or both in fp32, with unit stride in the last dimension."""
    if lora_a.dtype != lora_b.dtype or lora_a.dtype not in (dtype, torch.float32):
        lora_a, lora_b = lora_a.float(), lora_b.float()
    return cpu_extension.with_unit_stride(lora_a), cpu_extension.with_unit_stride(lora_b)


def _scaling(scaling: Tensor | float, device: torch.device) -> tuple[Tensor | float, int, float]:
    """The scaling, which has to outlive the launch, its address or 0, and the number or 0."""
    if isinstance(scaling, Tensor) and scaling.device == device:
        scaling = scaling.to(torch.float32)
        return scaling, scaling.data_ptr(), 0.0
    return scaling, 0, float(scaling)


# --- few tokens, many adapters ---------------------------------------------------------------


def why_not_decode_routed(
    x: Tensor,  # [..., K]
    bank,
    routing,
    drops: bool,
) -> str | None:
    """Why a call of ``routed_lora`` is not :func:`decode_routed_`'s; None when it is.

    ``bank`` and ``routing`` are those of :mod:`lora_kernels.ops.routed.tensors`.
    """
    pairs = routing.tokens.shape[0]
    if routing.pairs_per_token != 1:
        return f"a token may have {routing.pairs_per_token} adapters"
    if not 0 < pairs <= MAX_DECODE_PAIRS:
        return f"room for {pairs} tokens is not 1 to {MAX_DECODE_PAIRS}"
    if x.numel() == 0 or bank.max_total_rank == 0:
        return "there is nothing to compute"
    if bank.max_total_rank > MAX_DECODE_WIDTH:
        return f"ranks of {bank.max_total_rank} over the slices are more than {MAX_DECODE_WIDTH}"
    if bank.num_slices > (most := cpu_extension.loaded().cuda_max_slices):
        return f"{bank.num_slices} slices are more than {most}"
    if drops:
        return "there is dropout"
    if bank.storage.dtype not in (x.dtype, torch.float32):
        return f"the adapters are {bank.storage.dtype} and x is {x.dtype}"
    return None


def decode_routed_(
    y: Tensor,  # [M, N], unit stride in N; written or added to
    x: Tensor,  # [M, K], bf16 or fp16, as y
    bank,  # with a storage in x's dtype or fp32
    routing,  # with one pair per token
    h: Tensor | None = None,  # [P, H] fp32, contiguous; written
    overwrite: bool = False,
) -> None:
    """``y (+)= w s h B^T`` with ``h = x A^T`` of every pair; zeros where there is no adapter.

    Without ``overwrite`` the rows of tokens without an adapter stay as they are.
    """
    x = cpu_extension.rows_of(x)
    weights = routing.pair_weights
    if weights is not None:
        weights = weights.detach().to(torch.float32).contiguous()
    with on_device(x):
        cpu_extension.loaded().cuda_decode_routed(
            *_place(x), _NUMBER[x.dtype], _NUMBER[bank.storage.dtype], *_matrix(x), *_matrix(y),
            overwrite, _address(h), bank.storage.data_ptr(), bank.slot_table.data_ptr(),
            bank.scaling.data_ptr(), routing.tiles.data_ptr(), routing.offsets.data_ptr(),
            routing.tokens.data_ptr(), _address(weights), x.shape[0], x.shape[1],
            bank.max_total_rank, routing.tiles.shape[0], routing.block, bank.slice_columns,
        )  # fmt: skip


# --- many tokens -----------------------------------------------------------------------------


def gemm_tail(
    left: Tensor,  # [M, D], bf16 or fp16, as all matrices here
    right: Tensor,  # [D, C], by rows or by columns
    tail_left: Tensor,  # [M, R]
    tail_right: Tensor,  # [R, C], as right
    out: Tensor,  # [M, C], written
    bias: Tensor | None = None,  # [C]
    output_scale: Tensor | None = None,  # [C]
    drop=None,  # the Dropout of the tail, with right by rows
    *,
    tile_columns: int = 0,  # 128 or 256; 0: by the sizes
    cluster: int = 0,  # 1 or 2 blocks; 0: by the sizes
) -> None:
    """``out = output_scale * (left @ right + D(tail_left @ tail_right)) + bias``."""
    (tokens, columns), rank = out.shape, tail_left.shape[1]
    by_columns = right.stride(0) == 1
    if by_columns:
        right, tail_right = right.t(), tail_right.t()
    usual = default_tile(tokens, columns, limits_of(left.device).multiprocessors)
    bias = None if bias is None else bias.contiguous()
    output_scale = None if output_scale is None else output_scale.contiguous()
    mask = 0, 0, 0, 0
    if drop is not None and drop.on:
        mask = _address(drop.seed), *drop.numbers
    with on_device(left):
        cpu_extension.loaded().cuda_gemm_tail(
            *_place(left), _NUMBER[left.dtype], *_matrix(left), *_matrix(right),
            *_matrix(tail_left), *_matrix(tail_right), by_columns, *_matrix(out), _address(bias),
            _address(output_scale), *mask, tokens, left.shape[1], columns, rank,
            tile_columns or usual[0], cluster or usual[1],
        )  # fmt: skip


def default_tile(tokens: int, columns: int, multiprocessors: int) -> tuple[int, int]:
    """Columns of a tile and blocks of a cluster, while nobody has measured.

    Wide tiles read less, once there are enough for every multiprocessor; two blocks share what they
    read of the right operand where they have neighbouring rows.
    """
    rows = cdiv(tokens, 128)
    wide = rows * cdiv(columns, 256) >= multiprocessors
    return 256 if wide else 128, 2 if wide and rows > 1 else 1


# --- tensors as the kernels take them --------------------------------------------------------


def _place(like: Tensor) -> tuple[int, int]:
    """The device's number and torch's current stream there."""
    if not like.is_cuda:  # emulated
        return 0, 0
    index = like.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _matrix(matrix: Tensor) -> tuple[int, int]:
    return matrix.data_ptr(), matrix.stride(0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
