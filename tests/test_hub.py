"""
test_hub.py: backbones by name. The hub is never reached here: either nothing listens where it is looked for, or its client is
replaced. Whatever keeps a download from happening, one line says what to do and which files to put where by hand.
"""

import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
from backbones import write_checkpoint
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from model import UserError, find_checkpoint, load_llada


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "llada-moe")


@pytest.mark.parametrize("name", ["absent", "file", "llada-9b", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    name = str(tmp_path / name) if name in ("absent", "file") else name
    with pytest.raises(UserError, match=f"there is no folder {re.escape(name)}, and it is neither llada-8b, llada-moe"):
        find_checkpoint(name)


def test_without_network_the_user_is_told_which_files_to_put_where(monkeypatch, tmp_path):
    """Nothing listens on port 9: the real client fails, quickly."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_llada("llada-moe")
    said = str(error.value)
    assert said.startswith("cannot download inclusionAI/LLaDA-MoE-7B-A1B-Base")
    assert all(name in said for name in ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*.json"))
    assert "into a folder" in said
    assert "\n" not in said


def http_error(kind: type) -> Exception:
    """As the client raises them, without the response that their constructors want."""
    error = kind.__new__(kind)
    error.args = ("403 Client Error\nsee the page",)
    return error


REFUSALS = {
    "gated": (lambda: http_error(errors.GatedRepoError), "a/b is gated: accept its terms on its page and log in"),
    "not found": (lambda: http_error(errors.RepositoryNotFoundError), "no repository a/b that you may read; check the name"),
    "the server fails": (lambda: http_error(errors.HfHubHTTPError), "cannot download a/b"),
    "it breaks off": (lambda: RuntimeError("connection lost"), "cannot download a/b.*connection lost"),
    "no space left": (lambda: OSError(28, "No space left on device"), "cannot download a/b.*No space left"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_a_download_that_is_refused_is_one_line_with_a_way_out(monkeypatch, why):
    """Each names the repository and which files to put into a folder instead."""
    make, named = REFUSALS[why]

    def download(*arguments, **options):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError) as error:
        find_checkpoint("a/b")
    assert re.search(named, str(error.value)), error.value
    assert "into a folder and name that folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_impossible_repository_name_is_refused():
    with pytest.raises(UserError, match="cannot download a--b/c"):
        find_checkpoint("a--b/c")


def test_without_huggingface_hub_only_downloads_fail(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert find_checkpoint(str(folder)) == folder
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        find_checkpoint("a/b")


def test_a_download_fetches_what_is_read_and_nothing_else(monkeypatch, folder):
    """A short name stands for its repository; the modelling code and other formats of the weights are left on the hub."""
    asked = {}

    def download(repo, allow_patterns):
        asked[repo] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("llada-8b") == folder
    assert find_checkpoint("a/b") == folder
    assert list(asked) == ["GSAI-ML/LLaDA-8B-Base", "a/b"]
    read = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.safetensors"]
    read += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    others = ["modeling_llada.py", "README.md", "pytorch_model.bin", "model.gguf"]
    assert list(filter_repo_objects([*read, *others], allow_patterns=asked["a/b"])) == read
