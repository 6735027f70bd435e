"""Random layers, and random models that are routed or accelerated."""

import torch
from random_calls.draw import FP32, Draw
from random_calls.functions import a_routing
from torch import Tensor, nn

from lora_kernels import LoRAEmbedding, LoRALinear, RoutedLoRALinear, accelerate, route


def randomised(draw: Draw, module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(draw.values(*parameter.shape, dtype=parameter.dtype))


def run_module(draw: Draw, layer: nn.Module, x: Tensor, *others) -> None:
    """A layer's forward and backward, and what it says of itself."""
    leaves = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if x.requires_grad:
        leaves["x"] = x
    draw.results |= {f"state {name}": value for name, value in layer.state_dict().items()}
    draw.results["repr"] = repr(layer)
    draw.run(lambda: layer(x, *others), leaves)


def layer_options(draw: Draw) -> dict:
    options = {"use_rslora": draw.chance("rslora", 0.3), "use_dora": draw.chance("dora", 0.3)}
    options["init_lora_weights"] = draw.choose("init", True, False, "gaussian")
    dtype = draw.dtype("dtype")
    adapters = draw.choose("adapter_dtype", None, dtype, FP32)
    return options | {"dtype": dtype, "adapter_dtype": adapters}


def use(draw: Draw, layer: nn.Module, x: Tensor) -> None:
    """With random values, and in one of the states that a layer has."""
    if draw.chance("values", 0.7):
        randomised(draw, layer)
    layer.train(draw.chance("training", 0.7))
    state = draw.choose("state", *["usual"] * 3, "merged", "unmerged", "disabled", "hooked")
    if state in ("merged", "unmerged"):
        layer.merge()
    if state == "unmerged":
        layer.unmerge()
    if state == "hooked":
        layer.base_layer.register_forward_hook(lambda module, inputs, y: y * 2)
    layer.disable_adapters = state == "disabled"
    run_module(draw, layer, x)


def lora_layer_call(draw: Draw) -> None:
    options = layer_options(draw)
    k, n, r = draw.size("K"), draw.size("N"), draw.rank("R")
    plain = not options["use_dora"] and options["init_lora_weights"] != "gaussian"
    options |= {"lora_bias": plain and draw.chance("lora_bias", 0.6)}
    options |= {"bias": draw.chance("bias", 0.5), "dropout_p": draw.choose("p", 0.0, 0.0, 0.1)}
    torch.manual_seed(draw.number)
    layer = LoRALinear(k, n, r, draw.choose("alpha", 8, 3.5), **options)
    trains = draw.chance("dx", 0.6)
    use(draw, layer, draw.tensor("x", *draw.leading(), k, dtype=options["dtype"], trains=trains))


def embedding_call(draw: Draw) -> None:
    options, n, d = layer_options(draw), draw.size("N"), draw.size("D")
    options["padding_idx"] = draw.choose("padding_idx", None, 0)
    torch.manual_seed(draw.number)
    layer = LoRAEmbedding(n, d, draw.rank("R"), 8, **options)
    use(draw, layer, torch.randint(0, n, draw.leading(), generator=draw.generator))


def routed_layer_call(draw: Draw) -> None:
    torch.manual_seed(draw.number)
    dtype, k, n = draw.dtype("dtype"), draw.size("K"), draw.size("N")
    layer = RoutedLoRALinear(k, n, bias=draw.chance("bias", 0.5), dtype=dtype)
    if draw.chance("hooked", 0.2):
        layer.base_layer.register_forward_hook(lambda module, inputs, y: y * 2)
    for index in range(3):
        r = draw.rank(f"R_{index}")
        layer.bank.add(f"n{index}", draw.values(r, k), draw.values(n, r), 0.5, 0.1 * (index == 1))
    leading = draw.leading()
    routing, _, rows = a_routing(draw, layer.bank, torch.Size(leading).numel())
    trains = draw.chance("dx", 0.6)
    run_module(draw, layer, draw.tensor("x", rows, k, dtype=dtype, trains=trains), routing)


def routed_model_call(draw: Draw) -> None:
    torch.manual_seed(draw.number)
    k = draw.size("K")
    model = nn.Sequential(nn.Linear(k, 16), nn.Tanh(), nn.Linear(16, 7))
    routed = route(model)
    for index in range(3):
        targets = draw.choose(f"targets {index}", ["0"], ["2"], ["0", "2"])
        routed.add(
            f"n{index}", rank=index + 1, alpha=2, target_modules=targets, init_lora_weights=False
        )
    names = [draw.random.choice(["__base__", *routed.names]) for _ in range(4)]
    x = draw.tensor("x", 4, 3, k, dtype=FP32, trains=draw.chance("dx", 0.6))

    def call():
        with routed.adapters(names):
            return model(x)

    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    draw.run(call, leaves | ({"x": x} if x.requires_grad else {}))


def peft_call(draw: Draw) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(draw.number)
    dtype, k, n = draw.dtype("dtype"), draw.size("K"), draw.size("N")
    model = nn.ModuleDict({"q": nn.Linear(k, n, bias=draw.chance("bias", 0.5), dtype=dtype)})

    def config(suffix: str) -> LoraConfig:
        return LoraConfig(
            r=draw.rank(f"R{suffix}"), lora_alpha=7, target_modules=["q"], init_lora_weights=False,
            lora_dropout=draw.choose(f"p{suffix}", 0.0, 0.0, 0.1),
            use_dora=draw.chance(f"dora{suffix}", 0.35),
        )  # fmt: skip

    cast = draw.chance("fp32 adapters", 0.3)
    model = get_peft_model(model, config(""), autocast_adapter_dtype=cast)
    layer = model.base_model.model["q"]
    if draw.chance("two adapters", 0.3):
        model.add_adapter("other", config(" of other"))
        model.base_model.set_adapter(["default", "other"])
    draw.results["report"] = str(accelerate(model))
    model.train(draw.chance("training", 0.6))
    if draw.chance("merged", 0.1):
        layer.merge()
    x = draw.tensor("x", 4, 3, k, dtype=dtype, trains=draw.chance("dx", 0.6))
    names = {}
    if not model.training and draw.chance("adapter_names", 0.5):
        available = ["__base__", *layer.lora_A]
        names["adapter_names"] = [draw.random.choice(available) for _ in range(4)]
    leaves = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    draw.run(lambda: layer(x, **names), leaves)
