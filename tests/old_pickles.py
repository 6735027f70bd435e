"""Pickled objects of an older lora_kernels, for tests/test_old_paths.py.

    PYTHONPATH=OLD_TREE python tests/old_pickles.py tests/old_pickles_0.1.0.tar.xz

writes ``<name>.pickle`` and ``<name>.pt`` (torch.save) of an object, what it is called with, and
what that gave.
"""

import io
import pickle
import sys
import tarfile
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels import (
    AdapterBank,
    LoRAEmbedding,
    LoRALinear,
    RoutedLoRALinear,
    Routing,
    accelerate,
    route,
    routed_lora,
)


def _drawn(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def linear(**options):
    return _drawn(LoRALinear(6, 5, rank=2, alpha=3, **options)), (torch.randn(3, 6),)


def merged():
    layer, arguments = linear()
    layer.merge()
    return layer, arguments


def embedding():
    return _drawn(LoRAEmbedding(7, 4, rank=2, alpha=3)), (torch.tensor([[0, 6], [3, 3]]),)


def _fill(bank: AdapterBank) -> None:
    for name, rank, scaling in (("a", 2, 0.5), ("b.c", 3, 2.0), ("gone", 1, 1.0)):
        bank.add(name, torch.randn(rank, 6), torch.randn(5, rank), scaling)
    bank.remove("gone")


def routed_linear():
    layer = RoutedLoRALinear(6, 5)
    _drawn(layer.base_layer)
    _fill(layer.bank)
    routing = Routing.from_sequences(["b.c", "__base__", "a"], 2, layer.bank)
    return (layer, routing), (torch.randn(6, 6),)


def bank():
    made = AdapterBank(6, 5)
    _fill(made)
    routing = Routing.from_weighted([[1, 0], [-1, 1]], [[0.5, 1.5], [1.0, 2.0]], made)
    return (made, routing), (torch.randn(2, 6),)


def reserved_bank():
    (made, routing), arguments = bank()
    made.reserve(rank_capacity=8, max_rank=4)
    return (made, routing), arguments


def routed_model():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    routed = route(model)
    for name, targets in (("a", ["0", "2"]), ("b", ["2"])):
        routed.add(name, rank=2, alpha=3, target_modules=targets, init_lora_weights=False)
    return model, (torch.randn(3, 6),)


def peft_layer():
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q"], init_lora_weights=False)
    model = peft.get_peft_model(nn.ModuleDict({"q": nn.Linear(6, 5)}), config)
    accelerate(model)
    return model.base_model.model["q"], (torch.randn(3, 6),)


MADE = {
    "linear": linear,
    "linear_dora": lambda: linear(use_dora=True),
    "linear_merged": merged,
    "embedding": embedding,
    "routed_linear": routed_linear,
    "bank": bank,
    "reserved_bank": reserved_bank,
    "routed_model": routed_model,
    "peft_layer": peft_layer,
}


def call(made, arguments: tuple[Tensor, ...]) -> Tensor:
    if isinstance(made, nn.Sequential):
        with route(made).adapters(["a", "__base__", "b"]):
            return made(*arguments)
    if not isinstance(made, tuple):
        return made(*arguments)
    module, routing = made
    if isinstance(module, AdapterBank):
        return routed_lora(*arguments, module, routing)
    return module(*arguments, routing)


def main(path: Path) -> None:
    with tarfile.open(path, "w:xz") as archive:
        for name, make in MADE.items():
            torch.manual_seed(0)
            made, arguments = make()
            with torch.no_grad():
                kept = made, arguments, call(made, arguments)
            saved = io.BytesIO()
            torch.save(kept, saved)
            for ending, content in (("pickle", pickle.dumps(kept)), ("pt", saved.getvalue())):
                entry = tarfile.TarInfo(f"{name}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
