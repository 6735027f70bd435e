"""``LoRALinear``: a frozen ``torch.nn.Linear`` with a LoRA or DoRA adapter."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.adapters.initial_values import draw_lora_a_, draw_lora_b_, draw_lora_bias_
from lora_kernels.base_weights import DenseWeight
from lora_kernels.nn.adapter_layer import AdapterLayer
from lora_kernels.nn.base_call import (
    GLOBAL_HOOKS,
    bypassed,
    called,
    check_factor,
    is_plain_linear,
    parameter_of,
)
from lora_kernels.nn.base_parameters import base_parameter, resize
from lora_kernels.nn.checks import (
    LoRAOptions,
    adapter_dtype_over,
    check_adapter,
    check_base_layer,
    check_linear,
)
from lora_kernels.nn.part_reset import PartReset
from lora_kernels.nn.sharded import draw, whole
from lora_kernels.nn.weight_reads import note_call
from lora_kernels.ops.linear import adapted_linear
from lora_kernels.runtime.checks import check_count, check_dropout_p

_PARAMETER_OR_NONE = (nn.Parameter, type(None))


class LoRALinear(AdapterLayer):
    """A frozen linear layer and a trainable adapter of rank r in one operation.

    .. math::
        y = x W^T + b + s \\cdot D(x) A^T B^T

    x is ``[..., in_features]``, W ``[out_features, in_features]``, A ``[r, in_features]``,
    B ``[out_features, r]``, ``s = alpha / r`` (``alpha / sqrt(r)`` with rsLoRA), D dropout in
    training. With DoRA every output is scaled by ``m / ||W + s B A||``, m trainable and the norm
    treated as a constant; under active dropout the norm's factor meets ``D(x)`` as in PEFT.

    Parameters have PEFT's names and initial values: ``base_layer.weight`` and ``base_layer.bias``
    (frozen), ``lora_A.weight``, ``lora_B.weight``, ``lora_B.bias`` with ``lora_bias`` and
    ``lora_magnitude_vector`` with DoRA. A state dict loads into PEFT's layer of the same shape (see
    :meth:`peft_state_dict`) and PEFT's into this one.

    Where ``base_layer`` computes more than ``x W^T + b`` from plain parameters (hooks, a forward
    of its own, a weight that is quantised or parametrized), which every call looks at, it is called
    and the adapter's part added to its result.

    Args:
        in_features: K.
        out_features: N.
        rank: r, at least 1; it may exceed K and N.
        alpha: numerator of the scaling.
        bias: whether the base layer has a bias.
        dropout_p: probability in [0, 1) with which an element of the adapter's input is dropped.
        use_rslora: scale by ``alpha / sqrt(rank)``.
        lora_bias: give B a bias, which contributes ``s * bias``.
        use_dora: learn the magnitude of the adapted weight's rows; not together with lora_bias.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with standard
            deviation 1/rank, B zero), or False (both random, so that the layer is changed).
        device: where the layer is made; on "meta" no data is touched.
        dtype: of the base layer.
        adapter_dtype: of the adapter; None is fp32 over a half-precision base, else the base's.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and why.
    """

    base_layer: nn.Linear
    _shown = ("in_features", "out_features", "rank", "alpha")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check_count(name, size)
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        options = LoRAOptions(rank, alpha, use_rslora, use_dora, init_lora_weights, adapter_dtype)
        self._wrap(linear, options, dropout_p, lora_bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 16,
        alpha: float = 32,
        *,
        dropout_p: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRALinear":
        """Wrap an existing linear layer: its parameters are shared, not copied, and frozen.

        Arguments are those of the constructor. ``base_layer`` is a shallow copy of ``linear``, with
        the forward of its class and its hooks; ``linear`` itself is never merged into.

        Raises:
            TypeError: linear is no ``torch.nn.Linear`` over plain parameters.
            ValueError: its forward was replaced on the instance.
        """
        check_linear(linear)
        check_base_layer("linear", linear)
        layer = cls.__new__(cls)
        options = LoRAOptions(rank, alpha, use_rslora, use_dora, init_lora_weights, adapter_dtype)
        layer._wrap(linear, options, dropout_p, lora_bias)
        return layer

    def _wrap(
        self, linear: nn.Linear, options: LoRAOptions, dropout_p: float, lora_bias: bool
    ) -> None:
        check_adapter(options)
        check_dropout_p(dropout_p)
        if lora_bias and options.use_dora:
            raise ValueError("lora_bias: not defined together with use_dora=True")
        if lora_bias and options.init_lora_weights == "gaussian":
            raise ValueError(
                "lora_bias: expected init_lora_weights=True or False with it, got 'gaussian'"
            )
        dtype = adapter_dtype_over(linear.weight, options.adapter_dtype)
        super().__init__(linear, options)
        self.in_features, self._out_features = linear.in_features, linear.out_features
        self.dropout_p = dropout_p
        made = {"device": linear.weight.device, "dtype": dtype}
        self.lora_A = nn.Linear(self.in_features, self.rank, bias=False, **made)
        self.lora_B = nn.Linear(self.rank, self.out_features, bias=lora_bias, **made)
        for factor in (self.lora_A, self.lora_B):
            factor.reset_parameters = PartReset(self, factor)
            # Not by transformers, which would draw B at random.
            vars(factor)["_is_hf_initialized"] = True
        magnitude = nn.Parameter(torch.empty(self.out_features, **made)) if self.use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.reset_parameters()

    bias = base_parameter("bias")

    @property
    def out_features(self) -> int:
        """N. Set it where the base weight has been resized: new rows of B are zero.

        ``resize_token_embeddings`` of transformers 5.6 and newer does so for a tied head.

        Raises:
            ValueError: the base weight has another number of rows.
            RuntimeError: the layer is merged.
        """
        return self._out_features

    @out_features.setter
    def out_features(self, value: int) -> None:
        if value != self._out_features:
            self._check_resizable("out_features", value)
            self._resize(value)

    @torch.no_grad()
    def _resize(self, out_features: int) -> None:
        known = min(self.out_features, out_features)
        for parameter in self.lora_B.parameters():
            resize(parameter, 0, out_features)
        if (magnitude := self.lora_magnitude_vector) is not None:
            resize(magnitude, 0, out_features)
            magnitude[known:] = self._weight_norm()[known:]
        self.base_layer.out_features = self.lora_B.out_features = out_features
        self._out_features = out_features

    def _draw(self, name: str, init_lora_weights: bool | str) -> None:
        if name == "lora_A.weight":
            draw(self.lora_A.weight, lambda values: draw_lora_a_(values, init_lora_weights))
        elif name == "lora_B.weight":
            draw(self.lora_B.weight, lambda values: draw_lora_b_(values, init_lora_weights))
        elif name == "lora_B.bias":
            draw(
                self.lora_B.bias,
                lambda values: draw_lora_bias_(values, self.rank, init_lora_weights),
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype, or autocast's.

        Raises:
            ValueError: lora_A or lora_B has hooks or a forward of its own. They are not called;
                the layer itself and ``base_layer`` may have any.
        """
        if self._merge is not None and not self.disable_adapters:
            # Who reads the weight passes nothing by. Past Module.__getattr__, which takes as long.
            return self._modules["base_layer"](x)  # pyright: ignore[reportOptionalCall]
        note_call(self)
        if self.disable_adapters:
            return self._base_alone(x)
        parts = self._modules
        base_layer, lora_a, lora_b = parts["base_layer"], parts["lora_A"], parts["lora_B"]
        dropout_p = self.dropout_p if self.training else 0.0
        if (
            type(base_layer) is not nn.Linear
            or type(lora_a) is not nn.Linear
            or type(lora_b) is not nn.Linear
            or type(base_layer._parameters.get("weight")) is not nn.Parameter
            or type(base_layer._parameters.get("bias")) not in _PARAMETER_OR_NONE
            or bypassed(base_layer, lora_a, lora_b)
            or any(GLOBAL_HOOKS)
        ):
            base_layer, lora_a, lora_b = self.base_layer, self.lora_A, self.lora_B
            check_factor("lora_A", lora_a)
            check_factor("lora_B", lora_b)
            if not is_plain_linear(base_layer):
                return self._with_called_base(x, dropout_p)
        of_base, of_a, of_b = base_layer._parameters, lora_a._parameters, lora_b._parameters
        weight, a, b = of_base.get("weight"), of_a.get("weight"), of_b.get("weight")
        if weight is None or a is None or b is None:
            # FSDP and DataParallel put plain tensors where parameters were.
            weight, a, b = base_layer.weight, lora_a.weight, lora_b.weight
        bias = of_base.get("bias") if of_b.get("bias") is None else None
        if bias is None:
            bias = self._total_bias(base_layer, lora_b)
        base, factors = DenseWeight(weight), LoRAFactors(a, b, self._scaling)
        if not self.use_dora:
            return adapted_linear(x, base, factors, bias, dropout_p)
        factors = factors._replace(output_scale=self._output_scale())
        if dropout_p == 0:
            return adapted_linear(x, base, factors, bias)
        # PEFT's y = x W' + b + (c - 1) D(x) W' + c s D(x) A' B' with the terms in D(x) joined.
        dropped = F.dropout(x, dropout_p)
        return adapted_linear(dropped, base, factors, bias) + base.matmul(x - dropped)

    def _with_called_base(self, x: Tensor, dropout_p: float) -> Tensor:
        """The adapter's part on top of ``y = base_layer(x)``, whatever that does.

        With DoRA ``y + (c - 1) f(D(x)) + c s D(x) A' B'``, f the base layer without its bias.
        """
        c = self._output_scale()
        y = called(self.base_layer, x, self.out_features)
        factors = LoRAFactors(self.lora_A.weight, self.lora_B.weight, self._scaling)
        if c is None:
            bias = self.lora_B.bias
            bias = None if bias is None else (bias * self._scaling).to(x.dtype)
            delta = adapted_linear(x, None, factors, bias, dropout_p)
            return (y + delta).to(y.dtype)
        base, bias = y, self.base_layer.bias
        if dropout_p > 0:
            x = F.dropout(x, dropout_p)
            base = called(self.base_layer, x, self.out_features)
        if bias is not None:
            base = base - bias
        return (y + (c - 1) * base + c * adapted_linear(x, None, factors)).to(y.dtype)

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._frozen_weight(), whole(self.lora_A.weight), whole(self.lora_B.weight)

    def _has_own_forward(self) -> bool:
        return type(self.base_layer).forward is not nn.Linear.forward

    def _total_bias(self, base_layer: nn.Linear, lora_b: nn.Linear) -> Tensor | None:
        """``b + s * lora_B.bias`` in the base layer's dtype."""
        bias, lora_bias = parameter_of(base_layer, "bias"), parameter_of(lora_b, "bias")
        if lora_bias is None:
            return bias
        bias, lora_bias = None if bias is None else whole(bias), whole(lora_bias)
        total = lora_bias.to(torch.promote_types(lora_bias.dtype, torch.float32)) * self._scaling
        if bias is not None:
            total = total + bias
        return total.to(base_layer.weight.dtype)

    def _merged_parameters(self) -> dict[str, Tensor]:
        merged = {}
        if self.lora_B.bias is not None:
            if self.base_layer.bias is None:
                raise RuntimeError(
                    "merge: the adapter has a bias (lora_bias=True) and the base layer has none "
                    "to merge it into"
                )
            merged["bias"] = self._total_bias(self.base_layer, self.lora_B)
        merged["weight"] = self._merged_weight()
        return merged
