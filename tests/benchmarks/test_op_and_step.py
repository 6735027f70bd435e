"""What op and step measure on known functions, and their providers."""

import json
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_kernels
from benchmarks import (
    ceilings,
    driver,
    memory,
    naive,
    op,
    op_providers,
    provenance,
    step,
    step_providers,
)
from benchmarks.preparing import MissingExtra
from benchmarks.routed import RoutedCase
from benchmarks.step import StepCase
from lora_kernels.measuring.linear_call import LinearCase, problem_of
from lora_kernels.runtime import dispatch

# ---- memory


def test_saved_bytes_are_exact():
    x = torch.randn(6, 5, requires_grad=True)
    weight = torch.randn(5, 7, requires_grad=True)

    def forward():
        y = x @ weight  # saves x and weight
        z = y.exp()  # saves its result
        return (z * z).sum()  # saves z, twice the same storage

    saved = memory.saved_for_backward(forward, parameters=[weight])
    assert [storage.bytes for storage in saved] == [6 * 7 * 4, 6 * 5 * 4]
    assert [storage.name for storage in saved] == ["float32[6,7]", "float32[6,5]"]


def test_saved_bytes_count_the_whole_storage_that_a_view_keeps_alive():
    scores = torch.randn(1000, requires_grad=True)
    (saved,) = memory.saved_for_backward(lambda: (scores * 1.0)[:10].sin().sum(), [])
    assert saved == memory.SavedStorage("float32[10]", 4000)


def test_saved_bytes_skip_parameters_and_their_views():
    linear = nn.Linear(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    parameters = list(linear.parameters())
    assert memory.saved_for_backward(lambda: linear(x).sum(), [*parameters, x]) == []


@pytest.mark.skipif(memory._status_bytes("VmHWM") is None, reason="needs Linux's /proc")
def test_peak_is_above_the_resting_memory_and_forgets_earlier_peaks():
    torch.ones(64 << 20, dtype=torch.uint8)  # a higher peak before, which must not count

    def step_of_24_mb():
        first = torch.ones(16 << 20, dtype=torch.uint8)
        second = torch.ones(8 << 20, dtype=torch.uint8)
        del first, second

    peak = memory.peak_of(step_of_24_mb, torch.device("cpu"))
    if peak.method.startswith("VmHWM"):
        assert 23 << 20 <= peak.step_bytes <= 28 << 20
    assert peak.peak_bytes >= peak.step_bytes


def test_peak_without_proc_says_how_it_was_read(monkeypatch):
    monkeypatch.setattr(memory, "_status_bytes", lambda field: None)
    peak = memory.peak_of(lambda: None, torch.device("cpu"))
    assert peak.method == "ru_maxrss of the process"
    assert peak.peak_bytes == peak.step_bytes > 10 << 20


# ---- the machine and the floor


def test_meta_names_no_path_and_no_host():
    meta = provenance.meta(torch.device("cpu"), "python -m benchmarks op")
    assert meta["versions"]["torch"] == torch.__version__
    assert meta["threads"] == torch.get_num_threads()
    text = json.dumps(meta)
    assert str(Path.cwd()) not in text and f'"{platform.node()}"' not in text


def test_floor_is_the_frozen_gemms_and_one_pass_over_each_operand():
    case = LinearCase(m=100, k=20, n=30, dtype="bf16")
    flops, x, w, y = 2 * 100 * 20 * 30, 2 * 100 * 20, 2 * 20 * 30, 2 * 100 * 30
    compute_bound = op.floor(case, {"flops_per_second": 1e3, "bytes_per_second": 1e6})
    assert compute_bound["forward"] == pytest.approx(flops / 1e3 + x / 1e6)
    assert compute_bound["backward"] == pytest.approx(flops / 1e3 + (x + y) / 1e6)
    memory_bound = op.floor(case, {"flops_per_second": 1e12, "bytes_per_second": 1e3})
    assert memory_bound["forward"] == pytest.approx((x + w + y + x) / 1e3)
    assert memory_bound["both"] == pytest.approx(memory_bound["forward"] + memory_bound["backward"])


def test_ceilings_of_a_slow_cpu_take_no_minutes(monkeypatch):
    """bf16 without instructions for it: seconds for one product of the larger size."""
    clock, sizes = [0.0], []

    def slow(a, b):
        sizes.append(a.shape[0])
        clock[0] += (a.shape[0] / 768) ** 3

    def now():
        clock[0] += 1e-6
        return clock[0]

    monkeypatch.setattr(ceilings.torch, "mm", slow)
    monkeypatch.setattr(ceilings.time, "perf_counter", now)
    monkeypatch.setattr(ceilings, "last_level_cache_bytes", lambda device: 1)
    limits = ceilings.ceilings.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert sizes == [768] * 3
    assert limits["flops_per_second"] == pytest.approx(2 * 768**3)


def test_ceilings_are_positive(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *sizes, device: torch.ones(64, 64))
    limits = ceilings.ceilings.__wrapped__(torch.device("cpu"), torch.float32)
    assert set(limits) == {"flops_per_second", "bytes_per_second"}
    assert all(value > 0 for value in limits.values())


# ---- cases and providers


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("op", LinearCase(m=3, k=5, n=7, dtype="fp16", dropout=0.25, rank=3, alpha=1.5)),
        ("step", StepCase(dtype="fp32", dropout=0.1, batch=3, length=7, layers=2, kv_heads=1)),
        ("routed", RoutedCase(3, 5, slices=(8, 16), ranks=(2, 3), adapter_dtype="fp32")),
        ("routed", RoutedCase(train=True, base=False)),
    ],
    ids=["op", "step", "routed", "routed training"],
)
def test_a_case_survives_json_and_its_options(kind, case):
    def parsed(*argv):
        return driver.cases_of(kind, driver.make_parser(kind).parse_args([*argv, "--device=cpu"]))

    assert parsed(f"--case={json.dumps(asdict(case))}") == [case]
    options = [
        f"--{name.replace('_', '-')}={driver._text(value)}"
        for name, value in asdict(case).items()
        if value != "" and name != "device"
    ]
    assert parsed(*options) == [case]


SMALL = LinearCase(m=24, k=40, n=56, dtype="fp32", rank=4, alpha=6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", [n for n in op_providers.PROVIDERS if n not in ("frozen", "compile")]
)
def test_every_op_provider_computes_the_formula(name, dtype):
    if name.startswith("peft"):
        pytest.importorskip("peft")
    case = replace(SMALL, dtype=dtype)
    backend = name.split("-")[0]  # triton-fused
    if backend in dispatch.BACKENDS and dispatch.unavailable(backend, torch.device("cpu")):
        pytest.skip("this backend has no kernel here")
    op.hold_to_policy(name, problem_of(case, seed=0), {})


@pytest.mark.parametrize(
    ("what", "broken"),
    [
        ("y: maximum error", lambda *args: naive.naive_linear(*args) * (1 + 1e-3)),
        ("y", lambda *args: naive.naive_linear(*args) * float("nan")),
        ("lora_b: maximum error", lambda x, w, a, b, s, p:
            naive.naive_linear(x, w, a, b.detach(), s, p) + 0 * b.sum()),
    ],
    ids=["scaled", "nan", "no gradient"],
)  # fmt: skip
def test_a_provider_with_a_wrong_result_is_not_timed(what, broken, monkeypatch):
    call = lambda problem: op_providers.by_formula(broken, problem)  # noqa: E731
    monkeypatch.setitem(op_providers.PROVIDERS, "broken", call)
    ops, skipped = op.prepare(SMALL, ["frozen", "broken"])
    assert list(ops) == ["frozen"]
    assert skipped["broken"].startswith(f"not timed, its result is wrong: {what}")


def test_op_saved_bytes_are_those_of_the_formula():
    """Naive without dropout: x and h, and nothing but them."""
    case = LinearCase(m=24, k=40, n=56, dtype="fp32", rank=4)
    timed = op.Op(case, "naive", [problem_of(case, 0)])
    named = {storage.name: storage.bytes for storage in timed.saved()}
    assert named == {"x": 24 * 40 * 4, "h float32[24,4]": 24 * 4 * 4}


def test_ours_saves_less_than_naive_with_dropout():
    case = LinearCase(m=64, k=128, n=64, dtype="bf16", dropout=0.1, rank=4)
    inputs = [problem_of(case, 0)]
    ours = {s.name: s.bytes for s in op.Op(case, "ours", inputs).saved()}
    naive = op.Op(case, "naive", inputs).saved()
    assert ours.pop("x") == 64 * 128 * 2
    # The compiled kernels keep h in fp32; the vendor's product of bf16 comes out rounded.
    assert {"h bfloat16[64,4]": 64 * 4 * 2, "h float32[64,4]": 64 * 4 * 4}.items() & ours.items()
    ours = {name: size for name, size in ours.items() if not name.startswith("h ")}
    # At most a packed mask and scalars; and the factors that composed had to round.
    rounded = (
        0 if dispatch.choose("auto", torch.device("cpu"), torch.bfloat16).backend == "native" else 2
    )
    assert sum(ours.values()) <= 64 * 128 // 8 + 64 + rounded * 4 * (128 + 64)
    assert sum(s.bytes for s in naive) > 2 * 64 * 128 * 2


def test_a_provider_that_fails_is_skipped_with_its_reason(monkeypatch):
    def broken(problem):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(op_providers.PROVIDERS, "broken", broken)
    ops, skipped = op.prepare(LinearCase(m=8, k=8, n=8, dtype="fp32", rank=2), ["frozen", "broken"])
    assert list(ops) == ["frozen"]
    assert skipped == {"broken": "RuntimeError: no such kernel"}


SMALL_STEP = StepCase(
    dtype="fp32", batch=2, length=8, layers=2, hidden=32, heads=4, kv_heads=2,
    intermediate=48, vocab=64, rank=4,
)  # fmt: skip


def test_step_providers_share_weights_and_agree():
    pytest.importorskip("peft")
    case = SMALL_STEP
    base = step.base_model(case)
    made = {
        name: step_providers.PROVIDERS[name](base, case)
        for name in ("frozen", "naive", "peft", "peft-base-dtype", "ours")
    }
    weight = base.model.layers[0].mlp.up_proj.weight
    for provider in made.values():
        pointers = {p.data_ptr() for p in provider.model.parameters()}
        assert weight.data_ptr() in pointers
    assert not any(p.requires_grad for p in made["frozen"].model.parameters())
    trained = [n for n, p in made["ours"].model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    naive_ones = [p for p in made["naive"].model.parameters() if p.requires_grad]
    assert [p.shape for p in naive_ones] == [
        p.shape for p in made["ours"].model.parameters() if p.requires_grad
    ]

    assert made["ours"].fallback_reason() is None
    steps = {name: step.Step(case, provider) for name, provider in made.items()}
    samples = {name: timed.run() for name, timed in steps.items()}
    assert set(samples["frozen"]) == {"forward", "backward", "step"}
    assert set(samples["ours"]) == {"forward", "backward", "step", "optimizer"}
    assert samples["ours"]["step"] == samples["ours"]["forward"] + samples["ours"]["backward"]
    loss = {name: timed.first_loss for name, timed in steps.items()}
    assert loss["ours"] == pytest.approx(loss["peft"], rel=1e-5)
    assert loss["naive"] == pytest.approx(loss["peft"], rel=1e-5)
    assert loss["peft-base-dtype"] == pytest.approx(loss["peft"], rel=1e-5)
    assert abs(loss["frozen"] - loss["peft"]) > 1e-6  # the adapters do something

    dropping = replace(case, dropout=0.1)
    saved = {}
    for name in ("peft", "ours"):
        provider = step_providers.PROVIDERS[name](base, dropping)
        saved[name] = sum(storage.bytes for storage in step.Step(dropping, provider).saved())
    assert saved["ours"] < saved["peft"]


def test_a_step_that_peft_serves_is_not_timed_as_ours(monkeypatch):
    pytest.importorskip("peft")
    accelerate = lora_kernels.accelerate

    def with_a_hook(model):
        layer = model.base_model.model.model.layers[1].mlp.up_proj
        layer.lora_A["default"].register_forward_hook(lambda *args: None)
        return accelerate(model)

    monkeypatch.setattr(lora_kernels, "accelerate", with_a_hook)
    steps, skipped = step.prepare(SMALL_STEP, ["frozen", "ours"])
    assert list(steps) == ["frozen"]
    assert "not timed" in skipped["ours"] and "up_proj is left to PEFT" in skipped["ours"]


def test_frozen_makes_dx_down_to_the_first_layer():
    pytest.importorskip("transformers")
    case = StepCase(
        dtype="fp32", batch=1, length=4, layers=1, hidden=16, heads=2, kv_heads=1,
        intermediate=24, vocab=32,
    )  # fmt: skip
    provider = step_providers.frozen(step.base_model(case), case)
    seen = []

    def watch(module, args, output):
        output.register_hook(seen.append)

    provider.model.get_input_embeddings().register_forward_hook(watch)
    step.Step(case, provider).run()
    assert len(seen) == 1 and seen[0].abs().sum() > 0


def test_missing_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r'pip install "lora_kernels\[bench\]"'):
        op.prepare(SMALL, ["peft"])
