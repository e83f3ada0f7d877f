"""A GGUF file as a model directory: config and tokenizer made from its metadata, the weights where they are.

The directory holds a few small files and a link to the GGUF file, whose weights the engine reads as they are.
It is made on first use and made anew when the file changes.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..schemas.errors import Misconfigured, ModelInvalid, ModelNotFound
from ..schemas.gguf import GgufFile

FILE = "model.gguf"
FORMAT = 1
"""Raised when what is made of the same file changes."""
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
)
"""Files that go before what the metadata say, where they lie beside the GGUF file."""


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that ``path`` names: itself, or the only one of a directory that is no checkpoint.

    Raises ModelInvalid if there are several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:4])
        raise ModelInvalid(f"{path} holds {len(found)} GGUF files ({names}); name one of them")
    return found[0] if found else None


def directory_of(gguf: Path, root: Path) -> Path:
    """The model directory of the file, below ``root``. Raises ModelNotFound, ModelInvalid, Misconfigured."""
    try:
        gguf = gguf.resolve(strict=True)
        stat = gguf.stat()
    except OSError as exc:
        raise ModelNotFound(f"{gguf}: {exc.strerror}") from exc
    beside = [(each.name, each.stat().st_mtime_ns) for each in _beside(gguf)]
    known = json.dumps([FORMAT, str(gguf), stat.st_size, stat.st_mtime_ns, beside])
    target = root / "gguf" / f"{gguf.stem}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        _write(gguf, scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write(gguf: Path, target: Path) -> None:
    try:
        from .gguf_config import config_of
    except ModuleNotFoundError as exc:
        raise Misconfigured(f"GGUF files need {exc.name}; run: pip install 'gristmill[worker]'") from exc
    from .gguf_tokenizer import tokenizer_config_of, tokenizer_of

    with GgufFile(gguf) as file:
        own = {each.name for each in _beside(gguf)}
        try:
            _json(target / "config.json", config_of(file))
            if "tokenizer.json" not in own:
                _json(target / "tokenizer.json", tokenizer_of(gguf, file.metadata))
            if "tokenizer_config.json" not in own and "tokenizer.ggml.tokens" in file.metadata:
                _json(target / "tokenizer_config.json", tokenizer_config_of(file.metadata))
        except (KeyError, IndexError) as exc:
            raise ModelInvalid(f"{gguf}: metadata lacks {exc}") from exc
        except (
            ArithmeticError,
            AttributeError,
            TypeError,
            ValueError,
        ) as exc:  # a list for a number, no heads
            raise ModelInvalid(f"{gguf}: metadata are not those of a model that is known ({exc})") from exc
    for each in _beside(gguf):
        shutil.copyfile(each, target / each.name)
    (target / FILE).symlink_to(gguf)


def _beside(gguf: Path) -> list[Path]:
    return [path for name in BESIDE if (path := gguf.parent / name).is_file()]


def _json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
