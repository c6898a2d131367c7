"""
test_backbone_sample.py: `sample.py --backbone` from end to end, and what the two programs say where a backbone, its adapter,
the disk or the GPU is not up to what was asked.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from backbones import MASK, SETTINGS, VOCABULARY, add_random_lora, toy_model, write_checkpoint
from running import contents, jsonl
from safetensors.torch import save_file

import data
import memdlm
import model as program
import sample
from model import save_adapter

PROMPT = "Who is it?"
PAIRS = [{"prompt": f"Who is number {i}?", "response": f" Mary {i}"} for i in range(6)]


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> dict[str, Path]:
    """kind -> a checkpoint's folder with an adapter in it; "data" -> some pairs. Nobody writes into them."""
    root = tmp_path_factory.mktemp("toys")
    (root / "pairs.jsonl").write_text(jsonl(*PAIRS))
    folders = {kind: write_checkpoint(root / f"toy{i}", kind) for i, kind in enumerate(SETTINGS)}
    for kind, folder in folders.items():
        save_adapter(add_random_lora(toy_model(kind, torch.float32)), folder / "adapter", 4, 8.0, 0.05, str(folder))
    return folders | {"data": root / "pairs.jsonl"}


@pytest.fixture
def ask(toys, capsys, monkeypatch):
    """Asks a toy by the real command, in this process. Returns the printed lines, the answer's ids, and each pass's logits."""

    def run(*flags, kind: str = "llada-moe") -> tuple[list[str], list[int], list[torch.Tensor]]:
        logits, answers = [], []

        def kept(function, found):
            def wrapper(*arguments, **options):
                found.append(function(*arguments, **options))
                return found[-1]

            return wrapper

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sample, "guided_logits", kept(sample.guided_logits, logits))
            patch.setattr(sample, "generate", kept(sample.generate, answers))
            arguments = ["--backbone", toys[kind], "--prompt", PROMPT, "--length", 6, "--device", "cpu", *flags]
            sample.main([str(argument) for argument in arguments])
        return capsys.readouterr().out.rstrip("\n").split("\n"), answers[0][0].tolist(), logits

    return run


def left(lines: list[str]) -> list[int]:
    """How many places were still masked, line by line."""
    return [line.count("_") for line in lines]


# ---- what is printed, and what each flag does ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETTINGS)
def test_adapter_and_memory_each_change_the_logits(ask, toys, kind):
    """And both at once differ from either; the answer is always whole."""
    adapter = ["--adapter", toys[kind] / "adapter"]
    lines, _, plain = ask(kind=kind)
    assert left(lines)[0] == (8 if kind == "llada2" else 6)  # LLaDA2 fills whole blocks: 24 + 8 are 32 tokens
    logits = [plain[0], *(ask(*flags, kind=kind)[2][0] for flags in (adapter, ["--memory"], [*adapter, "--memory"]))]
    for i, one in enumerate(logits):
        assert one.isfinite().all()
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-3
    lines, ids, _ = ask(*adapter, "--memory", kind=kind)
    assert len(ids) == 6
    assert MASK not in ids
    layers = program.count(program.linear_layers(toy_model(kind)).values())
    assert lines[0] == f"LoRA on {layers} of {layers} linear layers, from {adapter[1]}"


def test_quiet_prints_the_answer_alone(ask):
    lines, ids, _ = ask()
    quiet, same, _ = ask("--quiet")
    assert len(lines) == 8  # all masked, six steps, the answer
    assert left(lines[:7]) == [6, 5, 4, 3, 2, 1, 0]
    assert quiet == lines[-1:]
    assert same == ids


def test_steps_blocks_and_schedules_share_the_tokens(ask):
    """Ten tokens in four steps: LLaDA commits 3 3 2 2, dLLM 2 3 2 3. Blocks are finished from left to right."""
    ten = ["--length", 10, "--steps", 4]
    assert left(ask(*ten)[0][:5]) == left(ask(*ten, "--schedule", "llada")[0][:5]) == [10, 7, 4, 2, 0]
    assert left(ask(*ten, "--schedule", "dllm")[0][:5]) == [10, 8, 5, 3, 0]
    lines, _, logits = ask("--block-length", 3, "--steps", 2)
    assert left(lines[:3]) == [6, 3, 0]
    assert lines[1].endswith("_ _ _")
    assert [len(rows) for rows in logits] == [3, 3]


def test_llada2_decodes_blocks_on_its_own_grid(ask, toys):
    """With the published settings where nothing else is asked for: blocks of 32 counted from the prompt's start, 32 steps a
    block, everything above 0.95 at once."""
    assert len(data.load_tokenizer(toys["llada2"]).encode_prompt(PROMPT)) == 24
    _, ids, logits = ask(kind="llada2")
    assert (len(ids), len(logits[0])) == (6, 8)  # the prompt leaves 8 places of the first block
    assert len(ask("--threshold", 0, kind="llada2")[2]) == 1 < len(logits) <= 8
    fine = ask("--block-length", 4, "--steps", 2, "--threshold", 1, kind="llada2")[2]
    assert [len(rows) for rows in fine] == [4, 2, 4, 2]


def test_a_threshold_commits_everything_above_it(ask):
    assert left(ask("--threshold", 0)[0][:2]) == [6, 0]


def test_suppressed_tokens_do_not_appear(ask):
    """Again and again what was chosen: it never comes back, and neither does [MASK]."""
    banned: list[int] = []
    for _ in range(3):
        ids = ask(*(["--suppress", *banned] if banned else []))[1]
        assert not set(ids) & {*banned, MASK}
        banned += sorted(set(ids))
    assert len(banned) >= 3


def test_temperature_and_seed_draw_other_tokens(ask):
    hot = [ask("--temperature", 5, "--seed", seed)[1] for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    assert hot[0] != ask()[1]
    written = [ask("--memory", "--seed", seed)[2][0] for seed in (0, 1)]
    assert not torch.equal(*written)


@pytest.mark.parametrize("flag", ["--cfg-scale 1", "--plain", "--dtype bfloat16", "--load-4bit", "--random-weights"])
def test_flags_of_the_backbone_change_the_logits(ask, flag):
    plain, other = ask()[2][0], ask(*flag.split())[2][0]
    assert other.isfinite().all()
    assert other.shape == plain.shape == (6, VOCABULARY)
    assert not torch.equal(plain, other)


def test_random_weights_need_no_tokenizer(ask, toys, tmp_path):
    shutil.copy(toys["llada2"] / "config.json", tmp_path)
    assert len(ask("--backbone", tmp_path, "--random-weights")[1]) == 6


def test_a_typed_mask_is_text(ask, toys):
    """ "<|mask|>" in a prompt is eight characters: it is not filled in, and the answer is as long as ever."""
    tokenizer = data.load_tokenizer(toys["llada-moe"])
    assert tokenizer.mask not in tokenizer.encode_prompt("<|mask|>")
    _, ids, logits = ask("--prompt", "<|mask|><|endoftext|>")
    assert len(ids) == len(logits) == len(logits[0]) == 6


def test_no_flag_is_left_untested():
    """Here, or with a tiny run in the two files that come before this one."""
    files = [Path(__file__), *(Path(__file__).with_name(name) for name in ("test_bad_input.py", "test_runs.py"))]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    flags = {name for action in sample.build_parser()._actions for name in action.option_strings}
    assert [name for name in sorted(flags - {"-h", "--help"}) if not re.search(rf"[\" ]{name}[\" =]", text)] == []


# ---- bad input -----------------------------------------------------------------------------------------------------------

# What is asked of a toy -> what the one line must say. {} stands for a folder of the test's own.
ASKED = {
    "no adapter there": ("--adapter {}/absent", "adapter_config.json is missing in .*absent"),
    "another backbone's adapter": ("--adapter {}/llada", "does not fit this backbone"),
    "a schedule for LLaDA2": ("--backbone {}/llada2 --schedule dllm", "--schedule is not for LLaDA2"),
    "too large a token": ("--suppress 5 576", "--suppress: 576 is no token; the vocabulary has 576"),
    "too few steps": ("--length 6 --block-length 2 --steps 2", "3 blocks: --steps must be at least that"),
    "no such backbone": ("--backbone {}/absent", "there is no folder"),
    "not a backbone": ("--backbone {}", "is no checkpoint: it has no config.json"),
    "no tokenizer": ("--backbone {}/bare", "tokenizer.json is missing"),
    "another mask": ("--backbone {}/mask", r"\[MASK\] is 525 in the tokenizer, 7 in config.json"),
    "a run besides": ("--run {}", "--run DIR of a --tiny run, or --backbone"),
    "an unknown dtype": ("--dtype float8", "invalid choice"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_cannot_be_answered_is_one_line(toys, tmp_path, refused, name):
    for kind in ("llada", "llada2"):
        (tmp_path / kind).symlink_to(toys[kind] if kind == "llada2" else toys[kind] / "adapter")
    write_checkpoint(tmp_path / "mask", "llada", mask_token_id=7)
    (write_checkpoint(tmp_path / "bare", "llada") / "tokenizer.json").unlink()
    flags, named = ASKED[name]
    base = ["--backbone", toys["llada-moe"], "--prompt", PROMPT, "--device", "cpu"]
    said = refused(sample.main, *base, *flags.replace("{}", str(tmp_path)).split())
    assert re.search(named, said), said


def test_what_names_a_backbone_goes_with_a_backbone(toys, refused):
    """A flag that --run would not look at is refused, not passed over."""
    foreign = (["--adapter", "y"], ["--random-weights"], ["--load-4bit"], ["--plain"], ["--dtype", "float32"])
    for rest, named in (
        *((["--run", "x", *flags], "go with --backbone, not with --run") for flags in foreign),
        ([], "say whose answer is wanted"),
    ):
        assert named in refused(sample.main, "--prompt", PROMPT, *rest)


@pytest.fixture
def tune(toys, tmp_path):
    """The command line of a short fine-tuning."""
    base = ["--backbone", toys["llada-moe"], "--data", toys["data"], "--steps", 1, "--lora-rank", 4, "--device", "cpu"]
    return [*base, "--out", tmp_path / "run"]


TUNED = {
    "no data": ("--data=", "--backbone needs --data"),
    "absent data": ("--data {}/absent.jsonl", "cannot read --data"),
    "nothing short enough": ("--max-length 3", "none of its 6 fits into --max-length 3 tokens"),
    "the other dial's flag": ("--noise 0.1", "unrecognized arguments: --noise"),
    "no LoRA": ("--lora-rank 0", "--lora-rank: 0 is not a whole number of at least 1"),
    "nothing to go on with": ("--resume", "there is no run in"),
    "a wrong name": ("--backbone llada-9b --random-weights", "llada-9b is neither llada-8b"),
}


@pytest.mark.parametrize("name", TUNED)
def test_what_cannot_be_tuned_is_one_line(tune, tmp_path, refused, name):
    flags, named = TUNED[name]
    assert named in refused(memdlm.main, *tune, *flags.replace("{}", str(tmp_path)).split())
    assert not (tmp_path / "run" / "adapter").exists()


def test_four_bits_without_bitsandbytes_say_what_to_install(tune, monkeypatch, refused):
    monkeypatch.setattr(memdlm.importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in refused(memdlm.main, *tune, "--load-4bit")


def test_the_tiny_run_does_not_start_under_torchrun(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "without torchrun" in refused(memdlm.main, "--tiny", "--out", tmp_path)


@pytest.mark.parametrize("file", ["memdlm.safetensors", "adapter_model.safetensors"])
def test_a_full_disk_loses_nothing(tune, tmp_path, monkeypatch, refused, file):
    """Whether the checkpoint or the adapter finds no room: one line, no half file, and what was there before is there still."""
    memdlm.main([str(argument) for argument in tune])
    before = contents(tmp_path / "run")

    def full(tensors, path, metadata):
        if Path(path).stem == Path(file).stem:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(program, "save_file", full)
    said = refused(memdlm.main, *tune)
    assert "No space left on device" in said
    assert "--out" in said
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys()
    assert after["adapter/adapter_model.safetensors"] == before["adapter/adapter_model.safetensors"]
    assert after[f"adapter/{file}" if "adapter" in file else file]
    config = json.loads(after["adapter/adapter_config.json"])
    assert config["r"] == 4
    memdlm.load_checkpoint(tmp_path / "run" / "memdlm.safetensors")


def test_a_full_gpu_is_one_line_that_says_what_to_lower(tune, monkeypatch, refused):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of ...")

    monkeypatch.setattr(memdlm, "train_step", no_memory)
    said = refused(memdlm.main, *tune)
    for flag in ("--batch", "--max-length", "--load-4bit", "--checkpoint-activations"):
        assert flag in said
