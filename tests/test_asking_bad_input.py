"""
test_asking_bad_input.py: what `eval_niah.py` cannot do is said in one line, before any work; and a folder with the answers of
another evaluation is left as it was.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from backbones import random_tensors, write_tensors
from huggingface_hub import constants
from running import contents, lines_of, only, read, toy_command

import eval_niah

# ---- another evaluation's folder -------------------------------------------------------------------------------------------

BEGUN = "--adapter {}/mdlm/adapter --tasks niah_single_2 --lengths 330 --steps 1 --samples 1 --haystack {}/essay.txt"
OTHER = {
    "--steps 2": "Base with steps 1, not 2",
    "--protocol harness": "Base with protocol 'original', not 'harness'",
    "--chat": "Base with chat False, not True",
    "--dtype bfloat16": "Base with dtype 'float32', not 'bfloat16'",
    "--load-4bit": "Base with load_4bit False, not True",
    "--babi {}": "Base with babi None, not '",
    "--haystack {}/pairs.jsonl": "Base with haystack '",
    "--adapter mdlm={}/memdlm/adapter": "Standard MDLM with adapter_model.safetensors '",
    "--backbone {tmp}/other": "Base with backbone '",
}


@pytest.mark.parametrize("flags", OTHER)
def test_answers_made_with_other_settings_are_not_taken_for_these(toy, ask_toy, tmp_path, refused, flags):
    """One line names what differs, before a model is loaded, and every file stays as it was."""
    out = ask_toy(BEGUN)
    before = contents(out)
    shutil.copytree(toy / "toy", tmp_path / "other")
    said = refused(eval_niah.main, *toy_command(toy, out, f"{BEGUN} {flags}".replace("{tmp}", str(tmp_path))))
    assert f"{out} holds answers of {OTHER[flags]}" in said
    assert "name another --out" in said
    assert contents(out) == before


def test_weights_that_were_replaced_are_noticed(toy, tmp_path, refused):
    """Under the same name: another config.json, or other files of weights, of the same size too."""
    shutil.copytree(toy / "toy", tmp_path / "toy")
    flags = f"--backbone {tmp_path}/toy --tasks niah_single_1 --lengths 330 --steps 1 --samples 1"
    eval_niah.main(toy_command(toy, tmp_path / "eval", flags))
    before, config = contents(tmp_path / "eval"), tmp_path / "toy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 10_000.0}))
    assert "Base with config.json '" in refused(eval_niah.main, *toy_command(toy, tmp_path / "eval", flags))
    shutil.copy(toy / "toy" / "config.json", config)
    tensors = random_tensors(json.loads(config.read_text()), seed=1)
    size = (tmp_path / "toy" / "model.safetensors").stat().st_size
    write_tensors(tmp_path / "toy", tensors, shards=1)
    assert (tmp_path / "toy" / "model.safetensors").stat().st_size == size
    assert "Base with model.safetensors '" in refused(eval_niah.main, *toy_command(toy, tmp_path / "eval", flags))
    assert contents(tmp_path / "eval") == before


def test_an_adapter_of_another_strength_is_noticed(toy, tmp_path, refused):
    """Its tensors are the same; lora_alpha in adapter_config.json is not."""
    adapter = Path(shutil.copytree(toy / "mdlm" / "adapter", tmp_path / "adapter"))
    flags = f"--backbone {{}}/toy --adapter mdlm={adapter} --tasks niah_single_1 --lengths 330 --steps 1 --samples 1"
    eval_niah.main(toy_command(toy, tmp_path / "eval", flags))
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 640}))
    assert "Standard MDLM with adapter_config.json '" in refused(eval_niah.main, *toy_command(toy, tmp_path / "eval", flags))


STORY = "1 Mary moved to the {0}.\n2 Where is Mary? \t{0}\t1\n3 John went to the {0}.\n4 Where is John? \t{0}\t3\n"


def test_the_stories_that_are_read_are_those_that_are_told_apart(toy, tmp_path, refused):
    """bAbI's archive has files of one name in several folders: a change in the one that is read is noticed, in others not."""
    for folder in ("en-10k", "shuffled-10k"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "qa1_x_train.txt").write_text(STORY.format("office"))
    flags = f"--backbone {{}}/toy --babi {tmp_path} --tasks babilong_qa1 --lengths 700 --steps 1 --samples"
    eval_niah.main(toy_command(toy, tmp_path / "eval", f"{flags} 1"))
    (tmp_path / "shuffled-10k" / "qa1_x_train.txt").write_text(STORY.format("garden"))
    eval_niah.main(toy_command(toy, tmp_path / "eval", f"{flags} 2"))
    (tmp_path / "en-10k" / "qa1_x_train.txt").write_text(STORY.format("garden"))
    assert "Base with qa1_x_train.txt '" in refused(eval_niah.main, *toy_command(toy, tmp_path / "eval", f"{flags} 2"))


def test_anchor_ratios_that_look_alike_are_two_rows(toy, tmp_path):
    flags = "--backbone {}/toy --tasks niah_single_1 --lengths 330 --steps 1 --samples 1 --memory"
    flags += " --anchor-ratio 0.3333333 0.3333334"
    eval_niah.main(toy_command(toy, tmp_path / "eval", flags))
    methods = [record["method"] for record in read(tmp_path / "eval")["niah"]]
    assert methods == ["base", "base_inference@0.3333333", "base_inference@0.3333334"]


def test_chat_without_a_template_is_refused(toy, tmp_path, refused):
    """Or --chat would change nothing, and nobody would know."""
    backbone = Path(shutil.copytree(toy / "toy", tmp_path / "toy"))
    config = backbone / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    flags = f"--backbone {backbone} --tasks niah_single_1 --lengths 330 --chat"
    assert "has no chat template" in refused(eval_niah.main, *toy_command(toy, tmp_path / "eval", flags))


def test_another_seeds_answers_stand_beside(ask_toy):
    """They are other questions, and none of them is taken for the other's."""
    flags = "--tasks niah_single_1 --lengths 330 --steps 1 --samples 1"
    one = lines_of(ask_toy(flags))
    out = ask_toy(f"{flags} --seed 1")
    assert lines_of(out) == [*one, *lines_of(ask_toy(f"{flags} --seed 1", out="alone"))]
    assert [record["seed"] for record in read(out)["niah"]] == [1]


# ---- bad input -------------------------------------------------------------------------------------------------------------

# What is asked of a run or of a toy -> what the one line must say. {} is the toys' folder.
BAD = {
    "an unknown task": ("--backbone {}/toy --tasks niah_single_9", "niah_single_9"),
    "a small task for a backbone": ("--backbone {}/toy --tasks ruler_vt mv", "mv is not a task of --backbone, which has niah_"),
    "a benchmark for a run": ("--run {run} --tasks mv ruler_vt", "ruler_vt is not a task of --run, which has mv, vt"),
    "too long for a run": ("--run {run} --lengths 96 8193", "--lengths 8193: the small tasks go up to 8192"),
    "too short for a small task": ("--run {run} --tasks mv qa5 --lengths 95", "qa5 needs at least 96 tokens"),
    "neither run nor backbone": ("", "--run DIR or --backbone NAME_OR_DIR"),
    "both": ("--run {run} --backbone {}/toy", "--run DIR or --backbone NAME_OR_DIR"),
    "no --out": ("--run {run} --out=", "where to write, --out DIR"),
    "no haystack": ("--backbone {}/toy --haystack {}/absent", "cannot read --haystack .*absent"),
    "a folder for a haystack": ("--backbone {}/toy --haystack {}", "cannot read --haystack"),
    "a haystack that is no text": ("--backbone {}/toy --haystack {tmp}/bytes", "cannot read --haystack .*bytes"),
    "an empty essay": ("--backbone {}/toy --haystack {tmp}/empty --tasks niah_single_2 --lengths 400", "has no word in it"),
    "an empty background": ("--backbone {}/toy --haystack {tmp}/empty --tasks babilong_qa1 --lengths 900", "no sentence"),
    "no bAbI": ("--backbone {}/toy --babi {tmp}/absent --tasks babilong_qa1 --lengths 900", "no qa1_.*absent"),
    "pairs, no measurement": ("--backbone {}/toy --data {}/pairs.jsonl", "--exposure-bias and --data FILE go together"),
    "a measurement, no pairs": ("--backbone {}/toy --exposure-bias", "--exposure-bias and --data FILE go together"),
    "absent pairs": ("--backbone {}/toy --exposure-bias --data {}/absent.jsonl", "cannot read --data .*absent.jsonl"),
    "pairs too long": ("--backbone {}/toy --exposure-bias --data {}/pairs.jsonl --max-length 3", "--max-length 3"),
    "no bias steps": ("--backbone {}/toy --exposure-bias --data {}/pairs.jsonl --bias-steps 0", "--bias-steps"),
    "steps of no walk": ("--backbone {}/toy --bias-steps 4", "go with --exposure-bias"),
    "a limit of no pairs": ("--run {run} --max-length 40", "go with --exposure-bias"),
    "one ratio of another rule": ("--run {run} --anchor-ratio 0.3", "--anchor-ratio needs --write paper"),
    "a sweep of another rule": ("--run {run} --anchor-ratio 0.1 0.2", "--anchor-ratio needs --write paper"),
    "the same for a backbone": ("--backbone {}/toy --memory --write surprise --anchor-ratio 0.1 0.2", "needs --write paper"),
    "no such ratio": ("--backbone {}/toy --memory --anchor-ratio 0.1 1.5", "--anchor-ratio"),
    "two adapters of one method": (
        "--backbone {}/toy --adapter mdlm={}/mdlm/adapter mdlm={}/memdlm/adapter",
        "mdlm/adapter and .*memdlm/adapter are both of mdlm",
    ),
    "an adapter of two minds": ("--backbone {}/toy --adapter {}/mdlm/adapter mdlm={}/memdlm/adapter", "are both of mdlm"),
    "an adapter without a method": (
        "--backbone {}/toy --adapter {tmp}/adapter",
        "say what trained it, --adapter mdlm=.*or memdlm=",
    ),
    "an adapter of an unknown method": ("--backbone {}/toy --adapter sft={}/mdlm/adapter", "say what trained it"),
    "no such adapter": ("--backbone {}/toy --adapter memdlm={}/absent", "cannot read .*absent/adapter_model.safetensors"),
    "no such backbone": ("--backbone {}/absent", "there is no folder .*absent"),
    "no network": ("--backbone llada-moe", "cannot download inclusionAI/LLaDA-MoE-7B-A1B-Base"),
    "an unknown protocol": ("--backbone {}/toy --protocol mine", "invalid choice"),
    "the weights' folder for results": (
        "--backbone {}/toy --tasks niah_single_1 --lengths 400 --out {}/toy",
        "is a run, whose",
    ),
    "--plain": ("--backbone {}/toy --plain", "--plain"),
}
# Each flag of a backbone's, for a run.
BAD |= {
    f"a run and {flags}": (f"--run {{run}} {flags}", f"{flags.split()[0]} goes with --backbone, not with --run")
    for flags in ("--adapter x", "--random-weights", "--load-4bit", "--dtype float32", "--memory", "--seed 1")
    + ("--protocol harness", "--chat", "--haystack x", "--babi x")
}
# And each flag of a memory's, without one.
BAD |= {
    f"{flags}, no memory": (f"--backbone {{}}/toy {flags}", "say how a memory is written: add --memory")
    for flags in ("--write paper", "--write-lr 1", "--write-rank 2", "--write-passes 2", "--anchor-ratio 0.3")
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_is_one_line(quick, toy, tmp_path, monkeypatch, refused, name):
    """Before any work, and nothing is written. Nothing listens on port 9, where the hub is looked for."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    shutil.copytree(toy / "mdlm" / "adapter", tmp_path / "adapter")
    flags, named = BAD[name]
    flags = flags.replace("{}", str(toy)).replace("{run}", str(quick)).replace("{tmp}", str(tmp_path))
    said = refused(eval_niah.main, "--out", tmp_path / "eval", "--device", "cpu", *flags.split())
    assert re.search(named, said), said
    assert not (tmp_path / "eval").exists()


def test_every_flag_of_a_backbone_is_refused_for_a_run():
    """That the table above has them all."""
    assert {f"--{name.replace('_', '-')}" for name in eval_niah.BACKBONE_ALONE} == {
        name.split()[3] for name in BAD if name.startswith("a run and")
    }


@pytest.mark.parametrize("task", ["niah_multiquery", "ruler_cwe", "babilong_qa3"])
def test_a_length_that_is_too_short_names_one_that_works(ask_toy, toy, tmp_path, refused, task):
    """For all questions that are asked, not the first one alone."""
    flags = f"--tasks {task} --steps 1 --samples 4 --lengths"
    said = refused(eval_niah.main, *toy_command(toy, tmp_path / "eval", f"{flags} 64"))
    least = int(re.search(rf"{task} needs at least (\d+) tokens; --lengths 64 is too short", said)[1])
    assert not (tmp_path / "eval").exists()
    assert only(read(ask_toy(f"{flags} {least}"))["niah"], n=4)


def test_a_schedule_is_not_for_llada2(toy, tmp_path, refused):
    flags = "--tasks niah_single_1 --lengths 330 --samples 1 --schedule dllm"
    assert "--schedule is not for LLaDA2" in refused(eval_niah.main, *toy_command(toy, tmp_path, flags, "llada2"))
