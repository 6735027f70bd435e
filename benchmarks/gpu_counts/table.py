"""What one operation of torch is on a CUDA device: launches, and bytes read and written.

The table is explicit: an operation that is not in it, and that torch does not tag as pointwise,
raises. Where ATen's choice depends on sizes the rule stands at the entry; all of them hold for
whoever calls, so that a comparison is fair where a rule is coarse.

Dimensions: n elements of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cost import Cost, Operation, nbytes
from .device import CAPABILITY, is_on_gpu


def cost_of(operation: Operation, pointwise: bool) -> Cost:
    """Raises NotImplementedError for an operation that is not in the table."""
    if operation.name in FREE:
        return Cost()
    rule = RULES.get(operation.name)
    if rule is None:
        if not pointwise:
            raise NotImplementedError(
                f"unknown op: {operation.name}.{operation.overload or 'default'} is not in "
                "benchmarks/gpu_counts/table.py; add what it launches, reads and writes"
            )
        rule = _pointwise
    if operation.results and not any(result.numel() for result in operation.results):
        return Cost()
    cost = rule(operation)
    if operation.name not in ("copy_", "_to_copy"):
        for tensor in operation.from_host:  # indices: uploaded first, and waited for
            cost += Cost(0, 0, nbytes(tensor), syncs=1, copies=1)
    return cost


def _pointwise(op: Operation) -> Cost:
    """One launch, whatever the dtypes; numbers on the host ride along."""
    return Cost(1, nbytes(*op.operands), nbytes(*op.results))


def _eye(op: Operation) -> Cost:
    """Zeros, and the diagonal."""
    (out,) = op.results
    return Cost(2, 0, nbytes(out) + out.shape[0] * out.element_size())


def _fill(op: Operation) -> Cost:
    return Cost(1, 0, nbytes(*op.results))


def _pad(op: Operation) -> Cost:
    """Filled whole, and copied into."""
    source, out = op.operands[0], op.results[0]
    if source.shape == out.shape:
        return Cost(1, nbytes(source), nbytes(out))
    return Cost(1 + (source.numel() > 0), nbytes(source), nbytes(out) + nbytes(source))


def _copied(source: Tensor, target: Tensor, non_blocking: bool) -> Cost:
    if is_on_gpu(source) and is_on_gpu(target):
        return Cost(1, nbytes(source), nbytes(target))
    # From or to the host: the host waits, but for an upload that is told not to.
    waits = not (non_blocking and is_on_gpu(target))
    on_gpu = source if is_on_gpu(source) else target
    moved = nbytes(on_gpu)
    gathered = Cost()
    if not on_gpu.is_contiguous() and on_gpu.numel():
        gathered = Cost(1, moved, moved)
    up = is_on_gpu(target)
    return gathered + Cost(0, 0 if up else moved, moved if up else 0, syncs=waits, copies=1)


def _copy(op: Operation) -> Cost:
    target, source, waits_not = (op.arguments[name] for name in ("self", "src", "non_blocking"))
    return _copied(source, target, waits_not)


def _to_copy(op: Operation) -> Cost:
    return _copied(op.arguments["self"], op.results[0], op.arguments["non_blocking"])


def _item(op: Operation) -> Cost:
    return Cost(0, nbytes(*op.operands), 0, syncs=1, copies=1)


# --- products --------------------------------------------------------------------------------


def _is_taken(matrix: Tensor) -> bool:
    """Whether cuBLAS takes the matrix as it lies: one dimension has stride 1, rows do not overlap.

    ``prepare_matrix_for_cublas`` of ATen.
    """
    (rows, columns), (down, across) = matrix.shape[-2:], matrix.stride()[-2:]
    return (down == 1 and across >= max(1, rows)) or (across == 1 and down >= max(1, columns))


def _product(left: Tensor, right: Tensor, out: Tensor, added: bool) -> Cost:
    """One GEMM; an operand that cuBLAS does not take is cloned before, a result copied back.

    splits: where fewer tiles of 128 x 128 than half of 132 multiprocessors have 1024 or more to
    add up.
    """
    cost = Cost(1, nbytes(left, right) + added * nbytes(out), nbytes(out))
    for operand in (left, right):
        if not _is_taken(operand):
            cost += Cost(1, nbytes(operand), nbytes(operand))
    if not _is_taken(out):
        cost += Cost(1 + added, (1 + added) * nbytes(out), (1 + added) * nbytes(out))
    rows, columns = out.shape[-2:]
    batch = out.shape[0] if out.ndim == 3 else 1
    if batch * -(-rows // 128) * -(-columns // 128) < 66 and left.shape[-1] >= 1024:
        cost.splits = 1
    return cost


def _mm(op: Operation) -> Cost:
    return _product(op.arguments["self"], op.arguments["mat2"], op.results[0], added=False)


def _addmm(op: Operation) -> Cost:
    arguments, out = op.arguments, op.results[0]
    left = arguments.get("mat1", arguments.get("batch1"))
    right = arguments.get("mat2", arguments.get("batch2"))
    addend, beta = arguments["self"], arguments["beta"]
    if beta == 0:
        return _product(left, right, out, added=False)
    if op.name.endswith("_") or addend is out:
        return _product(left, right, out, added=True)
    if beta == 1 and _rides_in_epilogue(addend, right, out):
        return _product(left, right, out, added=False) + Cost(0, nbytes(addend), 0)
    return Cost(1, nbytes(addend), nbytes(out)) + _product(left, right, out, added=True)


def _rides_in_epilogue(bias: Tensor, right: Tensor, out: Tensor) -> bool:
    """``isInputCompliesAddmmCudaLt`` of ATen: a bias that cublasLt adds."""
    return (
        bias.ndim == 1
        and bias.is_contiguous()
        and out.is_contiguous()
        and bias.shape[0] == right.shape[1]
        and min(right.shape) > 1
    )


def _grouped_mm(op: Operation) -> Cost:
    """One launch and one that writes the groups' addresses on sm_90 and sm_100; elsewhere a loop
    over the groups, whose ends the host waits for."""
    left, right, offsets = (op.arguments[name] for name in ("self", "mat2", "offs"))
    out = op.results[0]
    moved = nbytes(left, right)
    if CAPABILITY[0] in (9, 10) and left.dtype == torch.bfloat16:
        return Cost(2, moved + nbytes(offsets), nbytes(out))
    groups = offsets.numel() if offsets is not None else left.shape[0]
    return Cost(groups, moved, nbytes(out), syncs=1, copies=1)


# --- along a dimension -----------------------------------------------------------------------


def _reduction(op: Operation) -> Cost:
    """A second launch (of semaphores) where 4096 or more are added up to at most 65536 results."""
    source = op.operands[0]
    length = source.numel() // max(op.results[0].numel(), 1)
    split = length >= 4096 and op.results[0].numel() <= 65536
    return Cost(1 + split, nbytes(source), nbytes(*op.results))


def _scan(op: Operation) -> Cost:
    """Of one row by cub: its state, then the scan."""
    return Cost(2, nbytes(*op.operands), nbytes(*op.results))


def _sort(op: Operation) -> Cost:
    """Up to 4096 keys: copied, numbered and sorted in place. More: numbered, a histogram, its scan,
    and a radix pass for each byte of the key."""
    source = op.operands[0]
    moved = nbytes(*op.results)
    if source.shape[-1] <= 4096:
        return Cost(3, nbytes(source) + moved, 2 * moved)
    passes = source.element_size()
    read = nbytes(source) + passes * moved
    return Cost(3 + passes, read, nbytes(op.results[1]) + passes * moved)


def _nonzero(op: Operation) -> Cost:
    """Counted in two steps, waited for, selected in two."""
    return Cost(4, 2 * nbytes(*op.operands), nbytes(*op.results), syncs=1, copies=1)


def _unique(op: Operation) -> Cost:
    """A sort of 64-bit keys, marks, a scan, a selection, and the host waits for the count."""
    source = op.operands[0]
    passes = source.element_size()
    moved = (passes + 3) * nbytes(source)
    return Cost(passes + 6, moved, moved, syncs=1, copies=1)


def _repeat_interleave(op: Operation) -> Cost:
    """A scan and the numbers; without output_size the host waits for the sum."""
    waits = op.arguments.get("output_size") is None
    read = nbytes(*op.operands)
    return Cost(3, 2 * read, read + nbytes(*op.results), syncs=waits, copies=waits)


def _cat(op: Operation) -> Cost:
    """A launch for every 128 inputs of one dtype."""
    by_dtype: dict[torch.dtype, int] = {}
    for tensor in op.operands:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + (tensor.numel() > 0)
    launches = sum(-(-count // 128) for count in by_dtype.values())
    return Cost(launches, nbytes(*op.operands), nbytes(*op.results))


def _foreach(op: Operation) -> Cost:
    """Launches of at most 64 pairs of tensors (110 of one list, 48 of three) and 320 blocks of
    65536 elements; one for each tensor where ATen does not take its fast route."""
    lists = [value for value in op.arguments.values() if _is_tensors(value)]
    written = op.results or lists[0]
    read = lists[1] if op.name == "_foreach_copy_" else op.operands
    read = [] if op.name == "_foreach_zero_" else read
    launches = _multi_tensor_launches(lists) if _is_fast(lists) else len(lists[0])
    return Cost(launches, nbytes(*read), nbytes(*written))


def _is_fast(lists: list[list[Tensor]]) -> bool:
    """``can_use_fast_route``: a dtype for each list, dense tensors, pairs of the same strides."""
    return all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists) and all(
        each.shape == first.shape and each.stride() == first.stride() and _is_dense(each)
        for first, *pair in zip(*lists, strict=True)
        for each in (first, *pair)
    )


def _is_dense(tensor: Tensor) -> bool:
    strides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in strides:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _multi_tensor_launches(lists: list[list[Tensor]]) -> int:
    most = {1: 110, 2: 64}.get(len(lists), 48)
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        if tensor.numel() == 0:
            continue
        tensors, blocks = tensors + 1, blocks + -(-tensor.numel() // 65536)
        launches, blocks = launches + blocks // 320, blocks % 320
        if tensors == most:
            launches, tensors, blocks = launches + (blocks > 0), 0, 0
    return launches + (blocks > 0)


def _is_tensors(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Tensor)


# --- by index --------------------------------------------------------------------------------


def _gather(op: Operation) -> Cost:
    """One launch that reads the indices and what it writes."""
    out = op.results[0]
    indices = [tensor for tensor in op.operands if not tensor.is_floating_point()]
    indices = indices if len(indices) < len(op.operands) else op.operands[1:]
    return Cost(1, nbytes(*indices) + nbytes(out), nbytes(out))


def _search(op: Operation) -> Cost:
    return Cost(1, nbytes(*op.operands), nbytes(*op.results))


def _scattered(op: Operation, atomic: bool, reads_target: bool) -> Cost:
    """One launch into an existing tensor; out of place it is copied before."""
    target = op.arguments["self"]
    source = op.arguments.get("source", op.arguments.get("src", op.arguments.get("value")))
    index = op.arguments["index"]
    moved = nbytes(source) if isinstance(source, Tensor) else index.numel() * target.element_size()
    read = nbytes(index) + (nbytes(source) if isinstance(source, Tensor) else 0)
    touched = moved // (
        source.element_size() if isinstance(source, Tensor) else target.element_size()
    )
    touched *= target.element_size()
    cost = Cost(1, read + reads_target * touched, touched)
    cost.atomics = int(atomic and target.is_floating_point())
    if not op.name.endswith("_"):
        cost += Cost(1, nbytes(target), nbytes(target))
    return cost


def _index_put(op: Operation) -> Cost:
    """One launch; to accumulate, the indices are sorted first (no atomics)."""
    indices = [index for index in op.arguments["indices"] if isinstance(index, Tensor)]
    values = op.arguments["values"]
    target = op.arguments["self"]
    cost = Cost(1, nbytes(*indices, values), nbytes(values))
    if op.arguments.get("accumulate"):
        count = max(index.numel() for index in indices)
        keys = 2 * 8 * count
        passes = 1 if count <= 4096 else 10
        cost += Cost(2 + passes, passes * keys + nbytes(values), passes * keys)
    if not op.name.endswith("_"):
        cost += Cost(1, nbytes(target), nbytes(target))
    return cost


def _embedding_backward(op: Operation) -> Cost:
    """Zeros and one launch that adds, up to 3072 indices; more are sorted (11 launches) and added
    up by segments (6), whose number the host waits for."""
    grad, indices = op.arguments["grad_output"], op.arguments["indices"]
    out = op.results[0]
    zeros = Cost(1, 0, nbytes(out))
    added = Cost(1, nbytes(grad, indices) + nbytes(grad), nbytes(grad))
    if indices.numel() <= 3072:
        return zeros + added
    keys = 2 * nbytes(indices)
    return zeros + added + Cost(16, 9 * keys, 9 * keys, syncs=1, copies=1)


def _native_dropout(op: Operation) -> Cost:
    """One fused launch on CUDA: x, and a byte an element for the mask."""
    return Cost(1, nbytes(op.arguments["input"]), nbytes(*op.results))


_FREE = """alias as_strided detach diagonal expand lift_fresh narrow permute select slice split
    split_with_sizes squeeze t transpose unbind unfold unsqueeze view _reshape_alias _unsafe_view
    empty empty_like empty_strided new_empty new_empty_strided resize_ set_ is_same_size"""
FREE = frozenset(_FREE.split())

_REDUCTIONS = "all amax amin any argmax argmin linalg_vector_norm max mean min norm prod sum"
# Pointwise, and not tagged so by torch.
_POINTWISE = """clone flip floor_divide roll __and__ __iand__ __ilshift__ __ior__
    __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__"""
_FILLS = """arange fill fill_ full full_like new_full new_ones new_zeros ones ones_like zero zero_
    zeros zeros_like bernoulli bernoulli_ normal_ rand rand_like randint randn random_ randperm
    scalar_tensor uniform_"""

RULES: dict[str, Callable[[Operation], Cost]] = {
    **dict.fromkeys(_FILLS.split(), _fill),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    "constant_pad_nd": _pad,
    "copy_": _copy,
    "eye": _eye,
    "_to_copy": _to_copy,
    "_local_scalar_dense": _item,
    "mm": _mm,
    "bmm": _mm,
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), _addmm),
    "_grouped_mm": _grouped_mm,
    **dict.fromkeys(("cumsum", "cumprod"), _scan),
    "sort": _sort,
    "nonzero": _nonzero,
    **dict.fromkeys(("_unique2", "unique_dim", "unique_consecutive"), _unique),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(
        ("_foreach_copy_", "_foreach_add_", "_foreach_mul_", "_foreach_mul", "_foreach_zero_"),
        _foreach,
    ),
    **dict.fromkeys(("embedding", "gather", "index", "index_select"), _gather),
    **dict.fromkeys(("searchsorted", "bucketize"), _search),
    **dict.fromkeys(
        ("index_add", "index_add_", "scatter_add", "scatter_add_"),
        lambda op: _scattered(op, atomic=True, reads_target=True),
    ),
    **dict.fromkeys(
        ("index_copy", "index_copy_", "index_fill", "index_fill_", "scatter", "scatter_"),
        lambda op: _scattered(op, atomic=False, reads_target=False),
    ),
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_"), _index_put),
    "embedding_dense_backward": _embedding_backward,
    "native_dropout": _native_dropout,
}
