"""The emulator that runs the CUDA kernels on a CPU, by kernels of its own (emulator/probe*.cpp).

What a device would not forgive has to be found: each ``fault`` of a probe leaves something out or
does it wrongly. Some show only in some orders of threads, hence the seeds.
"""

import ctypes

import pytest
import torch
from emulator.build import PROBES, build, compiler
from torch import Tensor

SEEDS = range(6)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def library():
    if compiler() is None:
        pytest.skip("there is no C++ compiler to build the emulator with")
    return ctypes.CDLL(str(build("emulator_probe.so", PROBES)))


@pytest.fixture
def call(library):
    """``call(name, ...)`` runs a probe: None, or the text of its error."""

    def run(name: str, *arguments) -> str | None:
        probe = getattr(library, f"probe_{name}")
        probe.restype = ctypes.c_char_p
        text = probe(*map(_argument, arguments))
        return None if text is None else text.decode()

    yield run
    library.lora_emulator_configure(0, 0)


def _argument(value):
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return value if isinstance(value, bool) else ctypes.c_int64(value)


def outcomes(monkeypatch, run) -> list:
    """What ``run()`` gives for each of the seeds."""
    results = []
    for seed in SEEDS:
        monkeypatch.setenv("LORA_EMULATOR_SEED", str(seed))
        results.append(run())
    return results


# --- blocks and warps ------------------------------------------------------------------------


def block_sums(call, fault: int = 0) -> tuple[bool, str | None]:
    """Whether they are right."""
    blocks, rows, threads = 3, 2, 256
    x = torch.randint(-50, 50, (rows, blocks, threads)).float()
    sums = torch.full((rows, blocks), torch.nan)
    error = call("block_sum", x, sums, blocks, rows, threads, fault)
    return torch.equal(sums, x.sum(2)), error


def test_block_barriers(call, monkeypatch):
    assert outcomes(monkeypatch, lambda: block_sums(call)) == [(True, None)] * len(SEEDS)


def test_a_missing_block_barrier_shows(call, monkeypatch):
    assert outcomes(monkeypatch, lambda: block_sums(call, 1)) == [(False, None)] * len(SEEDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mma(call, dtype):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    expected = d.double() + a.double() @ b.double().t()
    assert call("mma", dtype == torch.bfloat16, a, b, d) is None
    torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=1e-6)


def test_shuffle(call):
    values, got = torch.randint(2**60, (32,)), torch.zeros(32, dtype=torch.int64)
    source = torch.randint(-64, 64, (32,), dtype=torch.int32)
    assert call("shuffle", values, source, got) is None
    assert torch.equal(got, values[source.long() % 32])


@pytest.mark.parametrize("fault", [0, 1])
def test_sync_warp(call, fault):
    values, got = torch.randn(96), torch.zeros(96)
    assert call("warp_exchange", values, got, 96, fault) is None
    assert torch.equal(got, values.view(3, 32).flip(1).flatten()) == (fault == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding(call, dtype):
    values = torch.randn(2048) * 2.0 ** torch.randint(-30, 30, (2048,))
    special = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        65504,
        65519.9,
        65520,
        6e-8,
        2.9e-8,
        1e38,
        1 + 2**-8,
    ]
    values[: len(special)] = torch.tensor(special)
    values[100:200] = torch.randn(100).to(dtype) * (1 + 2.0**-12)  # near what is representable
    rounded, back = torch.empty(2048, dtype=dtype), torch.empty(2048)
    packed = torch.empty(2048, 2, dtype=dtype)
    assert call("convert", dtype == torch.bfloat16, values, rounded, back, packed, 8) is None
    assert torch.equal(rounded, values.to(dtype))
    assert torch.equal(back, rounded.float())
    assert torch.equal(packed, torch.stack([rounded, -rounded], 1))


def test_named_barriers(call, monkeypatch):
    result = torch.zeros(1, dtype=torch.int32)
    for seed in SEEDS:
        monkeypatch.setenv("LORA_EMULATOR_SEED", str(seed))
        assert call("hand_over", result, 10, 0) is None
        assert result.item() == 2 ** (10 + 1) - 2
    assert "barrier 1 is for" in call("hand_over", result, 2, 1)
    error = call("hand_over", result, 2, 2)
    assert "64 threads from thread 0 on wait at sync_named 2, where 64 of 128" in error
    assert "64 threads from thread 64 on wait at sync_named 3" in error


# --- clusters --------------------------------------------------------------------------------


def cluster_sums(call, cluster: int = 4, fault: int = 0) -> tuple[bool, str | None]:
    """Whether they are right."""
    values, sums = torch.randint(-50, 50, (8, 64)).float(), torch.full((8, 64), torch.nan)
    error = call("cluster_sum", values, sums, 8, 64, cluster, fault)
    weights = torch.arange(1, cluster + 1).view(1, -1, 1)
    expected = (values.view(-1, cluster, 64) * weights).sum(1, keepdim=True)
    return torch.equal(sums.view(-1, cluster, 64), expected.expand(-1, cluster, -1)), error


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_blocks_of_a_cluster_read_each_other(call, cluster, monkeypatch):
    results = outcomes(monkeypatch, lambda: cluster_sums(call, cluster))
    assert results == [(True, None)] * len(SEEDS)


def test_cluster_barriers_that_are_missing_show(call, monkeypatch):
    assert all(not right for right, _ in outcomes(monkeypatch, lambda: cluster_sums(call, 4, 1)))
    # Returning while others read: an error, or what they read is poisoned.
    assert not all(right for right, _ in outcomes(monkeypatch, lambda: cluster_sums(call, 4, 2)))
    assert "without a wait for the one before" in cluster_sums(call, 4, 3)[1]


def test_there_are_no_clusters_before_sm90(call, library):
    library.lora_emulator_configure(0, 80)
    assert cluster_sums(call, 1) == (True, None)
    assert "no clusters before" in cluster_sums(call, 2)[1]
    assert "setmaxnreg is for sm_90a, the device is sm_80" in call("registers")
    library.lora_emulator_configure(0, 0)
    assert call("registers") is None


# --- what a device does not forgive ----------------------------------------------------------


@pytest.mark.parametrize(
    "fault, message",
    [
        (1, "32 threads from thread 0 on have returned; 32 threads from thread 32 on wait at"),
        (2, "the lanes of a warp are at different calls"),
        (3, "thread 40"),
        (4, "a load of 16 bytes is misaligned"),
        (5, "a load of 8 bytes is misaligned"),
        (6, "a misaligned access at"),
        (7, "an index outside of its array at"),
        (8, "block 0 wrote beyond its shared memory"),
        (9, "a shift by too many bits at"),
        (10, "shared_address: the address is not in this block's shared memory"),
        (11, "__trap() in block 0"),
        (12, "the kernel threw: from the kernel"),
        (13, "of its warp"),
        (14, "no thread can go on"),
        (15, "cluster_wait without cluster_arrive"),
    ],
)
def test_misuse_is_an_error_and_the_next_launch_runs(call, fault, message):
    data, out = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
    pointer = data[data.data_ptr() % 16 // 8 :]  # begins at a multiple of 16 bytes
    if fault == 5:
        data = torch.zeros(64, dtype=torch.int32)
        pointer = data
    error = call("misuse", pointer, out, fault)
    assert error.startswith("probe: ")
    assert message in error
    assert block_sums(call) == (True, None)


@pytest.mark.parametrize(
    "blocks, rows, threads, shared_bytes, cluster, message",
    [
        (2, 1, 1024, 232448, 1, None),
        (0, 1, 32, 0, 1, "blocks in x"),
        (1, 65536, 32, 0, 1, "blocks in y"),
        (1, 1, 1056, 0, 1, "1024 threads"),
        (1, 1, 48, 0, 1, "whole warps"),
        (1, 1, 32, 232449, 1, "shared memory"),
        (16, 1, 32, 0, 16, "1 to 8 blocks"),
        (3, 1, 32, 0, 2, "a multiple of the cluster"),
    ],
)
def test_launches(call, blocks, rows, threads, shared_bytes, cluster, message):
    error = call("launch", blocks, rows, threads, shared_bytes, cluster)
    assert error is None if message is None else message in error


# --- bulk copies and barriers in memory ------------------------------------------------------


def pipeline(
    call, fault: int = 0, *, cluster: int = 1, steps: int = 9, swizzled: bool = True,
    column: int = 0, row: int = 0,
) -> tuple[bool, str | None]:  # fmt: skip
    """Whether the boxes that went through the ring are right."""
    rows, columns, pitch = 21, 500, 512
    storage = torch.full((rows, pitch), torch.nan, dtype=torch.bfloat16)
    storage[:, :columns] = torch.randn(rows, columns)
    size = 8 * cluster
    out = torch.full((cluster, steps, size, 64), torch.nan)
    error = call(
        "ring", storage, columns, rows, 2 * pitch, column, row, steps, swizzled, cluster, out, fault
    )
    around = torch.zeros(rows + 200, 2500)
    around[100 : 100 + rows, 1000 : 1000 + columns] = storage[:, :columns]
    boxes = around[100 + row : 100 + row + size, 1000 + column :][:, : 64 * steps]
    expected = boxes.reshape(size, steps, 64).transpose(0, 1)
    return torch.equal(out, expected.expand(cluster, -1, -1, -1)), error


@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize("column, row", [(0, 0), (-70, -3), (61, 17), (600, 0), (8, -50)])
def test_boxes_and_what_lies_outside(call, column, row, swizzled, monkeypatch):
    run = lambda: pipeline(call, swizzled=swizzled, column=column, row=row)  # noqa: E731
    assert outcomes(monkeypatch, run) == [(True, None)] * len(SEEDS)


def test_multicast(call, monkeypatch):
    for cluster in (2, 4):
        results = outcomes(monkeypatch, lambda cluster=cluster: pipeline(call, cluster=cluster))
        assert results == [(True, None)] * len(SEEDS)


@pytest.mark.parametrize(
    "fault, message",
    [
        (1, "there is no initialized barrier at shared byte 2048 of block 0"),
        (2, "more arrivals than the barrier was initialized for"),
        (3, "wait for parity 0 of the barrier at shared byte 2064, whose phase 0 lacks 2 arrivals"),
        (5, "lacks 0 arrivals and -1 bytes"),
        (6, "lacks 0 arrivals and 1 bytes"),
        (7, "tma_load: a box needs shared memory from a multiple of 1024 bytes on"),
        (9, "wait for parity 0 of the barrier at shared byte 2064, whose phase 0 lacks 2 arrivals"),
    ],
)
def test_barriers_used_wrongly_are_errors(call, fault, message, monkeypatch):
    results = outcomes(monkeypatch, lambda: pipeline(call, fault))
    assert not any(right for right, _ in results)
    assert any(message in error for _, error in results)
    assert pipeline(call) == (True, None)


@pytest.mark.parametrize("fault", [4, 8], ids=["before a copy", "before reading"])
def test_a_wait_that_is_missing_shows(call, fault, monkeypatch):
    results = outcomes(monkeypatch, lambda: pipeline(call, fault))
    assert sum(right for right, _ in results) == 0


def test_a_block_must_not_return_while_another_needs_it(call, monkeypatch):
    errors = [error for _, error in outcomes(monkeypatch, lambda: pipeline(call, 10, cluster=2))]
    assert any(error and "which has returned" in error for error in errors)


@pytest.mark.parametrize("column, row", [(0, 0), (40, 3), (-8, -5), (200, 0)])
def test_stores(call, column, row, monkeypatch):
    steps, rows, columns, pitch = 3, 45, 90, 96
    values = torch.randn(16 * steps, 64)
    around = torch.full((rows + 100, columns + 400), torch.nan, dtype=torch.bfloat16)
    expected = around.clone()
    expected[50 + row : 50 + row + 16 * steps, 200 + column : 264 + column] = values
    expected = expected[50 : 50 + rows, 200 : 200 + columns]

    def run(fault: int = 0):
        storage = torch.full((rows, pitch), torch.nan, dtype=torch.bfloat16)
        arguments = (columns, rows, 2 * pitch, column, row, fault)
        error = call("store", values, steps, storage, *arguments)
        assert storage[:, columns:].isnan().all()
        return torch.equal(storage[:, :columns].nan_to_num(99), expected.nan_to_num(99)), error

    assert outcomes(monkeypatch, run) == [(True, None)] * len(SEEDS)
    if column < 100:
        assert not all(right for right, _ in outcomes(monkeypatch, lambda: run(1)))
    errors = [error for _, error in outcomes(monkeypatch, lambda: run(2))]
    assert any(error and "a bulk store still needs its shared memory" in error for error in errors)


@pytest.mark.parametrize(
    "offset, columns, rows, stride, box, swizzle, message",
    [
        (0, 64, 5, 128, (64, 256), True, None),
        (0, 60, 5, 128, (256, 256), False, None),
        (2, 64, 5, 128, (64, 8), True, "begin at a multiple of 16"),
        (0, 60, 5, 120, (64, 8), True, "a multiple of 16 bytes apart"),
        (0, 64, 5, 112, (64, 8), True, "must not overlap"),
        (0, 0, 5, 128, (64, 8), True, "sizes from 1"),
        (0, 64, 5, 128, (64, 257), True, "boxes of 1 to 256"),
        (0, 64, 5, 128, (12, 8), False, "a multiple of 16 bytes"),
        (0, 64, 5, 128, (128, 8), True, "at most 128 bytes"),
    ],
)
def test_tensor_maps(call, offset, columns, rows, stride, box, swizzle, message):
    data = torch.zeros(64, dtype=torch.int64)
    start = -data.data_ptr() % 16 + offset
    base = data.view(torch.uint8)[start:]
    error = call("map", base, columns, rows, stride, *box, swizzle)
    assert error is None if message is None else message in error


# --- warpgroup products ----------------------------------------------------------------------


def product(call, dtype, transposed: bool, warpgroups: int, columns: int, fault: int = 0):
    """Result, expected result and error."""
    rows, depth = 64 * warpgroups, 192
    a = torch.randn(rows, depth).to(dtype)
    b = torch.randn(depth, columns).to(dtype)
    d = torch.full((rows, columns), torch.nan)
    stored = b if transposed else b.t().contiguous()
    arguments = (transposed, a, stored, rows, columns, depth, d, fault)
    error = call("product", dtype == torch.bfloat16, *arguments)
    return d.double(), a.double() @ b.double(), error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["along depth", "along columns"])
@pytest.mark.parametrize("warpgroups, columns", [(1, 128), (2, 256)])
def test_wgmma(call, dtype, transposed, warpgroups, columns, monkeypatch):
    for seed in SEEDS:
        monkeypatch.setenv("LORA_EMULATOR_SEED", str(seed))
        d, expected, error = product(call, dtype, transposed, warpgroups, columns)
        assert error is None
        torch.testing.assert_close(d, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "fault, message",
    [
        (1, "wgmma_fence is missing"),
        (2, "the descriptor of a is not that of a 128-byte swizzle"),
        (3, "the warps of a warpgroup ask for different products"),
        (4, "accumulators were written before wgmma_wait"),
        (5, "returned while products are under way"),
        (7, "returned while products are under way"),
    ],
)
def test_wgmma_used_wrongly_is_an_error(call, fault, message):
    assert message in product(call, torch.bfloat16, False, 1, 128, fault)[2]
    assert product(call, torch.bfloat16, False, 1, 128)[2] is None


def test_accumulators_are_unknown_until_the_wait(call, monkeypatch):
    run = lambda: product(call, torch.float16, True, 1, 256, 6)[0].flatten()[:128]  # noqa: E731
    assert all(d.isnan().all() for d in outcomes(monkeypatch, run))
