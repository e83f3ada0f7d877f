"""Text to token ids and back, and conversations to prompts, for one model directory.

Reads the files itself (tokenizer.json, tokenizer_config.json, the chat template): importing transformers
for it would cost seconds of every start. Behaves as transformers' fast tokenizers do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ..schemas.errors import InvalidRequest, ModelInvalid, ModelNotFound
from ..schemas.job import Message
from ..schemas.tools import Function
from . import tool_prompt
from .chat_template import ChatTemplate
from .token_pieces import TokenPieces

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
UNLIMITED_TOKENS = 10**9
"""transformers writes 1e30 for "no limit"."""


class Tokenizer:
    """The tokenizer of a model directory. Immutable; threads may use it at once.

    ``eos_token_ids``: every id that ends a text, from generation_config.json, config.json and the
    tokenizer's own. ``vocab_size``: one more than the largest id. ``max_length``: what the tokenizer's
    files say of the context.
    """

    def __init__(self, model_dir: str | Path) -> None:
        path = Path(model_dir)
        self.path = path
        self._config = _read_json(path / "tokenizer_config.json")
        self._named = _named_tokens(self._config, path)
        backend = _load_backend(path / "tokenizer.json")
        _complete(backend, self._config, self._named)
        self._backend = backend
        self.pieces = TokenPieces(backend)
        self.special_ids = self.pieces.special_ids
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_ids = self._eos_token_ids()
        added = backend.get_added_tokens_decoder()
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        length = self._config.get("model_max_length")
        self.max_length = int(length) if isinstance(length, int) and length < UNLIMITED_TOKENS else None
        self._templates = _read_templates(self._config, path, self._named)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """``add_special_tokens``: what the tokenizer puts around a text (often a bos), not for rendered
        chats.

        Raises InvalidRequest for text that is not Unicode (half a surrogate pair).
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as exc:
            raise InvalidRequest("the prompt holds half a surrogate pair, which is no character") from exc

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of all ids at once; ids that the vocabulary does not have are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """What the token adds to a text, in bytes; special tokens give their written form, unknown ids
        nothing."""
        return self.pieces.bytes_of(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for a conversation; encode it without adding special tokens: it holds its own.

        ``now`` is what a template that asks for the date is told; None: this moment, local time.
        Raises InvalidRequest when the model has no template or the template refuses, ModelInvalid when it
        is broken.
        """
        template = self._templates.get("tool_use") if tools is not None else None
        template = template or self._templates.get("default")
        if template is None:
            named = f" named default (it has {', '.join(sorted(self._templates))})" if self._templates else ""
            raise InvalidRequest(
                f"this model has no chat template{named}: "
                "send a plain prompt, or use an instruction-tuned model",
                param="messages",
            )
        return template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, now=now, **extra
        )

    def conversation(
        self, messages: Sequence[Message], functions: Sequence[Function] = (), now: datetime | None = None
    ) -> str:
        """``apply_chat_template`` for turns that may call ``functions``, whether its template knows tools or
        not."""
        turns = tool_prompt.turns_of(messages)
        with_tools = bool(functions) or any(m.role == "tool" or m.tool_calls for m in messages)
        if with_tools and not self.knows_tools:
            turns, functions = tool_prompt.plain_turns(messages, functions), ()
        tools = tool_prompt.described(functions) if functions else None
        return self.apply_chat_template(turns, tools=tools, now=now)

    @cached_property
    def knows_tools(self) -> bool:
        """The chat template tells of tools, and of calls in the form that we read."""
        moment = datetime.fromtimestamp(0, UTC)
        try:
            rendered = self.apply_chat_template(
                tool_prompt.PROBE_TURNS, tools=tool_prompt.PROBE_TOOLS, now=moment
            )
        except InvalidRequest:
            return False
        return tool_prompt.tells_of_tools(rendered)

    def _id_of(self, name: str) -> int | None:
        written = self._named.get(name)
        return None if written is None else self._backend.token_to_id(written)

    def _eos_token_ids(self) -> tuple[int, ...]:
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value: Any = _read_json(self.path / name).get("eos_token_id")
            several = cast("list[Any]", value if isinstance(value, list) else [value])
            found += [each for each in several if isinstance(each, int)]
        own = self._id_of("eos_token")
        if own is not None:
            found.append(own)
        return tuple(dict.fromkeys(found))


def _load_backend(path: Path) -> Backend:
    if not path.parent.is_dir():
        raise ModelNotFound(f"{path.parent}: no such directory")
    if not path.is_file():
        raise ModelInvalid(f"{path}: missing; a model needs a tokenizer.json (the fast tokenizer's file)")
    try:
        backend = Backend.from_file(str(path))
    except Exception as exc:  # the library raises nothing more special
        raise ModelInvalid(f"{path}: not readable as a tokenizer: {exc}") from exc
    backend.no_truncation()
    backend.no_padding()
    return backend


def _complete(backend: Backend, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Bring in added and named tokens that only tokenizer_config.json has.

    Its ``add_bos_token`` counts for nothing, as in transformers: what is put around a text is in
    tokenizer.json.
    """
    for index, entry in sorted(_added(config).items()):
        if backend.id_to_token(index) is None:
            backend.add_tokens([entry])  # pyright: ignore[reportUnknownMemberType]  # its list is untyped
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [token for token in dict.fromkeys(named.values()) if token not in known]
    if missing:
        backend.add_special_tokens(missing)  # pyright: ignore[reportUnknownMemberType]  # its list is untyped


def _added(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    found: dict[int, AddedToken] = {}
    for index, entry in cast("dict[str, Any]", config.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and "content" in entry and index.isdecimal():
            fields = cast("dict[str, Any]", entry)
            given = {flag: bool(fields[flag]) for flag in flags if flag in fields}
            found[int(index)] = AddedToken(str(fields["content"]), **given)
    return found


def _named_tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """``bos_token`` and the like, written out. special_tokens_map.json speaks where the config is silent."""
    named: dict[str, str] = {}
    for source in (_read_json(path / "special_tokens_map.json"), config):
        for name in NAMED_TOKENS:
            match source.get(name):
                case str(token) | {"content": str(token)}:
                    named[name] = token
                case _:
                    pass
    return named


def _read_templates(
    config: Mapping[str, Any], path: Path, named: Mapping[str, str]
) -> dict[str, ChatTemplate]:
    """By name. A chat_template.jinja goes before the config's; the config's may be one text or a list of
    named ones."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return {"default": ChatTemplate(file.read_text(encoding="utf-8"), named, str(file))}
        except (OSError, UnicodeDecodeError) as exc:
            raise ModelInvalid(f"{file}: not readable: {exc}") from exc
    where = str(path / "tokenizer_config.json")
    given: Any = config.get("chat_template")
    if isinstance(given, str):
        return {"default": ChatTemplate(given, named, where)}
    templates: dict[str, ChatTemplate] = {}
    for entry in cast("list[Any]", given if isinstance(given, list) else []):
        match entry:
            case {"name": str(name), "template": str(source)}:
                templates[name] = ChatTemplate(source, named, where)
            case _:
                raise ModelInvalid(f"{where}: an entry of chat_template lacks its name or its template")
    return templates


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no such file. Raises ModelInvalid if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelInvalid(f"{path}: not readable as JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ModelInvalid(f"{path}: not a JSON object")
    return cast("dict[str, Any]", content)
