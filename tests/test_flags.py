"""
test_flags.py: each flag changes what it says and nothing else; and none is without a test.
"""

import re
from pathlib import Path
from unittest import mock

import pytest
from running import NAMES, differing, evaluated, finished, recorded, say, train, weights

import sample
from lab import ask, evaluate, report, tiny, training

BASE, MDLM, MEMDLM = NAMES
USUAL = "--steps 2 --memory-clip 0.01 --save-every 9"  # what each of these flags is tried beside
CHANGED = {  # group of flags -> the checkpoints that they change
    "pretraining": {BASE, MDLM, MEMDLM},
    "fine-tuning set": {MDLM, MEMDLM},
    "outer loop": {MDLM, MEMDLM},
    "inner loop": {MEMDLM},
    "no number": set(),
}
GROUPS = {
    "pretraining": "--pretrain-steps 3; --pretrain-batch 8; --pretrain-lr 1e-3; --length 80",
    "fine-tuning set": "--noise 0; --examples 8; --stretch 2; --wording new",
    "outer loop": "--steps 3; --batch 4; --lr 1e-2; --warmup 1; --clip 0.01",
    "inner loop": "--memory-rank 4 --memory-alpha 8; --memory-alpha 64; --memory-lr 0.1; "
    "--memory-clip 0; --memory-clip-by global; --memory-fraction 1; --memory-scope batch; "
    "--memory-epochs 2; --start-scale 3; --memory-steps 1; --memory-strategy anchor_only; "
    "--memory-loss kl; --memory-targets newly_revealed; --memory-places ffn+attention; "
    "--memory-form full",
    "no number": "--save-every 1; --seeds 2; --control-lr 1e-5; --memory-strategy consistent",
}


def trained(out: Path, flags: str) -> dict:
    """The weights of a very short run. Nothing is measured, and the base is taken where it fits."""
    pretrained_here = re.search("--pretrain|--length", flags)
    bases = [] if pretrained_here else ["--bases", finished()]
    with mock.patch.object(training, "measure_losses", return_value={"overshoot": 0.0}):
        train(*USUAL.split(), *flags.split(), *bases, "--out", out)
    return weights(out)


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict:
    return trained(tmp_path_factory.mktemp("usual"), "")


@pytest.mark.parametrize("group", GROUPS)
def test_each_flag_changes_what_it_says_and_nothing_else(usual, tmp_path, group):
    """Settings of the inner loop leave Standard MDLM's weights alone, those of the fine-tuning the
    base, and a flag that says nothing new changes nothing."""
    for i, flag in enumerate(GROUPS[group].split("; ")):
        changed = differing(usual, trained(tmp_path / str(i), flag))
        assert changed == CHANGED[group], f"{flag} changes {changed or 'nothing'}"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    """A run of one seed and one step."""
    run = tmp_path_factory.mktemp("short") / "run"
    train("--steps", 1, "--bases", finished(), "--out", run)
    return run


def test_flags_of_the_writing_change_the_rows_that_write(short_run, tmp_path):
    """Rows that write their prompts read with another memory; the others keep every bit."""

    def read(flags: str) -> dict:
        """The exposure bias of each row."""
        out = tmp_path / flags.replace(" ", "")
        records = evaluated(short_run, out, "--steps", 1, *flags.split())["exposure_bias"]
        return {row: report.matching(records, method=row) for row in report.TITLES}

    usual, paper = read(""), read("--write paper --write-lr 3")
    writing = set(report.WITH_MEMORY.values())
    assert {row for row in usual if paper[row] != usual[row]} == writing
    for flags in ("--write-lr 0.1", "--write-rank 4"):
        other = read(flags)
        assert {row for row in usual if other[row] != usual[row]} == writing, flags
    for flags in ("--anchor-ratio 0.9", "--write-passes 2"):
        other = read(f"--write paper --write-lr 3 {flags}")
        assert {row for row in usual if other[row] != paper[row]} == writing, flags


def test_decoding_flags_decide_the_plan(short_run, tmp_path, monkeypatch):
    """--steps, --block-length and --threshold of the evaluation: here, of 4 tokens."""
    plans = []
    monkeypatch.setattr(sample, "plan_blocks", recorded(sample.plan_blocks, plans))
    generate = mock.Mock(side_effect=sample.generate)
    monkeypatch.setattr(sample, "generate", generate)
    evaluated(short_run, tmp_path, *"--steps 4 --block-length 2 --threshold 0.9".split())
    assert [(0, 2, [1, 1]), (2, 4, [1, 1])] in plans
    assert 0.9 in [call.kwargs.get("threshold") for call in generate.call_args_list]


def test_memory_models_decide_what_is_written(short_run, tmp_path):
    """Whose prompts, and of several lengths the longest; without a memory all are read."""
    flags = "--lengths 64 80 --tasks cwe --steps 1".split()
    for models in ("mdlm memdlm", ""):
        out = tmp_path / f"of {models}"
        scores = evaluated(short_run, out, *flags, "--memory-models", *models.split())["niah"]
        lengths = {row: [] for row in report.distinct(scores, "method")}
        for one in scores:
            lengths[one["method"]].append(one["length"])
        expected = {row: [64, 80] for row in report.PLAIN.values()}
        expected |= {report.WITH_MEMORY[name]: [80] for name in models.split()}
        assert lengths == expected


def test_sample_shows_each_step_and_the_answer(capsys):
    """One token fewer is masked after each pass; then comes the answer, and --quiet shows it alone.
    --steps 2 commits half of the answer each time, --threshold 0 everything at once, and blocks are
    finished from left to right."""

    def masks(*flags) -> list[int]:
        """How many tokens of the answer are still masked in each line that shows a step."""
        return [line.count("_") for line in say(capsys, finished(), *flags)[:-1]]

    assert masks("--length", 6) == [5, 4, 3, 2, 1, 0]
    lines = say(capsys, finished(), "--length", 6)
    assert say(capsys, finished(), "--length", 6, "--quiet") == lines[-1:]
    assert masks("--length", 8, "--steps", 2) == [4, 0]
    assert masks("--length", 8, "--threshold", 0) == [0]
    lines = say(capsys, finished(), "--length", 8, "--block-length", 4)
    assert all(line.endswith(" _ _ _ _") for line in lines[:4])


def test_sample_is_reproducible_and_its_flags_matter(capsys):
    """(A memory may leave the words of so small a model as they are: only their number is seen.)"""
    hot = ["--length", 12, "--temperature", 3]
    usual = say(capsys, finished(), *hot)
    assert say(capsys, finished(), *hot) == usual != say(capsys, finished(), "--length", 12)
    for flag in ("--seed 1", "--cfg-scale 1e4", "--model base", "--model mdlm-0.0001"):
        assert say(capsys, finished(), *hot, *flag.split()) != usual, flag
    written = "--memory --write-lr 5 --write-rank 4 --write-passes 2".split()
    assert len(say(capsys, finished(), *hot, *written)) == len(usual)


def test_no_flag_is_without_a_test():
    """Each flag that --help lists is named in these tests."""
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    for program in (tiny, ask, evaluate):
        for flag in set(re.findall(r"--[a-z][a-z-]+", program.build_parser().format_usage())):
            pattern = rf"{flag}(?![\w-])"
            assert any(re.search(pattern, text) for text in texts), f"{flag} is not tested"
