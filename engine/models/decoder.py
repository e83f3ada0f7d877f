"""The one decoder that all families share: weights in, hidden states and logits out."""

from __future__ import annotations

from itertools import pairwise, starmap

from torch import Tensor

from ..attention.backend import Attention
from ..batch import Batch
from ..layers.across import ALONE, Across
from ..layers.elementwise import Elementwise
from ..layers.invariant import Make
from ..layers.linear import linear
from ..lora.rows import Adapted, project
from ..native.products import Chain
from .assembly import Assembly, Fetch, Layer, Quantized, none_is
from .spec import ModelSpec

NOBODY = Adapted()


class Decoder:
    """Transformer over packed tokens. Knows nothing of sequences, attention does; nor of families: what one
    lacks is None in its layers."""

    def __init__(
        self,
        spec: ModelSpec,
        fetch: Fetch,
        ops: Elementwise,
        make: Make = linear,
        quantized: Quantized = none_is,
        head: Make | None = None,
        across: Across = ALONE,
        lend: Fetch | None = None,
    ) -> None:
        """``head`` makes the output layer, where that is to be made otherwise than ``make`` does.

        ``across``: how ranks that hold parts of the model work together; the other arguments are one's own.
        ``lend``: see Assembly.
        """
        self.spec = spec
        parts = Assembly(spec, fetch, ops, make, quantized, across, lend)
        self._embed = parts.embedding()
        self._layers = [parts.layer(index) for index in range(spec.num_layers)]
        self._onward = [*starmap(_onward, pairwise(self._layers)), None]
        self._norm = parts.norm(spec.names.base + spec.names.norm)
        self._head = parts.head(self._embed.weight, head or make)

    def forward(self, batch: Batch, attention: Attention, adapted: Adapted = NOBODY) -> Tensor:
        """Hidden states [wanted rows, hidden] of one step, for ``logits``; keys and values are cached."""
        attention.begin(batch)
        rows = adapted.fed
        residual: Tensor = self._embed(batch.tokens, batch.positions)
        x = residual
        last = len(self._layers) - 1
        update: Tensor | None = None  # what the previous half-layer adds to the residual
        qkv: Tensor | None = None  # if the previous layer has gone so far
        for index, (layer, onward) in enumerate(zip(self._layers, self._onward, strict=True)):
            if qkv is None:
                # A norm given two adds the first to the second, in place, and norms the sum.
                new, held = (residual, None) if update is None else (update, residual)
                if layer.qkv_normed is not None and not rows:
                    product, norm = layer.qkv_normed
                    qkv = product.normed(new, norm, held)
                else:
                    x = layer.attention_norm(new, held)
                    qkv = project(layer.qkv, x, rows, index, "qkv")
            if layer.on_qkv is not None:
                qkv = layer.on_qkv(qkv)
            update = attention.attend(index, qkv, layer.q_norm, layer.k_norm)
            qkv = None
            if onward is not None and not rows:
                qkv = onward(update, residual)
                continue
            if index == last and batch.wanted is not None:
                update = update[batch.wanted]  # nobody reads the others
                residual = residual[batch.wanted]
                x = x[batch.wanted] if layer.parallel else x
                rows = adapted.wanted
            update = project(layer.output, update, rows, index, "output")
            if layer.attention_post is not None:
                update = layer.attention_post(update)
            if layer.parallel:
                beside = x if layer.mlp_norm is None else layer.mlp_norm(residual)
                update = update + layer.mlp(beside, rows)
            else:
                assert layer.mlp_norm is not None, "a layer whose MLP reads nothing"
                if layer.mlp_normed is not None and not rows:
                    update = layer.mlp_normed(update, residual)
                else:
                    update = layer.mlp(layer.mlp_norm(update, residual), rows)
                if layer.mlp_post is not None:
                    update = layer.mlp_post(update)
        assert update is not None, "a model without layers"
        return self._norm(update, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows, vocab], in the engine's dtype."""
        return self._head(hidden)


def _onward(layer: Layer, following: Layer) -> Chain | None:
    """From what attention says in one layer to what it reads in the next."""
    if not layer.rest or following.qkv_normed is None:
        return None
    return Chain((*layer.rest, following.qkv_normed))
