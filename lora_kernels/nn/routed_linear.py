"""``RoutedLoRALinear``: a frozen ``torch.nn.Linear`` with a bank of adapters."""

import torch
from torch import Tensor, nn

from lora_kernels.nn.active_adapters import ActiveAdapters
from lora_kernels.nn.base_call import called, check_not_bypassed, is_plain_linear
from lora_kernels.nn.base_parameters import BaseParameters, base_parameter
from lora_kernels.nn.batch_choice import Place
from lora_kernels.nn.checks import adapter_dtype_over, check_base_parameters, check_linear
from lora_kernels.nn.weight_reads import note_call, note_read
from lora_kernels.ops.routed import (
    AdapterBank,
    AdapterSlots,
    Routing,
    routed_lora,
    routed_lora_linear,
)
from lora_kernels.runtime.checks import check_count


class RoutedLoRALinear(BaseParameters):
    r"""A frozen linear layer in which every token has adapters of its own.

    .. math::
        y_m = x_m W^T + b + \sum_{(m, i, w)} w \, s_i \cdot D_i(x_m) A_i^T B_i^T

    over the pairs (token, adapter, weight) of a routing; see :func:`routed_lora_linear`. Adapters
    come and go in ``bank``; which of them a batch uses is said by the ``routing`` of the call, or
    for all layers of a model by an :class:`ActiveAdapters` that they share
    (:func:`lora_kernels.route` sets this up).

    Where ``base_layer`` computes more than ``x W^T + b`` from plain parameters (hooks, a forward
    of its own, a weight that is quantised or parametrized), which every call looks at, it is called
    and the adapters' part added to its result.

    A state dict holds ``base_layer.*`` and ``bank.adapters.<name>.*``; it loads into a layer with
    the same adapters. Scalings and dropout are not in it.

    Attributes:
        base_layer: the frozen layer.
        bank: its :class:`AdapterBank`.
        active_adapters: asked where ``forward`` gets no routing; None for nobody.
        place: where the layer is in its model, as ``active_adapters`` is told.

    Args:
        in_features, out_features, bias, device, dtype, adapter_dtype: as for :class:`LoRALinear`.
        slots: shared by the layers of one model; None makes its own.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and why.
    """

    place = Place()
    base_layer: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        slots: AdapterSlots | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check_count(name, size)
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._wrap(linear, slots, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        slots: AdapterSlots | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> "RoutedLoRALinear":
        """Wrap an existing linear layer, which becomes ``base_layer`` and is frozen.

        Arguments are those of the constructor.

        Raises:
            TypeError: linear is no ``torch.nn.Linear`` over plain parameters.
            ValueError: its weight is offloaded.
        """
        check_linear(linear)
        check_base_parameters("linear", linear)
        if linear.weight.is_meta and "_hf_hook" in vars(linear):
            raise ValueError(
                "linear: its weight is offloaded (accelerate), and does not tell which device the "
                "adapters belong on; wrap the layer before it is offloaded"
            )
        layer = cls.__new__(cls)
        layer._wrap(linear, slots, adapter_dtype)
        return layer

    def _wrap(
        self, linear: nn.Linear, slots: AdapterSlots | None, adapter_dtype: torch.dtype | None
    ) -> None:
        weight = linear.weight
        dtype = adapter_dtype_over(weight, adapter_dtype)
        super().__init__()
        self.in_features, self._out_features = linear.in_features, linear.out_features
        self.bank = AdapterBank(
            self.in_features, self.out_features, dtype=dtype, device=weight.device, slots=slots
        )
        self.base_layer = linear.requires_grad_(False)
        self.active_adapters: ActiveAdapters | None = None
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight.

        Whoever computes with it instead of calling the layer passes the adapters by, and gets a
        UserWarning for it, once per layer.
        """
        if not torch.compiler.is_compiling() and len(self.bank):
            note_read(self)
        return self.base_layer.weight

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self._set_base_parameter("weight", value)

    bias = base_parameter("bias")

    @property
    def out_features(self) -> int:
        """N. Set it where the base weight has been resized, as transformers 5.6 does for a tied
        head.

        Raises:
            ValueError: the base weight has another number of rows.
            RuntimeError: there are adapters.
        """
        return self._out_features

    @out_features.setter
    def out_features(self, value: int) -> None:
        if value == self._out_features:
            return
        rows = self.base_layer.weight.shape[0]
        if rows != value:
            raise ValueError(f"out_features: expected {rows}, as the base weight has, got {value}")
        if len(self.bank):
            raise RuntimeError(
                f"out_features: the base weight was resized from {self.out_features} rows to "
                f"{value}, and the adapters {list(self.bank)} were made for the former; remove "
                "them, resize again, and add them anew"
            )
        made = {"dtype": self.bank.dtype, "device": self.bank.device, "slots": self.bank.slots}
        self.bank = AdapterBank(self.in_features, value, **made)
        self.base_layer.out_features = value
        self._out_features = value

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype, or autocast's.

        Args:
            x: its leading dimensions hold the tokens of the routing.
            routing: which adapters each token uses; None asks ``active_adapters``. A layer without
                adapters needs none.

        Raises:
            RuntimeError: there are adapters, and neither a routing nor ``active_adapters`` says
                which ones to use.
            ValueError: the bank has hooks; it is not called. The layer itself and ``base_layer``
                may have any. Also what :func:`routed_lora_linear` refuses.
        """
        note_call(self)
        base = self.base_layer
        check_not_bypassed("bank", self.bank)
        if routing is None:
            routing = self._routing_for(x)
        if routing is None:
            return base(x)
        active = self.active_adapters
        backend = "auto" if active is None else active.backend
        if is_plain_linear(base):
            weight, bias = base.weight, base.bias
            return routed_lora_linear(x, weight, self.bank, routing, bias, backend=backend)
        # Not added in place: a hook may have kept the base layer's result.
        y = called(base, x, self.out_features)
        return (y + routed_lora(x, self.bank, routing, backend=backend)).to(y.dtype)

    def _routing_for(self, x: Tensor) -> Routing | None:
        if self.active_adapters is not None:
            return self.active_adapters.routing_for(x, self.place)
        if not len(self.bank):
            return None
        raise RuntimeError(
            f"the layer has adapters {list(self.bank)} and nothing says which of them to use; pass "
            "routing=, or set active_adapters"
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
