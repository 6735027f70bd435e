"""One bank that is changed beside calls: each has the adapter as it was, or an error."""

import threading
import time

import pytest
import torch

from lora_kernels.ops.routed import AdapterBank, Routing, routed_lora_linear
from lora_kernels.runtime import cpu_extension as native

K, N, TOKENS, SECONDS = 256, 256, 64, 1.5
BACKENDS = ["composed", *([] if native.missing() else ["native"])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trains", [False, True], ids=["", "trains"])
def test_an_adapter_that_comes_and_goes(backend, trains):
    """Narrow one time and wide the next: a table read too early has no room for its rank."""
    generator = torch.Generator().manual_seed(0)
    variants = [
        (torch.randn(rank, K, generator=generator), torch.randn(N, rank, generator=generator))
        for rank in (2, 64)
    ]
    x = torch.randn(TOKENS, K, generator=generator).requires_grad_(trains)
    weight = torch.randn(N, K, generator=generator)
    bank = AdapterBank(K, N)
    bank.add("always", torch.randn(1, K), torch.randn(N, 1), 1.0)

    def result() -> list[torch.Tensor]:
        routing = Routing.from_sequences(["c"], TOKENS, bank)
        y = routed_lora_linear(x, weight, bank, routing, backend=backend)
        return [y.detach(), *(torch.autograd.grad(y.sum(), x) if trains else ())]

    expected = []
    for a, b in variants:
        bank.add("c", a, b, 0.5)
        expected.append(result())
        bank.remove("c")
    stop, served, wrong = time.monotonic() + SECONDS, [0, 0, 0], []

    def serve():
        while time.monotonic() < stop and not wrong:
            try:
                found = result()
            except ValueError as error:  # it is not there, or not any more
                served[2] += 1
                if "names: expected" not in str(error) and "were removed" not in str(error):
                    wrong.append(str(error))
                continue
            same = [all(map(torch.equal, found, each)) for each in expected]
            if not any(same):
                wrong.append("a mixture")
            served[same.index(True) if any(same) else 2] += 1

    def change():
        while time.monotonic() < stop and not wrong:
            for a, b in variants:
                bank.add("c", a, b, 0.5)
                time.sleep(0.0005)
                bank.remove("c")

    threads = [threading.Thread(target=target) for target in (serve, serve, change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert served[0] and served[1], served
