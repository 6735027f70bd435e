"""What the extension makes of torch's tensors: read through torch's table and without it alike."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import lora_linear
from lora_kernels.ops.linear import fits
from lora_kernels.runtime import cpu_extension as native

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
M, K, N, R = 5, 24, 16, 3


@pytest.fixture(params=["table", "properties"])
def extension(request):
    extension = native.extension()
    has_table = extension.ignore_table(request.param == "properties")
    if request.param == "table" and not has_table:
        pytest.skip("this torch has no table")
    yield extension
    extension.ignore_table(False)


def call(dtype=BF16, factors=F32) -> dict:
    return {
        "x": torch.randn(2, M, K).to(dtype),
        "weight": torch.randn(N, K).to(dtype),
        "a": torch.nn.Parameter(torch.randn(R, K).to(factors)),
        "b": torch.nn.Parameter(torch.randn(N, R).to(factors)),
        "bias": torch.randn(N).to(dtype),
    }


def test_torch_has_a_table():
    """Without it every call is slower, and nothing else would say so."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert native.extension().ignore_table(False) or version < (2, 11)


@pytest.mark.parametrize("factors", [F32, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_ordinary_calls_fit(extension, dtype, factors):
    ordinary = call(dtype, factors)
    assert extension.fits(*ordinary.values())
    for change in (
        {"bias": None},
        {"weight": None},
        {"x": ordinary["x"][0, 0]},
        {"x": ordinary["x"][:, :0]},
        {"x": torch.randn(K, 4).to(dtype).t()},
        {"weight": torch.randn(K, N).to(dtype).t()},
        {"a": torch.randn(2 * R, K)[::2]},
    ):
        assert extension.fits(*(ordinary | change).values()), list(change)


UNFIT = {
    "x of fp64": lambda: {"x": torch.randn(M, K, dtype=F64)},
    "x of another dtype": lambda: {"x": torch.randn(M, K)},
    "x 0-d": lambda: {"x": torch.tensor(1.0, dtype=BF16)},
    "x too narrow": lambda: {"x": torch.randn(M, K - 1).to(BF16)},
    "x on meta": lambda: {"x": torch.empty(M, K, dtype=BF16, device="meta")},
    "x sparse": lambda: {"x": torch.randn(M, K).to(BF16).to_sparse()},
    "x compressed": lambda: {"x": torch.randn(M, K).to(BF16).to_sparse_csr()},
    "x for MKL-DNN": lambda: {"x": torch.randn(M, K).to(BF16).to_mkldnn()},
    "x nested": lambda: {"x": torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)])},
    "x jagged": lambda: {
        "x": torch.nested.nested_tensor([torch.randn(2, K)], layout=torch.jagged, dtype=BF16)
    },
    "x of whole numbers": lambda: {"x": torch.ones(M, K, dtype=torch.int32)},
    "x complex": lambda: {"x": torch.ones(M, K, dtype=torch.complex64)},
    "x a lazy zero": lambda: {"x": torch._efficientzerotensor((M, K), dtype=BF16)},
    "x no tensor": lambda: {"x": [[1.0] * K]},
    "x None": lambda: {"x": None},
    "x a masked tensor": lambda: {
        "x": torch.masked.masked_tensor(torch.ones(M, K), torch.ones(M, K) > 0)
    },
    "weight turned": lambda: {"weight": torch.randn(K, N).to(BF16)},
    "weight of another dtype": lambda: {"weight": torch.randn(N, K)},
    "weight of 3 dimensions": lambda: {"weight": torch.randn(1, N, K).to(BF16)},
    "bias too long": lambda: {"bias": torch.randn(N + 1).to(BF16)},
    "bias of another dtype": lambda: {"bias": torch.randn(N)},
    "bias of 2 dimensions": lambda: {"bias": torch.randn(1, N).to(BF16)},
    "a of fp64": lambda: {"a": torch.randn(R, K, dtype=F64)},
    "a of another rank": lambda: {"a": torch.randn(R + 1, K)},
    "a of no rank": lambda: {"a": torch.randn(0, K), "b": torch.randn(N, 0)},
    "a None": lambda: {"a": None},
    "b of no rows": lambda: {"b": torch.randn(0, R)},
    "b of bytes": lambda: {"b": torch.ones(N, R, dtype=torch.uint8)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNFIT)
def test_other_calls_do_not_fit(extension, case):
    assert not extension.fits(*(call() | UNFIT[case]()).values())


@pytest.mark.parametrize("name", ["x", "weight", "a", "b", "bias"])
def test_wrapped_tensors_do_not_fit(extension, name):
    """What a transform wraps has no memory of its own, during the transform and after it."""
    ordinary, kept = call(), []

    def during(tensor):
        kept.append(tensor)
        return tensor.sum()

    for transform in (torch.func.grad, torch.func.vmap, torch.func.functionalize):
        batch = ordinary[name].detach().float().unsqueeze(0)
        transform(lambda t: during(t))(batch if transform is torch.func.vmap else batch[0])
        assert not extension.fits(*(ordinary | {name: kept[-1]}).values()), transform
    fake = torch._subclasses.FakeTensorMode().from_tensor(ordinary[name].detach())
    assert not extension.fits(*(ordinary | {name: fake}).values())


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_fits_agrees_with_the_other_of_python(data):
    """Over shapes, dtypes and absences; what the extension alone refuses is fp64."""
    dtypes = st.sampled_from([BF16, BF16, F32, F64])
    size = st.sampled_from([1, 1, 2])
    rank, columns, rows = data.draw(size), data.draw(size), data.draw(size)
    shapes = {
        "x": st.sampled_from([(columns,), (4, columns), (2, 0, columns), (columns, 2)]),
        "weight": st.sampled_from([None, (rows, columns), (rows, columns), (2, 1)]),
        "a": st.sampled_from([(rank, columns), (rank, columns), (2, 1), (1,), (0, columns)]),
        "b": st.sampled_from([(rows, rank), (rows, rank), (1, 2)]),
        "bias": st.sampled_from([None, (rows,), (2,)]),
    }
    tensors = {}
    for name, choices in shapes.items():
        shape = data.draw(choices)
        tensors[name] = None if shape is None else torch.ones(shape, dtype=data.draw(dtypes))
    x, weight, a, b, bias = tensors.values()
    ours = native.extension().fits(*tensors.values())
    theirs = fits(x, weight, a, b, 1.0, bias, None, 0.0, None)
    native.extension().ignore_table(True)
    assert native.extension().fits(*tensors.values()) == ours
    native.extension().ignore_table(False)
    doubles = any(t is not None and t.dtype == F64 for t in tensors.values())
    assert ours == (theirs and not doubles)


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
        assert not ran[0] or name not in forward, other
        assert not ran[1] or name == "y", other
        for key, value in ordinary.items():
            unchanged = torch.equal(value, before[key])
            assert unchanged or (ran[0] and key in ("y", "h")) or (ran[1] and key[:2] in "dxgr")
        for key, value in ordinary.items():
            value.copy_(before[key])


def test_what_only_claims_to_be_a_tensor(extension):
    claims = mock.Mock(spec=torch.Tensor)
    assert not extension.fits(*(call() | {"x": claims}).values())
    assert run(extension, **(operands() | {"a": claims})) == [False, False]


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
    """It may dispatch in its own way, so the call has to be made through torch; its memory is read
    when torch hands it on."""

    class Derived(torch.Tensor):
        pass

    for name, tensor in call().items():
        assert not extension.fits(*(call() | {name: tensor.detach().as_subclass(Derived)}).values())
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
    h, _ = native.kept_by_forward(x, R, 0.0)
    with pytest.raises(RuntimeError, match=r"cannot read .* y torch.float32 \[5, 16\]"):
        native.adapter_forward(y, x, a, b, h, None, 1.0, 0.0, None, add=True)
    with pytest.raises(RuntimeError, match=r"cannot read .* dx torch.float32 \[5, 16\]"):
        native.adapter_backward(y, None, None, y[:4], x, a, b, h, None, 1.0, 0.0, add=True)


def test_gradients_of_a_dtype_that_the_kernels_do_not_write():
    """fp64 factors, whose gradients are fp64, and a layout without a unit stride."""
    o = operands()
    expected = {name: tensor.clone() for name, tensor in o.items()}
    assert run(native.extension(), **expected)[1]
    strided = torch.zeros(2 * N, 2 * R, dtype=F64)[::2, ::2]
    doubles = torch.zeros(R, K, dtype=F64), strided
    native.adapter_backward(
        o["dx"], *doubles, o["dy"], o["x"], o["a"].double(), o["b"].double(), expected["h"], None,
        0.5, 0.0, add=True,
    )  # fmt: skip
    assert torch.equal(doubles[0], 0.5 * expected["grad_a"].double())
    assert torch.equal(doubles[1], expected["grad_b"].double())
