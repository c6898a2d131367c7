"""
test_hub.py: backbones by name. The hub is never reached here. Whatever keeps a download from
happening, one line says what to do and which files to fetch by hand.
"""

import sys
from pathlib import Path

import huggingface_hub
import pytest
from backbones import refused, write_checkpoint
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from full_scale.checkpoints import WANTED, fetch, find_checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "llada-moe")


@pytest.fixture
def hub(monkeypatch):
    """Puts a function in the place of the client's download."""
    return lambda download: monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.mark.parametrize("name", ["absent", "file", "llada-9b", "a/b/c", "x" * 5000])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    said = refused(find_checkpoint, name)
    assert f"no folder {name[:200]}" in said
    assert "llada-8b, llada-moe" in said


def test_without_network_the_user_is_told_which_files_to_put_where(monkeypatch, tmp_path):
    """Nothing listens on port 9: the real client fails, quickly."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = refused(find_checkpoint, "llada-moe")
    assert said.startswith("cannot download inclusionAI/LLaDA-MoE-7B-A1B-Base")
    assert all(name in said for name in WANTED)
    assert "huggingface.co/inclusionAI/LLaDA-MoE-7B-A1B-Base into a folder" in said


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (errors.GatedRepoError, "gated: accept its terms on its page and log in"),
        (errors.RepositoryNotFoundError, "no dataset a/b that you may read"),
        (errors.HfHubHTTPError, "cannot download a/b (HfHubHTTPError: 403"),
        (OSError, "cannot download a/b (OSError: 403"),
    ],
)
def test_a_download_that_is_refused_is_one_line_with_a_way_out(hub, kind, named):
    def download(*arguments, **options):
        error = kind.__new__(kind)  # the client's errors want a response to be constructed
        error.args = ("403 Client Error\nsee the page",)
        raise error

    hub(download)
    said = refused(fetch, "a/b", ["b.json"], "dataset")
    assert named in said
    assert "fetch b.json from https://huggingface.co/datasets/a/b into a folder" in said


def test_without_huggingface_hub_only_downloads_fail(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(folder)
    assert find_checkpoint(".").resolve() == find_checkpoint(folder) == folder
    assert "pip install huggingface_hub" in refused(find_checkpoint, "a/b")


def test_a_download_fetches_what_is_read_and_nothing_else(hub, folder):
    """A short name stands for its repository; modelling code and other formats stay on the hub."""
    asked = []

    def download(repo, allow_patterns, repo_type):
        asked.append((repo, repo_type))
        files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
        files += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
        others = ["modeling_llada.py", "README.md", "pytorch_model.bin", "model.gguf"]
        kept = filter_repo_objects([*files, *others], allow_patterns=allow_patterns)
        assert list(kept) == files
        return str(folder)

    hub(download)
    assert find_checkpoint("llada-8b") == find_checkpoint("a/b") == folder
    assert asked == [("GSAI-ML/LLaDA-8B-Base", "model"), ("a/b", "model")]


def test_a_repository_without_the_file_is_refused(hub, tmp_path):
    hub(lambda *arguments, **options: str(tmp_path))
    assert "a/b on the hub has no b.json" in refused(fetch, "a/b", ["b.json"], "dataset")
