"""What auto takes where a table has recorded measurements; CUDA tensors are fakes here."""

import json
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import explain
from lora_kernels.ops.linear import tuned as measured
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import dispatch

H200 = tiles.DeviceLimits("NVIDIA H200", 90, 132, 232_448)
FORWARD = "forward/bfloat16/M8192/K4096/N1024/R16/p0"
BACKWARD = "backward/bfloat16/M8192/K4096/N1024/R16/p0"
CELLS = {
    FORWARD: {
        "backend": "triton",
        "strategy": "fused",
        "seconds": {"composed": 4e-4, "hybrid": 3.9e-4, "fused": 3.5e-4},
    },
    BACKWARD: {"backend": "composed", "strategy": "hybrid", "seconds": {"composed": 5e-4}},
}


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    unavailable = dispatch.unavailable
    monkeypatch.setattr(
        dispatch,
        "unavailable",
        lambda backend, device, dtype=None: (
            None if backend == "triton" else unavailable(backend, device, dtype)
        ),
    )
    monkeypatch.setattr(measured, "limits_of", lambda device: H200)
    measured._lookup.cache_clear()
    yield
    measured._lookup.cache_clear()


def call(shape=(4, 2048, 4096), out_features=1024, rank=16, dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        return (
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(out_features, shape[-1], dtype=dtype, device=device),
            torch.empty(rank, shape[-1], device=device),
            torch.empty(out_features, rank, device=device),
        )


def chosen(direction="forward", dropout_p=0.0, backend="auto", **options):
    x, weight, lora_a, lora_b = call(**options)
    activation = x if direction == "forward" else x.new_empty(*x.shape[:-1], lora_b.shape[0])
    return measured.choose(backend, direction, activation, weight, lora_a, lora_b, dropout_p)


def test_a_recorded_cell_takes_its_fastest_backend():
    with tiles.use_cells(CELLS):
        choice = chosen()
        assert choice.backend == "triton"
        assert "triton (fused)" in choice.reason and "NVIDIA H200" in choice.reason
        assert FORWARD in choice.reason and "composed 0.400 ms" in choice.reason
        assert chosen("backward").backend == "composed"


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"shape": (4097, 4096), "rank": 9}, "triton"),  # the same powers of two
        ({"shape": (4096, 4096)}, "composed"),
        ({"rank": 17}, "composed"),
        ({"out_features": 1032}, "composed"),
        ({"shape": (8192, 4104)}, "composed"),
        ({"dtype": torch.float16}, "composed"),
        ({"dtype": torch.float32}, "composed"),
        ({"dropout_p": 0.1}, "composed"),
        ({"dropout_p": 1e-9}, "triton"),  # rounds to no dropout at all
    ],
    ids=str,
)
def test_only_the_bucket_that_was_measured(options, backend):
    with tiles.use_cells(CELLS):
        choice = chosen(**options)
    assert choice.backend == backend
    assert ("fastest measured" in choice.reason) == (backend == "triton")


def test_what_was_not_measured_stays_composed():
    x, weight, lora_a, lora_b = call()
    with FakeTensorMode():  # slicing a fake CUDA tensor needs a CUDA build
        strided = [
            torch.empty_strided(x.shape, stride, dtype=x.dtype, device="cuda")
            for stride in ((4096, 4 * 4096, 1), (2048 * 8192, 8192, 2), (2048 * 8192, 8192, 1))
        ]
    with tiles.use_cells(CELLS):
        for activation, base in (*((each, weight) for each in strided), (x, None)):
            choice = measured.choose("auto", "forward", activation, base, lora_a, lora_b, 0.0)
            assert choice.backend == "composed" and "measured" in choice.reason
    with tiles.use_cells({"*": {"strategy": "fused"}}):  # tile options are no measurement
        assert "nothing is recorded" in chosen().reason


def test_without_a_table_the_reason_names_the_command():
    choice = chosen(shape=(3, 4096))
    assert choice.backend == "composed"
    assert "forward/bfloat16/M4/" in choice.reason and "lora_kernels tune" in choice.reason


def test_a_backend_that_cannot_run_is_not_taken(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda *args: "triton is broken here")
    with tiles.use_cells(CELLS):
        assert chosen() == ("composed", "triton is broken here")


def test_a_named_backend_and_the_process_override_come_before_the_table(monkeypatch):
    with tiles.use_cells(CELLS):
        assert chosen(backend="composed").reason.startswith("asked for")
        assert chosen("backward", backend="triton").backend == "triton"
        monkeypatch.setattr(dispatch, "PROCESS_DEFAULT", "composed")
        assert chosen().reason.startswith("asked for")


def test_a_cpu_never_looks(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(measured, "_lookup", None)
        assert chosen(device="cpu").backend in ("composed", "native")


def test_explain_names_both_directions():
    with tiles.use_cells(CELLS):
        choice = explain(*call())
    assert choice.backend == "triton"
    assert FORWARD in choice.reason and "; backward composed: " in choice.reason
    assert BACKWARD in choice.reason


def test_shipped_tables_are_read_once_and_hits_are_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    folder = tmp_path / "NVIDIA_H200"
    folder.mkdir()
    (folder / "lora_linear.json").write_text(json.dumps({"cells": CELLS}))
    tiles.shipped_cells.cache_clear()
    try:
        first = chosen()
        (folder / "lora_linear.json").unlink()
        assert chosen() is first and first.backend == "triton"
        with tiles.use_cells({}):  # and the cache does not hide a replacement
            assert chosen().backend == "composed"
        monkeypatch.setattr(measured, "limits_of", lambda d: replace(H200, name="another"))
        measured._lookup.cache_clear()
        assert chosen().backend == "composed"
    finally:
        tiles.shipped_cells.cache_clear()


def test_the_op_asks_once_per_direction(monkeypatch):
    """The op asks once per direction, with that direction's activation.

    In fp64, which is not the compiled kernels': a call on a CPU that they serve asks nobody.
    """
    from lora_kernels import lora_linear
    from lora_kernels.ops.linear import op as autograd

    asked = []
    choose = measured.choose

    def spy(backend, direction, *args):
        asked.append((direction, tuple(args[0].shape)))
        return choose(backend, direction, *args)

    monkeypatch.setattr(autograd.tuned, "choose", spy)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    lora_a, lora_b = torch.randn(2, 8), torch.randn(6, 2)
    lora_linear(x, torch.randn(6, 8).double(), lora_a, lora_b, 1.0).sum().backward()
    assert asked == [("forward", (3, 5, 8)), ("backward", (3, 5, 6))]
