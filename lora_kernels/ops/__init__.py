"""One folder per operation, each with the same rooms: definition, checks, op, backends."""

from torch import Tensor

from lora_kernels.ops import linear, routed
from lora_kernels.runtime.dispatch import Choice

__all__ = ["explain"]


def explain(x: Tensor, *operands, **options) -> Choice:
    """The backend that a call would take, and why; nothing is launched.

    Takes the arguments of :func:`lora_linear` (see its ``explain`` for the defaults), or x, an
    ``AdapterBank`` and a ``Routing`` as :func:`routed_lora` does. Meta tensors serve too, for
    their shapes.

    Returns:
        A named tuple ``(backend, reason)``.

    Raises:
        TypeError, ValueError: what the call itself would raise.
    """
    bank = operands[0] if operands else options.get("bank")
    if isinstance(bank, routed.AdapterBank):
        return routed.explain(x, *operands, **options)
    return linear.explain(x, *operands, **options)
