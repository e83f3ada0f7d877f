"""What a text makes of a model's layers, one layer in memory at a time: which inputs each linear is fed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...schemas.errors import InvalidRequest, Misconfigured
from ..attention.torch_backend import TorchAttention
from ..batch import Batch, Fed, Feed, pack
from ..kv_cache import KVCache
from ..layers.across import ALONE
from ..layers.elementwise import TorchElementwise
from ..layers.linear import Linear, unpacked
from ..models.assembly import Assembly, Layer, none_is
from ..models.spec import ModelSpec
from ..tokenizer import Tokenizer

OURS = Path(__file__).with_name("calibration.txt")
SEQUENCE = 512
"""Tokens of a sequence; the text is cut into them."""
FEWEST = 256
"""Tokens; fewer say little of which inputs are large."""
BATCH = 2048
"""Tokens that go through a layer together."""
BLOCK = 64


def sequences(path: Path, tokenizer: Tokenizer, most: int, longest: int) -> list[list[int]]:
    """The text of ``path`` as tokens, at most ``most``. Raises InvalidRequest, Misconfigured."""
    found: list[list[int]] = []
    left, size = most, min(SEQUENCE, longest)
    for text in _texts(path, tokenizer):
        ids = tokenizer.encode(text)[:left]
        found += [ids[first : first + size] for first in range(0, len(ids), size)]
        left -= len(ids)
        if left <= 0:
            break
    if most - left < min(FEWEST, most):
        raise InvalidRequest(
            f"{path} is {most - left} tokens to this model; calibration takes at least {FEWEST}",
            param="calibration",
        )
    return found


def _texts(path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """A .jsonl has a text a line, anything else is one text."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise Misconfigured(f"the calibration text {path} cannot be read: {exc}") from exc
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield _text(line, f"{path}, line {number}", tokenizer)


def _text(line: str, where: str, tokenizer: Tokenizer) -> str:
    """Of a row: its "text", its "prompt", or its "messages" as the model's template has them."""
    try:
        row: Any = json.loads(line)
    except ValueError as exc:
        raise InvalidRequest(f"{where}: not JSON: {exc}", param="calibration") from exc
    if isinstance(row, dict):
        fields = cast("dict[str, Any]", row)
        inner: Any = fields.get("body", fields)  # a line of OpenAI's batch format
        match inner:
            case {"text": str(text)} | {"prompt": str(text)}:
                return text
            case {"messages": list()}:
                return tokenizer.apply_chat_template(inner["messages"], add_generation_prompt=False)
            case _:
                pass
    raise InvalidRequest(f'{where}: has no "text", "prompt" or "messages"', param="calibration")


@dataclass(slots=True)
class Seen:
    """What a linear was fed. Sums over rows x: of xᵀx [in, in], of |x| [in]."""

    gram: Tensor
    magnitude: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        self.gram.addmm_(x.T, x)
        self.magnitude += x.abs().sum(0)
        self.rows += len(x)

    def divided(self, scales: Tensor) -> Seen:
        """As if each input had been divided by its scale."""
        return Seen(self.gram / scales / scales[:, None], self.magnitude / scales, self.rows)


class Calibration:
    """The residual rows of the text, on their way through the layers."""

    def __init__(
        self,
        spec: ModelSpec,
        texts: Sequence[Sequence[int]],
        others: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """``others``: embeddings, by their Hugging Face names."""
        self._spec, self._device = spec, device
        self._batches = list(_batches(texts, device))
        self._attention = TorchAttention(spec, BLOCK, SEQUENCE, device)
        blocks = max(int(batch.tables.max()) for batch in self._batches) + 1
        one = KVCache.allocate(1, blocks, self._attention.block_shape(), torch.float32, device)
        # Layers follow one another and none looks back at an earlier one's keys: all may have the same.
        layers = spec.num_layers
        self._attention.use(KVCache(one.keys * layers, one.values * layers, blocks))
        embed = self._assembly(others).embedding()
        self.rows = [embed(batch.tokens, batch.positions) for batch in self._batches]

    def feed(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Seen]:
        """Go through a layer of these ``tensors``. What its linears were fed, by their first weight."""
        seen: dict[str, Seen] = {}

        def watched(modules: Sequence[str], bias: Tensor | None) -> Linear:
            weights = [tensors[f"{module}.weight"].float() for module in modules]
            weight = torch.cat(weights).to(self._device)
            inputs = weight.shape[1]
            here = Seen(weight.new_zeros(inputs, inputs), weight.new_zeros(inputs))
            seen[f"{modules[0]}.weight"] = here

            def layer(x: Tensor) -> Tensor:
                here.add(x)
                return nnf.linear(x, weight, bias)

            return layer

        layer = self._assembly(tensors, watched).layer(index)
        for number, (batch, rows) in enumerate(zip(self._batches, self.rows, strict=True)):
            self._attention.begin(batch)
            self.rows[number] = self._through(layer, index, rows)
        return seen

    def _through(self, layer: Layer, index: int, residual: Tensor) -> Tensor:
        """As ``Decoder.forward`` goes through a layer."""
        x = layer.attention_norm(residual)
        qkv = layer.qkv(x)
        if layer.on_qkv is not None:
            qkv = layer.on_qkv(qkv)
        update = layer.output(self._attention.attend(index, qkv, layer.q_norm, layer.k_norm))
        if layer.attention_post is not None:
            update = layer.attention_post(update)
        if layer.parallel:
            beside = x if layer.mlp_norm is None else layer.mlp_norm(residual)
            return residual + update + layer.mlp(beside)
        assert layer.mlp_norm is not None, "a layer whose MLP reads nothing"
        update = layer.mlp(layer.mlp_norm(update, residual))
        if layer.mlp_post is not None:
            update = layer.mlp_post(update)
        return residual + update

    def _assembly(self, tensors: Mapping[str, Tensor], linears: Any = none_is) -> Assembly:
        def fetch(name: str) -> Tensor:
            return tensors[name].to(self._device, torch.float32)

        return Assembly(self._spec, fetch, TorchElementwise(), unpacked, linears, ALONE)


def _batches(texts: Sequence[Sequence[int]], device: torch.device) -> Iterator[Batch]:
    work: list[Feed] = []
    fed = used = 0
    for ids in texts:
        if work and fed + len(ids) > BATCH:
            yield pack(work, BLOCK, device)
            work, fed, used = [], 0, 0
        blocks = -(-len(ids) // BLOCK)
        work.append(Feed(Fed(ids, range(used, used + blocks)), len(ids)))
        fed, used = fed + len(ids), used + blocks
    yield pack(work, BLOCK, device)
