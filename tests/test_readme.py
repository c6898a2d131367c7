"""
test_readme.py: what the README prints and claims is what the recorded runs in assets/results.json
say, made again from their records.
"""

import re

import pytest
from running import ROOT, start

from lab import report
from lab.tools import read_json

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = read_json(ROOT / "assets" / "results.json")
MORE = RESULTS["more"]  # further evaluations of the same models, by the name of their folder


def short(text: str) -> str:
    """Numbers as the README's text has them: without a zero before the point."""
    return re.sub(r"\b0\.", ".", text)


def test_the_library_example_runs_as_it_stands():
    """The README's lines of Python take three steps and print an answer."""
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = start("-c", example)
    output, errors = done.communicate(timeout=60)
    assert (done.returncode, errors) == (0, "")
    assert output.strip(), "no answer was printed"


def test_what_the_first_command_ends_with_is_what_the_records_say():
    """Frontier, comparisons, table and sentences are computed again from scores and losses; and the
    README shows them as they are printed."""
    frontier = report.frontier_of(RESULTS, RESULTS["config"]["run"])
    assert frontier == RESULTS["frontier"]
    assert report.comparisons(frontier) == RESULTS["comparisons"]
    for line in report.summary(RESULTS).splitlines():
        assert line.strip() in README, f"the README does not show: {line}"


def gains(records: list[dict], better: str, worse: str, length: int) -> list[float]:
    """Row `better` minus row `worse`, a value a seed."""
    rows = [report.matching(records, method=row, length=length) for row in (better, worse)]
    ours, theirs = (report.seed_means(row, "score") for row in rows)
    return [score - theirs[seed] for seed, score in ours.items()]


def equal_loss(records: list[dict], length: int, times: str) -> list[float]:
    """The gain at equal learnt loss, at a length that another evaluation has asked for."""
    points = []
    for one in RESULTS["frontier"]:
        where = {"method": one["method"], "seed": one["seed"], "length": length}
        points.append(one | {times: report.mean_of(report.matching(records, **where), "score")})
    return report.comparisons(points, times)["equal_loss"]["values"]


def last(key: str, method: str) -> list[float]:
    """A loss after the last step, a value a seed."""
    logged = report.matching(RESULTS["loss"], method=method, step=150)
    return list(report.seed_means(logged, key).values())


def bias(key: str, method: str) -> list[float]:
    """A mean over the mask ratios below 1, a value a seed."""
    later = [one for one in RESULTS["exposure_bias"] if one["mask_ratio"] < 1]
    return list(report.seed_means(report.matching(later, method=method), key).values())


def gains_of_gains(written: str, plain: str) -> list[float]:
    """How much more writing gains on MemDLM than on another model, at 4x."""
    ours = gains(MORE["written"], "memdlm_train_inference", "memdlm_train", 384)
    return [a - b for a, b in zip(ours, gains(MORE["written"], written, plain, 384))]


MAIN, FOUND = RESULTS["niah"], RESULTS["comparisons"]
MEMDLM, MDLM = "memdlm_train", "mdlm"
DIFFERENCES = {
    "equal rate, 4x": FOUND["equal_rate"]["values"],
    "of it by a lower rate": FOUND["lower_rate"]["values"],
    "equal loss, 4x": FOUND["equal_loss"]["values"],
    "equal rate, 1x": gains(MAIN, MEMDLM, MDLM, 96),
    "equal loss, 1x": equal_loss(MAIN, 96, "1x"),
    "equal loss, 4x, 192 answers": equal_loss(MORE["many"], 384, "4x"),
    "equal rate, 4x, 192 answers": gains(MORE["many"], MEMDLM, MDLM, 384),
    "equal loss, 6x": equal_loss(MORE["lengths"], 576, "6x"),
    "equal rate, 6x": gains(MORE["lengths"], MEMDLM, MDLM, 576),
    "MemDLM minus base, 1x": gains(MAIN, MEMDLM, "base", 96),
    "MemDLM minus base, 4x": gains(MAIN, MEMDLM, "base", 384),
    "Standard MDLM minus base, 4x": gains(MAIN, MDLM, "base", 384),
    "writing, MemDLM, 4x": gains(MAIN, "memdlm_train_inference", MEMDLM, 384),
    "writing, Standard MDLM, 4x": gains(MORE["written"], "mdlm_inference", MDLM, 384),
    "writing, base, 4x": gains(MORE["written"], "base_inference", "base", 384),
    "writing, MemDLM minus base, 4x": gains_of_gains("base_inference", "base"),
    "writing, MemDLM, 1x": gains(MORE["short"], "memdlm_train_inference", MEMDLM, 96),
}
MEANS = {
    "loss, MemDLM": last("train_without_memory", "memdlm"),
    "loss, Standard MDLM": last("train_without_memory", "mdlm"),
    "loss with its memory, MemDLM": last("train_with_memory", "memdlm"),
    "R_EB, MemDLM": bias("ratio", MEMDLM),
    "R_EB, Standard MDLM": bias("ratio", MDLM),
    "gap, MemDLM": bias("gap", MEMDLM),
    "gap, Standard MDLM": bias("gap", MDLM),
    "gap at a lower rate": bias("gap", "mdlm-8e-05"),
}


@pytest.mark.parametrize("what", [*DIFFERENCES, *MEANS])
def test_every_number_of_the_claims_is_made_of_the_records(what):
    """As the README has it: a difference with its 95% t-interval over bases, or a mean ± that."""
    if what in MEANS:
        said = short(report.interval_text(MEANS[what]))
    else:
        said = short(report.difference_text(DIFFERENCES[what]))
    assert said in " ".join(README.split()), f"{what}: the README should say {said}"


def test_every_interval_of_the_readme_is_one_of_these():
    """No number with an interval stands there that nobody has made of the records. (That of the
    bases before these is the one exception, and the text says so.)"""
    known = {short(report.difference_text(values)) for values in DIFFERENCES.values()}
    known |= {short(report.interval_text(values)) for values in MEANS.values()}
    known.add("+.061 [.019, .102]")
    text = " ".join(README.split())
    found = re.findall(r"[+-]\.\d{3} \[[^\]]+\]|(?<![\d|] )\b\d*\.\d{3} ± \.?\d+\.?\d*", text)
    claims = text.partition("## Claims")[2].partition("## The idea")[0]
    unknown = {one for one in found if one in claims} - known
    assert not unknown, f"not made of assets/results.json: {unknown}"
