"""Is this directory a whole model? Checked without reading weights: names, sizes and headers only."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ..schemas.errors import ModelInvalid, ModelNotFound

MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")


def check(path: Path) -> None:
    """Return if ``path`` holds config.json, tokenizer.json and complete safetensors weights.

    Raises ModelNotFound when there is no such directory, ModelInvalid naming the file that is missing, cut
    short or unreadable.
    """
    if not path.is_dir():
        raise ModelNotFound(f"{path}: no such directory")
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelInvalid(f"{path / 'config.json'}: names no model_type")
    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file() or tokenizer.stat().st_size == 0:
        raise ModelInvalid(
            f"{tokenizer}: missing; a model needs a tokenizer.json (the fast tokenizer's file)"
        )
    if (path / "model.gguf").is_file():
        return  # whose header the engine checks against its length
    for file in weight_files(path):
        _check_safetensors(file)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up the model, in name order. Raises ModelInvalid if there are none,
    or if the index names one that is missing or outside the directory."""
    index = path / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelInvalid(f"{index}: has no weight_map")
        shards = sorted({str(name) for name in cast("dict[str, Any]", names).values()})
        for shard in shards:
            if Path(shard).name != shard:
                raise ModelInvalid(f"{index}: {shard!r} is not a plain file name")
            if not (path / shard).is_file():
                raise ModelInvalid(f"{path / shard}: missing, one of {len(shards)} weight files")
        return [path / shard for shard in shards]
    single = path / "model.safetensors"
    if not single.is_file():
        parts = sorted(each.name for each in path.glob("*.safetensors"))
        others = sorted(each.name for pattern in OTHER_WEIGHTS for each in path.glob(pattern))
        hint = f" (found {others[0]}: only safetensors is read, pickles never)" if others else ""
        hint = f" (found {parts[0]} and no {INDEX}, which says what lies where)" if parts else hint
        raise ModelInvalid(f"{single}: missing{hint}")
    return [single]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ModelInvalid if it is missing, too large or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelInvalid(f"{path}: {path.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
        content: Any = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise ModelInvalid(f"{path}: missing") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelInvalid(f"{path}: not readable as JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ModelInvalid(f"{path}: not a JSON object")
    return cast("dict[str, Any]", content)


def _check_safetensors(path: Path) -> None:
    """The header promises where the data ends: a download that stopped half-way ends before."""
    with path.open("rb") as file:

        def span(start: int, count: int) -> bytes:
            file.seek(start)
            return file.read(count)

        header(path, path.stat().st_size, span)


def header(what: object, size: int, span: Callable[[int, int], bytes]) -> dict[str, Any]:
    """The header of a safetensors file of ``size`` bytes, of which ``span(start, count)`` reads some.

    Raises ModelInvalid, naming it ``what``, unless the file ends where its header says.
    """
    prefix = span(0, 8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise ModelInvalid(f"{what}: not a safetensors file ({size:,} bytes)")
    try:
        found: dict[str, Any] = json.loads(span(8, length))
        end = max(
            (int(each["data_offsets"][1]) for name, each in found.items() if name != "__metadata__"),
            default=0,
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise ModelInvalid(f"{what}: the safetensors header is damaged") from exc
    if size != 8 + length + end:
        raise ModelInvalid(
            f"{what}: {size:,} bytes and its header promises {8 + length + end:,}; fetch it again"
        )
    return found
