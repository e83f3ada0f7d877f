"""What makes one decoder differ from another, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. Fields beyond ``theta`` are read by the ``kind`` that needs them."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    """Multiplies cos and sin; already worked out (yarn's mscale included)."""
    rotary_dim: int | None = None
    """Only so many dimensions of a head, the first ones, are rotated. None: all."""
    interleaved: bool = False
    """Dimensions 2i and 2i + 1 make a pair, as in GPT-J; otherwise i and i + half."""


@dataclass(frozen=True, slots=True)
class Names:
    """Where checkpoints of a family keep their tensors: modules, whose ``.weight`` and ``.bias`` follow.

    What is None the family does not have, and the decoder leaves it out: a layer without ``attention_norm``
    feeds its attention the residual as it is, one with ``attention_post_norm`` norms what attention adds.
    """

    base: str = "model."
    """Begins the name of everything but the head; checkpoints saved from a bare model leave it off."""
    embedding: str = "embed_tokens"
    positions: str | None = None
    """Learned position embeddings."""
    embedding_norm: str | None = None
    layers: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"

    attention_norm: str | None = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The gate first, where there is one."""
    down: str = "mlp.down_proj"
    mlp_post_norm: str | None = None
    transposed: bool = False
    """A layer's weights are stored [in, out], as GPT-2's."""


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Layers whose MLP is a choice among experts, each a gated MLP of its own."""

    layers: tuple[bool, ...]
    """Per layer: experts, or the plain MLP."""
    experts: int
    chosen: int
    """Experts that a token goes through."""
    intermediate_size: int
    normalised: bool
    """The weights of the chosen add up to one."""
    shared_size: int = 0
    """Of an expert that every token goes through, weighted by a gate of its own. 0: there is none."""
    block: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder-only model. The defaults are Llama's."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    max_positions: int
    tied_embeddings: bool
    ropes: tuple[RopeSpec | None, ...]
    """Per layer. None: attention there knows nothing of positions, but for ``alibi``."""
    windows: tuple[int | None, ...]
    """Per layer: how many positions back, itself included, a token sees. None: all of them."""
    eos_token_ids: tuple[int, ...]
    names: Names = Names()

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qkv_layout: Literal["joined", "grouped", "codegen"] = "joined"
    """Rows of a fused q, k, v matrix: all q, all k, all v; or for each key head its queries, key and value;
    or CodeGen's four shards of q, v, k."""

    norm: NormKind = "rms"
    norm_bias: bool = False
    norm_plus_one: bool = False
    """What is stored is the norm's weight less one."""
    qk_norm: Literal["head", "heads", "listed", "row"] | None = None
    """Norm of queries and keys before rotation: over each head with one weight for all; with a weight of each
    head's, stored together or one by one; or over all heads at once."""
    qk_norm_bias: bool = False
    qkv_clip: float | None = None
    """Queries, keys and values are cut to ± this."""

    attention_scale: float | None = None
    """Multiplies scores. None: 1 / √head_dim."""
    softcap: float | None = None
    """Scores s become cap * tanh(s / cap)."""
    alibi: tuple[float, ...] = ()
    """Per head: what a score loses for each position further back."""
    parallel: bool = False
    """The MLP reads the residual before attention has added to it."""

    activation: Activation = "silu"
    gated: bool = True
    """The MLP is down(act(gate) * up), gate and up one joined matrix; otherwise down(act(up))."""
    moe: MoeSpec | None = None

    position_offset: int = 0
    """Row of the learned position embeddings that the first token takes."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Multiplies what attention and MLP add to the residual."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        """Of attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
