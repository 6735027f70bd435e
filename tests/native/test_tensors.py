"""What the extension makes of torch's tensors: read through torch's table and without it alike."""

from unittest import mock

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.runtime import cpu_extension as native

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
M, K, N, R = 5, 24, 16, 3


@pytest.fixture(params=["table", "properties"])
def extension(request):
    extension = native.extension()
    has_table = extension.ignore_table(request.param == "properties")
    if request.param == "table" and not has_table:
        pytest.skip("this torch has no table")
    yield extension
    extension.ignore_table(False)


def test_torch_has_a_table():
    """Without it every call is slower, and nothing else would say so."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert native.extension().ignore_table(False) or version < (2, 11)


def run(extension, x, a, b, y, dy, dx, h, grad_a, grad_b) -> list:
    """Both walks; whether each was run."""
    return [
        extension.adapter_forward(y, x, a, b, h, None, 1.0, 0.5, 0, 0, 0, 0, True, 1),
        extension.adapter_backward(dx, grad_a, grad_b, dy, x, a, b, h, None, 1.0, 0.5, True, 1),
    ]


def operands(dtype=F32) -> dict:
    return {
        "x": torch.randn(M, K).to(dtype), "a": torch.randn(R, K), "b": torch.randn(N, R),
        "y": torch.randn(M, N).to(dtype), "dy": torch.randn(M, N).to(dtype),
        "dx": torch.randn(M, K).to(dtype), "h": torch.zeros(M, R), "grad_a": torch.zeros(R, K),
        "grad_b": torch.zeros(N, R),
    }  # fmt: skip


def laid_out(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides and another offset, beside NaN."""
    if how == "as it is":
        return tensor.clone()
    if how == "in three dimensions":
        return tensor.clone().view(1, *tensor.shape)
    first, second = tensor.shape
    if how == "turned":
        out = torch.full((second + 2, first + 3), torch.nan).to(tensor.dtype).t()
        out = out[1 : first + 1, 2 : second + 2]
    else:
        out = torch.full((first, second + 7), torch.nan).to(tensor.dtype)[:, 3 : second + 3]
    return out.copy_(tensor)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strides_and_offsets(extension, dtype):
    given_ = operands(dtype)
    expected = {name: tensor.clone() for name, tensor in given_.items()}
    assert run(extension, **expected) == [True, True]
    for how, names in {
        "padded": list(given_),
        "in three dimensions": ["x", "y", "dy", "dx"],
        "turned": ["a", "b", "grad_a", "grad_b"],
    }.items():
        ours = {
            name: laid_out(tensor, how if name in names else "as it is")
            for name, tensor in given_.items()
        }
        assert run(extension, **ours) == [True, True], how
        for name, tensor in ours.items():
            assert torch.equal(tensor.reshape(expected[name].shape), expected[name]), (how, name)


@pytest.mark.parametrize("name", operands())
def test_what_cannot_be_read_is_refused_and_left_alone(extension, name):
    """A size, a dtype or a layout that does not fit: nothing is written."""
    ordinary = operands()
    tensor = ordinary[name]
    wrong = [tensor[1:], tensor[:, 1:], tensor.double(), tensor.int(), tensor[0], None, 3]
    wrong += [torch.empty_like(tensor, device="meta"), tensor.view(1, *tensor.shape)[:, :, ::2]]
    if name in ("x", "y", "dy", "dx", "h"):
        wrong += [tensor.bfloat16(), torch.randn(tensor.shape[::-1]).t()]
    else:
        wrong.append(torch.randn(2 * tensor.shape[0], 2 * tensor.shape[1])[::2, ::2])
    before = {key: value.clone() for key, value in ordinary.items()}
    forward = ("x", "a", "b", "y", "h")
    for other in wrong:
        if other is None and name in ("dx", "grad_a", "grad_b"):
            continue  # then it is not computed
        ran = run(extension, **(ordinary | {name: other}))
        kept_nowhere = name == "h" and other is None  # served, without an h
        assert ran[0] == kept_nowhere or name not in forward, other
        assert not ran[1] or name == "y", other
        for key, value in ordinary.items():
            unchanged = torch.equal(value, before[key])
            assert unchanged or (ran[0] and key in ("y", "h")) or (ran[1] and key[:2] in "dxgr")
        for key, value in ordinary.items():
            value.copy_(before[key])


KINDS = {
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "for MKL-DNN": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "on meta": lambda t: t.to("meta"),
    "of whole numbers": lambda t: torch.ones(t.shape, dtype=torch.int32),
    "of bytes": lambda t: torch.ones(t.shape, dtype=torch.uint8),
    "complex": lambda t: torch.ones(t.shape, dtype=torch.complex64),
    "of fp64": lambda t: t.double(),
    "0-d": lambda t: t[0, 0],
    "of another rank": lambda t: t.repeat(2, 2),
    "a lazy zero": lambda t: torch._efficientzerotensor(t.shape),
    "freed": lambda t: freed(t),
    "freed behind an offset": lambda t: freed(torch.cat([torch.zeros(1000), t.flatten()])[1000:]),
    "no tensor": lambda t: t.tolist(),
    "numpy's": lambda t: t.numpy(),
    "a number": lambda t: 3,
    "masked": lambda t: torch.masked.masked_tensor(t, t > 0),
    "of a gradient's transform": lambda t: outlived(torch.func.grad, t),
    "of vmap": lambda t: outlived(torch.func.vmap, t[None]),
    "of functionalize": lambda t: outlived(torch.func.functionalize, t),
    "fake": lambda t: torch._subclasses.FakeTensorMode().from_tensor(t),
    "what only claims to be one": lambda t: mock.Mock(spec=torch.Tensor),
}


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.view(tensor.shape) if tensor._is_view() else tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def outlived(transform, tensor: torch.Tensor) -> torch.Tensor:
    """What a transform wraps has no memory of its own, during the transform and after it."""
    kept = []
    transform(lambda t: kept.append(t) or t.sum())(tensor)
    return kept[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", operands())
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_dense_memory_is_refused_and_the_rest_left_alone(extension, kind, name):
    ordinary = operands()
    other = KINDS[kind](ordinary[name].clone())
    before = {key: value.clone() for key, value in ordinary.items()}
    ran = run(extension, **(ordinary | {name: other}))
    # The forward takes no gradients, and the backward no y.
    assert ran == [name not in ("x", "a", "b", "y", "h"), name == "y"]
    written = ("y", "h") if ran[0] else ("dx", "grad_a", "grad_b")
    for key, value in ordinary.items():
        assert key in written or torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["x", "a", "b", "y", "dy", "dx"])
def test_what_is_refused_while_a_transform_runs(extension, name):
    ordinary, ran = operands(), []

    def during(tensor):
        ran.append(run(extension, **(ordinary | {name: tensor})))
        return tensor.sum()

    torch.func.grad(during)(ordinary[name])
    assert ran == [[name in ("dy", "dx"), name == "y"]]


def negated(*shape: int) -> torch.Tensor:
    """A tensor whose minus torch has not computed yet."""
    tensor = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert tensor.is_neg()
    return tensor


@pytest.mark.parametrize(
    "rows, columns, out_columns, rank", [(5, 8, 6, 1), (5, 1, 6, 2), (1, 1, 1, 1), (4, 9, 1, 3)]
)
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_lazily_negated_operands(name, rows, columns, out_columns, rank):
    """Their strides are all even; of dimensions of one element that says nothing about the layout,
    so that they could be taken for dense ones."""
    shapes = {
        "x": (rows, columns), "weight": (out_columns, columns), "lora_a": (rank, columns),
        "lora_b": (out_columns, rank), "bias": (out_columns,),
    }  # fmt: skip
    given_ = {key: torch.randn(shape) for key, shape in shapes.items()}
    given_[name] = negated(*shapes[name])
    results = []
    for resolve in (False, True):
        leaves = {key: t.resolve_neg() if resolve else t.detach() for key, t in given_.items()}
        for key in ("x", "lora_a", "lora_b", "bias"):
            leaves[key].requires_grad_()
        y = lora_linear(**leaves, scaling=0.5)
        wanted = [t for t in leaves.values() if t.requires_grad]
        results.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def gapped(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with another element between any two, as a hook on saved tensors may give it back."""
    shape = [2 * size for size in tensor.shape]
    between = torch.full(shape, 77, dtype=tensor.dtype)[tuple(slice(None, None, 2) for _ in shape)]
    return between.copy_(tensor.detach())


def test_saved_tensors_that_a_hook_has_copied_with_gaps():
    x, a, b = (torch.randn(size, requires_grad=True) for size in ((9, K), (R, K), (N, R)))
    weight, dy = torch.randn(N, K), torch.randn(9, N)
    grads = []
    for unpack in (lambda tensor: tensor, gapped):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            y = lora_linear(x, weight, a, b, 0.5, dropout_p=0.4, seed=torch.tensor(3))
        grads.append(torch.autograd.grad(y, (x, a, b), dy))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)  # the vendor's product may take another way


def test_a_class_derived_from_tensor(extension):
    """It may dispatch in its own way, so the plan's key tells its class; its memory is read when
    torch hands it on."""

    class Derived(torch.Tensor):
        pass

    derived = {name: tensor.as_subclass(Derived) for name, tensor in operands().items()}
    assert run(extension, **derived) == [True, True] and derived["grad_a"].any()


def test_a_mask_that_does_not_fit(extension):
    o = operands()
    for mask in (torch.zeros(M, 4, dtype=torch.uint8), torch.zeros(M, 3), torch.zeros(3, M).t()):
        assert not extension.adapter_forward(
            o["y"], o["x"], o["a"], o["b"], o["h"], mask, 1.0, 1.0, 0, 4, 7, 9, True, 1
        )
    assert not o["h"].any()


def test_what_no_conversion_makes_readable_is_named():
    x, a, b, y = torch.randn(4, K), torch.randn(R, K), torch.randn(N, R), torch.zeros(5, N)
    h, _ = native.allocate_saved(x, R, None)
    with pytest.raises(RuntimeError, match=r"cannot read .* y torch.float32 \[5, 16\]"):
        native.adapter_forward(y, x, a, b, h, None, 1.0, None, add=True)
    with pytest.raises(RuntimeError, match=r"cannot read .* dx torch.float32 \[5, 16\]"):
        native.adapter_backward(y, None, None, y[:4], x, a, b, h, None, 1.0, None, add=True)


def test_gradients_of_a_dtype_that_the_kernels_do_not_write():
    """fp64 factors, whose gradients are fp64, and a layout without a unit stride."""
    o = operands()
    expected = {name: tensor.clone() for name, tensor in o.items()}
    assert run(native.extension(), **expected)[1]
    strided = torch.zeros(2 * N, 2 * R, dtype=F64)[::2, ::2]
    doubles = torch.zeros(R, K, dtype=F64), strided
    native.adapter_backward(
        o["dx"], *doubles, o["dy"], o["x"], o["a"].double(), o["b"].double(), expected["h"], None,
        0.5, None, add=True,
    )  # fmt: skip
    assert torch.equal(doubles[0], 0.5 * expected["grad_a"].double())
    assert torch.equal(doubles[1], expected["grad_b"].double())
