"""The same bits for any number of threads, in a forked child too, and without the extension."""

import os
import subprocess
import sys

import pytest
import torch
from routed_results import run_routed

from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime.dropout import ActiveDropout
from lora_kernels.testing import LoRAProblem, run_forward_backward
from lora_kernels.testing.routed_inputs import RoutedProblem


def kernels(dtype: torch.dtype) -> list[torch.Tensor]:
    """Results large enough that several threads take part."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    results = [native.packed_keep_mask(torch.tensor(7), 0.2, 700, 1100)]
    # In one walk over the rows; too wide for it; too few rows, many ranks.
    for rows, columns, out_columns, rank in ((700, 1000, 1100, 19), (700, 2500, 90, 5),
                                             (9, 1100, 800, 200)):  # fmt: skip
        x, y, dy, dx = (
            draw(rows, n, dtype=dtype) for n in (columns, out_columns, out_columns, columns)
        )
        a, b = draw(rank, columns), draw(out_columns, rank)
        dropout = ActiveDropout(0.2, torch.tensor(7))
        h, mask = native.allocate_saved(x, rank, dropout)
        native.adapter_forward(y, x, a, b, h, mask, 0.5, dropout, add=True)
        grads = torch.empty_like(a), torch.empty_like(b)
        native.adapter_backward(dx, *grads, dy, x, a, b, h, mask, 0.5, dropout, add=True)
        results += [y, h, mask, dx, *grads]
    return results


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_kernels(dtype, threads):
    threads(1)
    expected = kernels(dtype)
    for count in (2, 3, 5):
        threads(count)
        for ours, one_thread in zip(kernels(dtype), expected, strict=True):
            assert torch.equal(ours, one_thread)


@pytest.mark.parametrize("name", ["kernels.txt", "kernels.so"])
def test_a_path_that_holds_no_extension_is_absent(name, tmp_path, monkeypatch):
    """With a reason, whether it is the name or the file that is none."""
    monkeypatch.setenv("LORA_KERNELS_NATIVE", str(tmp_path / name))
    extension, reason = native._found.__wrapped__()
    assert extension is None and "does not load" in reason and name in reason


def routed_results() -> dict[str, torch.Tensor]:
    """Adapters' parts alone: the base GEMM is the vendor's."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 5, (900, 2), generator=generator)
    problem = RoutedProblem.random(
        ids, [(3, 5), (16, 0), (8, 8), (40, 1), (0, 24)], 520, (300, 530), dtype=torch.bfloat16,
        dropout=0.1, weighted=True, with_weight=False,
    )  # fmt: skip
    return run_routed(problem, "native")


def test_routed(threads):
    threads(1)
    expected = routed_results()
    for count in (2, 3):
        threads(count)
        for name, ours in routed_results().items():
            assert torch.equal(ours, expected[name]), name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_after_use():
    """The parent's threads do not exist in the child: it must not wait for them."""
    program = """
import os, sys, torch
from test_threads import kernels
torch.set_num_threads(3)
expected = kernels(torch.bfloat16)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own operations would wait for threads that are gone
    torch.get_num_threads = lambda: 3
    same = all(torch.equal(a, b) for a, b in zip(kernels(torch.bfloat16), expected))
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    path = os.pathsep.join(sys.path)  # ours: the program takes the kernels above
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=True)


def run(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_absent_extension_is_no_error():
    """Everything works without it, and says why it is not there."""
    program = """
import torch, lora_kernels
from lora_kernels.__main__ import doctor
layer = lora_kernels.LoRALinear.from_linear(torch.nn.Linear(8, 6), rank=2, alpha=4)
layer(torch.randn(3, 8)).sum().backward()
x, w, a, b = (torch.randn(*s) for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
print(lora_kernels.explain(x, w, a, b))
try:
    lora_kernels.lora_linear(x, w, a, b, 1.0, backend="native")
except ValueError as error:
    print(error)
print([line for line in doctor() if line.startswith("extension")])
"""
    chosen, named, line = run(program, LORA_KERNELS_NATIVE="0").splitlines()
    assert chosen.startswith("Choice(backend='composed'")
    assert all("LORA_KERNELS_NATIVE=0" in text for text in (chosen, named, line))


def test_the_process_can_switch_it_off():
    program = """
import torch, lora_kernels
x, w, a, b = (torch.randn(*s) for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
print(lora_kernels.explain(x, w, a, b).backend)
"""
    assert run(program, LORA_KERNELS_BACKEND="composed").split() == ["composed"]
    assert run(program, LORA_KERNELS_CPU_LEVEL="0").split() == ["composed"]
    if (best := native.extension().best_level()) > 0:
        assert run(program, LORA_KERNELS_CPU_LEVEL=str(best)).split() == ["native"]


def test_the_operation_takes_the_compiled_kernels(monkeypatch):
    """By default, forward and backward: not composed by mistake."""
    from lora_kernels import lora_linear

    calls = []
    for name in ("adapter_forward", "adapter_backward"):
        original = getattr(native, name)
        monkeypatch.setattr(
            native, name,
            lambda *args, _name=name, _original=original, **options: (
                calls.append(_name), _original(*args, **options)
            )[1],
        )  # fmt: skip
    if native.level() == 0:
        pytest.skip("auto does not take the portable kernels")
    run_forward_backward(lora_linear, LoRAProblem.random((5,), 16, 12, 3, dropout_p=0.3))
    assert calls == ["adapter_forward", "adapter_backward"]
