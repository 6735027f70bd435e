"""``LoRAEmbedding``: a frozen ``torch.nn.Embedding`` with a LoRA or DoRA adapter."""

import warnings
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lora_kernels.nn.adapter_layer import AdapterLayer
from lora_kernels.nn.base_call import is_plain_embedding
from lora_kernels.nn.base_parameters import resize
from lora_kernels.nn.checks import LoRAOptions, adapter_dtype_over, check_adapter, check_base_layer
from lora_kernels.nn.sharded import draw, whole
from lora_kernels.nn.weight_reads import note_call
from lora_kernels.ops.linear.halves import lora_expand
from lora_kernels.runtime.checks import check_count, kind_of


class LoRAEmbedding(AdapterLayer):
    """A frozen embedding and a trainable adapter of rank r.

    .. math::
        y_i = W_i + s \\cdot (A_{:, i})^T B^T

    i is an index, W ``[num_embeddings, embedding_dim]``, A ``[r, num_embeddings]``,
    B ``[embedding_dim, r]``, ``s = alpha / r`` (``alpha / sqrt(r)`` with rsLoRA). With DoRA every
    feature is scaled by ``m / ||W^T + s B A||``, m trainable and the norm treated as a constant.
    There is no dropout. An ``embed_scale`` on the base layer multiplies the adapter's part too.

    i is the index that ``base_layer`` looks up, also where its class's forward or a hook makes
    another of it than came (positions that are shifted by two, say).

    The looked-up rows of A follow ``padding_idx``, ``max_norm``, ``norm_type`` and
    ``scale_grad_by_freq`` of the base layer, as in PEFT. Their gradient is dense also where the
    base layer is ``sparse``: torch has no sparse gradient for a parameter stored by columns.

    Parameters have PEFT's names and initial values: ``base_layer.weight`` (frozen),
    ``lora_embedding_A``, ``lora_embedding_B`` and ``lora_magnitude_vector`` with DoRA.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of an embedding.
        rank, alpha, use_rslora, device, dtype, adapter_dtype: as for :class:`LoRALinear`.
        padding_idx: as in ``torch.nn.Embedding``, like the four that follow.
        max_norm: renormalises looked-up rows in place, the frozen weight's too.
        norm_type: of max_norm.
        scale_grad_by_freq: divide gradients by the index's frequency in the batch.
        sparse: of the base layer.
        use_dora: learn the magnitude of the adapted weight's columns.
        init_lora_weights: True or "gaussian" (A zero, B standard normal), or False (both standard
            normal, so that the layer is changed).

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and why.
    """

    base_layer: nn.Embedding
    _shown = ("num_embeddings", "embedding_dim", "rank", "alpha")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        alpha: float,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_count("num_embeddings", num_embeddings)
        check_count("embedding_dim", embedding_dim)
        embedding = nn.Embedding(
            num_embeddings,
            embedding_dim,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            device=device,
            dtype=dtype,
        )
        options = LoRAOptions(rank, alpha, use_rslora, use_dora, init_lora_weights, adapter_dtype)
        self._wrap(embedding, options)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        rank: int = 16,
        alpha: float = 32,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRAEmbedding":
        """Wrap an existing embedding: its weight is shared, not copied, and frozen.

        Arguments are those of the constructor. ``base_layer`` is a shallow copy of ``embedding``,
        with the forward of its class and its hooks; ``embedding`` itself is never merged into.

        Raises:
            TypeError: embedding is no ``torch.nn.Embedding`` over a plain parameter.
            ValueError: its forward was replaced on the instance, or its ``embed_scale`` has several
                elements.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"embedding: expected a torch.nn.Embedding, got {type(embedding).__name__}"
            )
        check_base_layer("embedding", embedding)
        layer = cls.__new__(cls)
        options = LoRAOptions(rank, alpha, use_rslora, use_dora, init_lora_weights, adapter_dtype)
        layer._wrap(embedding, options)
        return layer

    def _wrap(self, embedding: nn.Embedding, options: LoRAOptions) -> None:
        check_adapter(options)
        dtype = adapter_dtype_over(embedding.weight, options.adapter_dtype)
        _embed_scale_of(embedding)
        super().__init__(embedding, options)
        self._num_embeddings, self.embedding_dim = embedding.weight.shape
        made = {"device": embedding.weight.device, "dtype": dtype}
        self.lora_embedding_A = nn.Parameter(torch.empty(self.rank, self.num_embeddings, **made))
        self.lora_embedding_B = nn.Parameter(torch.empty(self.embedding_dim, self.rank, **made))
        magnitude = nn.Parameter(torch.empty(self.embedding_dim, **made)) if self.use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.reset_parameters()

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary. Set it where the base weight has been resized: new tokens have
        zeros in A.

        Raises:
            ValueError: the base weight has another number of rows, or the adapter is DoRA's, whose
                norm runs over the vocabulary.
            RuntimeError: the layer is merged.
        """
        return self._num_embeddings

    @num_embeddings.setter
    def num_embeddings(self, value: int) -> None:
        if value == self._num_embeddings:
            return
        self._check_resizable("num_embeddings", value)
        if self.use_dora:
            raise ValueError(
                "num_embeddings: cannot change with DoRA, whose norm runs over the vocabulary"
            )
        resize(self.lora_embedding_A, 1, value)
        self.base_layer.num_embeddings = value
        self._num_embeddings = value

    @property
    def padding_idx(self) -> int | None:
        """The base layer's padding index."""
        return self.base_layer.padding_idx

    def _draw(self, name: str, init_lora_weights: bool | str) -> None:
        if name == "lora_embedding_A":
            zero = bool(init_lora_weights)
            draw(self.lora_embedding_A, nn.init.zeros_ if zero else nn.init.normal_)
        elif name == "lora_embedding_B":
            draw(self.lora_embedding_B, nn.init.normal_)

    def forward(self, x: Tensor) -> Tensor:
        """``[...]`` indices to ``[..., embedding_dim]`` in the base layer's dtype.

        Raises:
            TypeError: x is no tensor of int32 or int64.
            ValueError: ``base_layer`` has a forward of its own, or hooks, and does not look its
                weight up once with ``torch.nn.functional.embedding``; or its ``embed_scale`` has
                several elements.
        """
        note_call(self)
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"x: expected a tensor of int32 or int64 indices, got {kind_of(x)}")
        if self.disable_adapters or self._merge is not None:
            return self._base_alone(x)
        if is_plain_embedding(self.base_layer):
            base = self.base_layer(x)
        else:
            base, x = self._called_base(x)
        output_scale = self._output_scale()
        hidden = F.embedding(
            x,
            self.lora_embedding_A.t(),
            padding_idx=self.base_layer.padding_idx,
            max_norm=self.base_layer.max_norm,
            norm_type=self.base_layer.norm_type,
            scale_grad_by_freq=self.base_layer.scale_grad_by_freq,
        )  # [..., R]
        hidden = hidden * self._scaling
        embed_scale = _embed_scale_of(self.base_layer)
        if isinstance(embed_scale, Tensor):
            embed_scale = embed_scale.to(hidden.dtype)
        if embed_scale is not None:
            hidden = hidden * embed_scale
        y = lora_expand(hidden, self.lora_embedding_B, out=base)
        if output_scale is not None:
            y = y * output_scale
        return y.to(base.dtype)

    def _called_base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``base_layer(x)``, and the indices that were looked up for it."""
        found: list[tuple[Tensor, Tensor]] = []
        with _LookUps(found):
            base = self.base_layer(x)
        if len(found) != 1:
            raise ValueError(
                f"base_layer: expected the forward of {type(self.base_layer).__name__} to look its "
                "weight up once with torch.nn.functional.embedding, which tells what to look up in "
                f"the adapter, got {len(found)} times"
            )
        indices, _ = found[0]
        return base, indices.to(self.lora_embedding_A.device)

    def _has_own_forward(self) -> bool:
        """Whether the base layer's class looks something else up than the weight as it is."""
        base = self.base_layer
        if type(base).forward is nn.Embedding.forward:
            return False
        found: list[tuple[Tensor, Tensor]] = []
        probe = torch.zeros((1, 1), dtype=torch.int64, device=base.weight.device)
        # A sharded weight cannot be looked up here, but it has been written down by then.
        with torch.no_grad(), _LookUps(found), suppress(Exception):
            type(base).forward(base, probe)
        return len(found) != 1 or found[0][1] is not base.weight

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """In W's transpose the features are the rows."""
        weight = self._frozen_weight().t()
        return weight, whole(self.lora_embedding_A), whole(self.lora_embedding_B)

    def _merged_parameters(self) -> dict[str, Tensor]:
        if self.base_layer.max_norm is not None:
            warnings.warn(
                "merge: the base layer has max_norm, which renormalises the merged rows instead of "
                "the frozen rows and the adapter's each by themselves; results will differ",
                stacklevel=3,
            )
        return {"weight": self._merged_weight().t()}


class _LookUps(TorchFunctionMode):
    """Writes down what is looked up, as (indices, table)."""

    def __init__(self, found: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.embedding:
            self.found.append(_indices_and_table(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def _indices_and_table(input: Tensor, weight: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    return input, weight


def _embed_scale_of(embedding: nn.Embedding) -> float | Tensor | None:
    embed_scale = getattr(embedding, "embed_scale", None)
    if isinstance(embed_scale, Tensor) and embed_scale.numel() != 1:
        raise ValueError(
            "embedding: expected embed_scale to be a number or one element, got shape "
            f"{list(embed_scale.shape)}"
        )
    return embed_scale
