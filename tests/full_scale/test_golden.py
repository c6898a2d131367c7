"""
test_golden.py: our numbers equal those of the published code.

    python -m pytest tests/full_scale/test_golden.py [--golden DIR]

The records were made by running the published code unmodified (float32, CPU) on tiny random models.
Every record below DIR is found by its format (FORMATS, at the end) and replayed as a test of its
own; DIR is tests/golden, a small part, unless said otherwise. All randomness is in the record,
which is why every draw in memdlm.py and sample.py is an argument.

What cannot be replayed fails: an unknown setting, sampler or table, a file without its partner, and
every entry of a record that nothing was compared with (replaying.Record). Files in none of the
formats are left alone.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import replaying
import torch
from commands import questions
from remaking import REMAKE, remake_common_example, ruler_task
from replaying import MASK, PAD, Record, close, load, model_named, part, read
from safetensors import safe_open
from safetensors.torch import load_file
from test_published import CHECKS
from torch import Tensor

import sample
from data import TINY
from full_scale import babilong, documents, ruler, samplers, scoring
from full_scale.checkpoints import on_meta, published_tensors
from full_scale.configs import BACKBONES, read_llada_config
from full_scale.drafts import Draft, Style
from full_scale.prompts import BENCHMARKS
from memdlm import corrupt

# ---- checkpoints and forward passes --------------------------------------------------------------


def replay_checkpoint(folder: Path) -> None:
    """Every published tensor is in our model, bit for bit, and no other is wanted."""
    model, recorded = load(folder), {}
    for path in folder.glob("*.safetensors"):
        recorded |= load_file(path)
    assert recorded.keys() == published_tensors(model).keys()
    for name, tensor in recorded.items():
        assert torch.equal(part(model.state_dict(), model, name), tensor), name


@torch.no_grad()
def replay_forward(path: Path, case: str) -> None:
    """Logits, the output of every layer and the scores of every router."""
    model, record = load(path.with_name(path.stem.replace("forward", "checkpoint", 1))), Record({})
    for key, tensor in load_file(path).items():
        if key.startswith(f"{case}."):
            record[key.removeprefix(f"{case}.")] = tensor
    ids, attention_mask, scores = record["input_ids"], record.get("attention_mask"), []
    hooks = []
    for i in model.config.moe_layers:
        router = model.layers[i].mlp.router
        hooks.append(router.register_forward_hook(lambda *call: scores.append(call[2])))
    ours = {"logits": model(ids, attention_mask)}
    for hook in hooks:
        hook.remove()
    if scores:
        ours["router_logits"] = torch.stack(scores)
    outputs = [model.embedding(ids)]
    for i in range(model.config.layers):
        outputs.append(model.run(outputs[-1], i, i + 1, attention_mask))
    ours["last_layer_output_before_final_norm"] = outputs[-1]
    ours["hidden_states"] = torch.stack([*outputs[:-1], model.norm(outputs[-1])])
    for name, value in ours.items():
        close(value, record[name], "values", name)
    record.finish(case)


# ---- tables --------------------------------------------------------------------------------------


def replay_table(table: Record | list[Record], name: str, path: Path) -> None:
    """Tables of the inner loop, most of which tests/test_published.py compares."""
    if name == "three_outer_steps":
        replaying.replay_training(table, path.parents[1])
    else:
        CHECKS[name](table)
    for record in table if isinstance(table, list) else [table]:
        record.about("rule")
        record.finish(name)


SCHEDULES = {"llada": sample.commit_schedule, "dllm_linear": samplers.rounded_schedule}


def replay_schedule(table: Record, name: str, path: Path) -> None:
    """The keys are "tokens,steps", the values say how many tokens each step commits."""
    for key, quotas in table.items():
        tokens, steps = map(int, key.split(","))
        assert SCHEDULES[name](tokens, steps) == quotas, key


# ---- samplers and likelihood ---------------------------------------------------------------------


def compare_decoding(decode: Callable[..., Tensor], pads: list[int], canvas: list, passes: list):
    """Every commit of every pass of decode(watch=...), in its place and with its confidence, and
    the canvas in the end.

    Ours begins with `pads` tokens of padding, which the recorded one has at its end. The recorded
    confidence is the model's probability, even where tokens are suppressed: ours takes that into
    account.
    """
    plain, choices, canvases = [], [], []
    choose_tokens, select = sample.choose_tokens, sample.select

    def note_tokens(logits: Tensor, *rest) -> tuple[Tensor, Tensor]:
        tokens, confidence = choose_tokens(logits, *rest)
        plain.append(logits.softmax(-1).gather(1, tokens[:, None])[:, 0])
        return tokens, confidence

    def note_places(confidence: Tensor, *rest) -> Tensor:
        chosen = select(confidence, *rest)
        choices.append((chosen, confidence.masked_scatter(confidence >= 0, plain[-1])))
        return chosen

    with mock.patch.multiple(sample, choose_tokens=note_tokens, select=note_places):
        decode(watch=canvases.append)
    ours = [row[pad:] + [PAD] * pad for row, pad in zip(canvases[-1].tolist(), pads)]
    assert ours == canvas
    taken = [(*choice, after) for choice, after in zip(choices, canvases) if choice[0].any()]
    passes = [rows for rows in passes if any(rows)]  # in some, nothing is committed
    assert len(taken) == len(passes)
    for k, (chosen, probability, after) in enumerate(taken):
        for row, (pad, commits) in enumerate(zip(pads, passes[k], strict=True)):
            at, commits = chosen[row].nonzero()[:, 0], sorted(commits)
            assert at.tolist() == [place + pad for place, _, _ in commits], f"pass {k}"
            assert after[row, at].tolist() == [token for _, token, _ in commits], f"pass {k}"
            confidences = [confidence for _, _, confidence in commits]
            close(probability[row, at], confidences, "confidence", f"confidences of pass {k}")


# sampler -> our plan of blocks, and what it calls the lengths of the answer and of a block
SAMPLERS = {
    "LLaDA generate.py": (sample.plan_blocks, "gen_length", "block_length"),
    "dllm MDLMSampler": (samplers.dllm_blocks, "max_new_tokens", "block_size"),
}


def replay_trace(trace: Record, name: str, path: Path) -> None:
    """A batch of answers. dLLM pads prompts of several lengths on the right, we do on the left: it
    is the same to attention, which sees no padding and knows only relative places."""
    plan, length, block_length = SAMPLERS[trace["sampler"].partition(" (")[0]]
    rows, length, visible = trace["prompts"], trace[length], trace["attention_mask"]
    blocks = plan(length, trace["steps"], trace[block_length])
    pads = [max(map(len, rows)) - len(row) for row in rows]
    prompts = torch.tensor([[PAD] * pad + row for pad, row in zip(pads, rows)])
    if visible is None:
        visible = [[0] * pad + [1] * len(row) for pad, row in zip(pads, rows)]
    options = {
        "cfg_scale": trace.get("cfg_scale", 0.0),
        "attention_mask": torch.tensor([row + [1] * length for row in visible]),
        "suppress": trace.get("suppress_tokens") or [],
    }
    model = model_named(trace["model"], path.parents[1])
    decode = partial(sample.generate, model, prompts, blocks, **options)
    compare_decoding(decode, pads, trace["output_ids"], trace["commits_per_model_call"])
    margins = ("min_confidence_gap_selected_vs_rejected", "min_logit_gap_top1_top2")
    trace.about("prompt_seed", *margins)
    trace.finish(name)


def replay_block_trace(trace: Record, name: str, path: Path) -> None:
    """LLaDA2's block sampler, whose record has every change of the canvas."""
    assert trace["sampler"] == "memdlm/pipelines/llada21/sampler.py LLaDA2Sampler.sample"
    model, prompt = load(path.parent / "checkpoint"), torch.tensor([trace["prompt"]])
    settings = ("max_new_tokens", "steps_per_block", "block_size", "threshold")
    plan = [trace[setting] for setting in settings]
    decode = partial(samplers.generate_llada2, model, prompt, *plan, suppress=[])
    changes, passes = trace["changes_per_model_call"], []
    for call in changes:
        assert all(old == MASK for _, old, _, _ in call)
        passes.append([[(place, new, probability) for place, _, new, probability in call]])
    assert (len(changes), trace["n_edits_of_committed_tokens"]) == (trace["n_model_calls"], 0)
    compare_decoding(decode, [0], [trace["output_ids"]], passes)
    trace["decision_margins"].about(*trace["decision_margins"])
    trace.about("prompt_seed")
    trace.finish(name)


def replay_editing(trace: Record, name: str, path: Path) -> None:
    """LLaDA2.1's sampler, which also replaces what it has committed: every change of every call.
    Of `generate` the record has the input of each call: what the last one did, it cannot show."""
    _, _, method = trace["sampler"].partition(" (")[0].rpartition(" ")
    assert method in ("LLaDA21Sampler.sample", "LLaDA2MoeModelLM.generate")
    model, prompt = load(path.parent / "checkpoint"), torch.tensor([trace["prompt"]])
    known, size = {"eos": trace.get("eos_id")}, "block_length" if "steps" in trace else "block_size"
    thresholds = trace["editing_threshold"], trace[size], trace["threshold"]
    length = trace["gen_length" if "steps" in trace else "max_new_tokens"]
    plan = (length, *thresholds, trace["num_to_transfer"], trace["max_post_steps"])
    calls, probabilities = [prompt], []
    fill_and_edit = samplers.fill_and_edit

    def note(canvas: Tensor, block: Tensor, given: Tensor, logits: Tensor, *rest) -> Tensor:
        probabilities.append(
            torch.zeros(canvas.shape).masked_scatter(block, logits.softmax(-1).amax(-1))
        )
        return fill_and_edit(canvas, block, given, logits, *rest)

    with mock.patch.object(samplers, "fill_and_edit", note):
        answer = samplers.generate_editing(model, prompt, *plan, **known, watch=calls.append)
    changes, edits = [], 0
    for before, after, probability in zip(calls, calls[1:], probabilities):
        before = torch.nn.functional.pad(before, (0, after.shape[1] - before.shape[1]), value=MASK)
        places = (before != after)[0].nonzero()[:, 0].tolist()
        edits += int((before[0, places] != MASK).sum())
        changes.append(
            [(i, int(before[0, i]), int(after[0, i]), probability[0, i]) for i in places]
        )
    recorded = trace["changes_per_model_call"]
    if "steps" in trace:
        output, last = answer[0].tolist(), changes[len(recorded) :]
        output = output[: output.index(PAD) + 1] if PAD in output else output
        assert last in ([], [[]])
    else:
        output = calls[-1][0].tolist()
        assert len(changes) == len(recorded)
    assert output == trace["output_ids"]
    for k, (ours, theirs) in enumerate(zip(changes, recorded)):
        assert [one[:3] for one in ours] == [tuple(one[:3]) for one in sorted(theirs)], f"call {k}"
        for one, other in zip(ours, sorted(theirs)):
            close(one[3], other[3], "confidence", f"confidences of call {k}")
    assert trace["n_model_calls"] == len(recorded)
    assert trace["n_edits_of_committed_tokens"] == edits
    trace["decision_margins"].about(*trace["decision_margins"])
    trace.about("prompt_seed", "steps")
    trace.finish(name)


def replay_likelihood(entry: Record, name: str, path: Path) -> None:
    """The Monte-Carlo estimate on the recorded perturbations."""
    x0 = torch.tensor(entry["prompt"] + entry["answer"])
    perturbed = torch.tensor(entry["perturbed"]).flatten(0, 1)
    masked, share = perturbed == MASK, torch.tensor(entry["p_mask"]).flatten()
    assert list(perturbed.shape) == [entry["mc_num"], len(x0)]
    assert torch.equal(perturbed, corrupt(x0, masked, MASK))
    model, prompt = model_named(entry["model"], path.parents[1]), len(entry["prompt"])
    ours = scoring.log_likelihood(model, x0, prompt, masked, share, entry["cfg_scale"])
    close(ours.mean(), entry["log_likelihood"], "loss", "log likelihood")
    entry.about("batch_size")
    entry.finish(name)


def replay_header(path: Path) -> None:
    """What stands beside the records of a file: the special tokens, and no other records."""
    file = read(path)
    records = {"traces", "log_likelihood", "single", "dataset_level"}
    assert file.keys() <= records | {"mask_id", "eos_id", "pad_id", "note"}
    assert file.get("mask_id", MASK) == MASK
    assert file.get("eos_id", PAD) == file.get("pad_id", PAD) == PAD


# ---- scores --------------------------------------------------------------------------------------

METRICS = {
    "string_match_all": scoring.string_match_all,
    "string_match_part": scoring.string_match_part,
}


def ruler_score(example: Record) -> float:
    prediction = scoring.clean(example["prediction"])
    return METRICS[example["metric"]](example["references"], prediction)


def replay_ruler_score(example: Record, name: str, path: Path) -> None:
    score = ruler_score(example)
    assert scoring.clean(example["prediction"]) == example["prediction_after_postprocess"]
    assert round(100 * score, 2) == example["nvidia_score_0_100"]
    assert example.get("lm_eval_score_0_1", score) == pytest.approx(score, abs=1e-12)
    example.about("task")
    example.finish(name)


def replay_ruler_mean(entry: Record, name: str, path: Path) -> None:
    """The mean over a task's n examples. Those that are not in the record score from 0 to 1."""
    examples = read(path)["single"]
    scores = [ruler_score(example) for example in examples if example["task"] == entry["task"]]
    recorded, missing = entry["lm_eval_string_match_all_0_1"], entry["n"] - len(scores)
    assert missing >= 0
    assert sum(scores) - 1e-9 <= recorded * entry["n"] <= sum(scores) + missing + 1e-9
    assert round(100 * recorded, 2) == entry["nvidia_score_0_100"]
    entry.finish(name)


def babilong_scores(record: Record, output: str) -> list[float]:
    """By BABILong's rule, by its older rule, and by the harness's."""
    task, question, target = record["task"], record["question"], record["target"]
    correct = scoring.babilong_correct(task, question, target, output)
    contains = target.lower() in scoring.first_statement(output)  # BABILong's older rule
    return [correct, contains, scoring.babilong_accuracy(target, output)]


def replay_babilong_score(example: Record, name: str, path: Path) -> None:
    rules = ("babilong_correct", "babilong_utils_compare_answers", "lm_eval_acc")
    assert babilong_scores(example, example["output"]) == [example[rule] for rule in rules]
    assert scoring.first_statement(example["output"]) == example["preprocessed"]
    example.finish(name)


# ---- prompts -------------------------------------------------------------------------------------


def ruler_draft(task: str, length: int, protocol: str) -> Draft:
    """One of our own questions, for what all questions of a task have in common."""
    style = Style(lambda text, prefix: TINY.encode(text + prefix), protocol)
    return BENCHMARKS[task](random.Random(0), 0, length, style._replace(qa=questions()))


def replay_ruler_samples(samples: list[Record], key: str, path: Path) -> None:
    lengths = read(path)["max_seq_length"]
    length = lengths if isinstance(lengths, int) else lengths[key]
    for recorded in samples:
        replay_ruler_sample(recorded, ruler_task(key), length)
        recorded.finish(key)


def replay_ruler_sample(recorded: Record, task: str, length: int) -> None:
    """A published prompt is taken apart, and our functions put it together again: the same to the
    last character."""
    protocol, doc = "harness" if "doc" in recorded else "original", recorded.get("doc", recorded)
    draft, outputs = ruler_draft(task, length, protocol), doc["outputs"]
    text, prefix = REMAKE[task](task, doc["input"], outputs, protocol, length)
    assert text == doc["input"]
    if protocol == "original":
        lead = doc["answer_prefix"]
        assert lead == prefix
    else:
        lead = recorded["prompt_as_sent_to_the_model"].removeprefix(text)
        assert doc["gen_prefix"] == prefix.strip() == lead.strip()
        check_greedy(recorded["generation_kwargs"], draft.tokens)
    assert draft.prefix[:12] == lead[:12]  # what stands between, and how the prefix begins
    if "input_example" in doc:  # it is made without the space before the answer, and not sent
        example = remake_common_example(doc["input_example"], length, protocol)
        assert doc["input_example"] == example.replace("are: 1.", "are:1.").removesuffix("\n")
    assert scoring.string_match_all(outputs, " ".join(outputs)) == 1
    assert scoring.string_match_all(outputs, "") == 0
    assert doc.get("max_length", length) == length
    assert doc["length"] - draft.tokens <= length  # in ruler_fwe the answer comes on top
    doc.about("index", "length_w_model_temp", "token_position_answer")


def check_greedy(recorded: Record, tokens: int) -> None:
    """The harness's settings of generation."""
    expected = {"do_sample": False, "temperature": 0.0, "max_gen_toks": tokens, "until": []}
    assert dict(recorded.items()) == expected


def replay_babilong_prompt(recorded: Record, task: str, path: Path) -> None:
    """The prompts, character by character. The target scores 1, an empty answer 0."""
    asked = task, recorded["context"], recorded["question"]
    (original, _), (harness, tokens) = babilong.BABILONG_PROTOCOLS.values()
    assert original(*asked) == recorded["babilong_prompt"]
    assert original(*asked, shots=0) == recorded["babilong_prompt_no_examples"]
    assert harness(*asked, shots=2) == recorded["lm_eval_prompt_2shot"]
    check_greedy(recorded["lm_eval_generation_kwargs"], tokens)
    recorded["task"] = task
    assert babilong_scores(recorded, recorded["target"]) == [1, 1, 1]
    assert babilong_scores(recorded, "") == [0, 0, 0]
    recorded.finish(task)


# ---- descriptions of tasks and of real checkpoints -----------------------------------------------

RULER_PROMPTS = dict.fromkeys(ruler.NIAH, ruler.NIAH_PROMPT)
RULER_PROMPTS["ruler_vt"] = ruler.VT_PROMPT
RULER_PROMPTS["ruler_cwe"] = ruler.CWE_PROMPT
RULER_PROMPTS["ruler_fwe"] = ruler.FWE_PROMPT
RULER_PROMPTS |= dict.fromkeys(documents.DOCUMENTS, ruler.WORDS["ruler_qa"])


def replay_ruler_description(path: Path) -> None:
    """Wording, tokens, metrics and settings of all tasks."""
    file = read(path)
    tasks = {ruler_task(key): task for key, task in file["tasks"].items()}
    assert tasks.keys() == RULER_PROMPTS.keys()
    ours = {"kind": "uuids", "query": "K", "value": "K", "count": 5, "assigned": "assigned"}
    theirs = {"type_needle_v": "uuids", "query": "K", "num_v": 5}
    for name, task in tasks.items():
        form, prefix = RULER_PROMPTS[name]
        recorded = task["template"].format(context="Hay.", **theirs)
        assert form.format(context="Hay.", **ours) == recorded
        assert prefix.format(**ours) == task["answer_prefix"].format(**theirs)
        assert ruler_draft(name, 4096, "original").tokens == task["tokens_to_generate"]
        assert task["metric"] == ("string_match_part" if "_qa_" in name else "string_match_all")
        assert scoring.metrics_of(name) == (["any"] if "_qa_" in name else ["ruler"])
        if "_qa_" in name:
            file_name, _ = documents.SOURCES[name]
            assert file_name == f"{task['args']['dataset']}.json"
    needle = ruler.NEEDLE.format(kind="{type_needle_v}", key="{key}", value="{value}")
    assert needle == file["niah"]["needle"]
    assert file["niah"]["haystack_noise"] == ruler.GRASS
    args = {name: task["args"] for name, task in tasks.items() if "_qa_" not in name}
    compare_ruler_settings(args, file["cwe"])


def compare_ruler_settings(settings: dict[str, Record], cwe: Record) -> None:
    for name, spec in ruler.NIAH.items():
        recorded = ruler.Needles(*settings[name].values())
        assert spec == recorded._replace(keys=max(recorded.keys, recorded.asked))
    hops = len(ruler_draft("ruler_vt", 4096, "original").references) - 1
    chain = {"type_haystack": "noise", "num_chains": 1, "num_hops": hops}
    assert settings["ruler_vt"] == chain
    assert settings["ruler_fwe"] == {"alpha": 2.0}  # the exponent in ruler.coded_text

    def counts(setting: Record) -> tuple[int, int]:
        return setting["freq_cw"], setting["freq_ucw"]

    long, short = settings["ruler_cwe"], cwe["if_max_seq_length_below_4096"]
    shown, shown_short = cwe["example_otherwise"], short["example"]
    assert {
        4096: (counts(long), shown["num_words"], counts(shown)),
        0: (counts(short), shown_short["num_words"], counts(shown_short)),
    } == ruler.CWE_COUNTS
    assert long["num_cw"] == len(ruler_draft("ruler_cwe", 4096, "original").references)


def replay_babilong_description(path: Path) -> None:
    """Each task's wording and labels, and how many tokens are generated."""
    file = read(path)
    assert file["template"] == babilong.BABILONG_TEMPLATE
    _, tokens = babilong.BABILONG_PROTOCOLS["original"]
    assert file["generation"]["max_new_tokens"] == tokens
    for task, words in file["prompts"].items():
        ours = babilong.original_prompt(task, context="Facts.", question="Why?")
        assert ours == file["template"].format(**words, context="Facts.", question="Why?")
    for task, labels in file["labels"].items():
        assert labels == scoring.BABILONG_LABELS[task]


def replay_real_config(entry: Record, name: str, path: Path) -> None:
    """What is known of a real checkpoint is what --random-weights makes: its sizes, its tensors and
    its [MASK]. Of LLaDA2.1 no more is known than that it is like LLaDA2.0."""
    repo = name.partition(" (")[0].replace("LLaDA2.0", "LLaDA2.1")
    ours = {backbone.repo: backbone.config for backbone in BACKBONES.values()}[repo]
    masks = [value for key, value in entry["special_tokens"].items() if "mask" in key]
    assert masks == [ours.mask_id]
    if "config" in entry:
        recorded = read_llada_config(entry["config"], (), path)
        assert replace(recorded, mask_id=ours.mask_id) == ours
        tensors = {one_for_all(tensor) for tensor in published_tensors(on_meta(ours))}
        assert tensors == set(spelled_out(entry["tensor_names"]))


def one_for_all(tensor: str) -> str:
    """The name with N for the layer and E for the expert."""
    return re.sub(r"experts\.\d+", "experts.E", re.sub(r"(layers|blocks)\.\d+", r"\1.N", tensor))


def spelled_out(patterns: list[str]) -> Iterable[str]:
    """layers.0.{up,down}.weight (a remark) -> layers.N.up.weight and layers.N.down.weight."""
    for pattern in patterns:
        name, _, _ = pattern.partition(" ")
        start, choices, stop = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", name).groups()
        for choice in (choices or "").split(","):
            yield one_for_all(start + choice + stop)


# ---- finding all of it ---------------------------------------------------------------------------
# Each function takes a file or folder and yields the records in it: a name, and the arguments of
# what replays it.


def whole(path: Path) -> Iterable[tuple]:
    yield "whole", path


def each_entry(path: Path, key: str | None = None) -> Iterable[tuple]:
    """The entries of a JSON file, or of one list or object in it."""
    entries = read(path) if key is None else read(path).get(key, [])
    for name, entry in entries.items() if isinstance(entries, Record) else enumerate(entries):
        name = entry.get("name", str(name)) if isinstance(entry, Record) else name
        yield f"{key}/{name}" if key else name, entry, name, path


def each_case(path: Path) -> Iterable[tuple]:
    """The cases of a file of forward passes."""
    with safe_open(path, "pt") as file:
        cases = dict.fromkeys(key.partition(".")[0] for key in file.keys())
    for case in cases:
        yield case, path, case


def each_inner_loop(folder: Path) -> Iterable[tuple]:
    """Entries of cases.json, and files of tensors that neither it nor tables.json names."""
    path, tables = folder / "cases.json", folder / "tables.json"
    entries = read(path) if path.exists() else Record({})
    known = {*entries, *(read(tables) if tables.exists() else ())}
    files = [file.stem for file in folder.glob("*.safetensors") if file.stem[:5] != "init_"]
    for name in [*entries, *sorted({*files} - known)]:
        yield name, folder, name, entries


# pattern, what replays a record, and where the records are in a file of that name
FORMATS = [
    ("*/checkpoint*", replay_checkpoint, whole),
    ("*/forward*.safetensors", replay_forward, each_case),
    ("memory/init_*.safetensors", replaying.replay_start, whole),
    ("memory", replaying.replay_inner_loop, each_inner_loop),
    ("memory/tables.json", replay_table, each_entry),
    ("sampler/num_transfer_tokens.json", replay_schedule, each_entry),
    ("sampler/traces.json", replay_trace, partial(each_entry, key="traces")),
    ("sampler/traces.json", replay_likelihood, partial(each_entry, key="log_likelihood")),
    ("sampler/traces.json", replay_header, whole),
    ("llada21/sampler_traces.json", replay_block_trace, partial(each_entry, key="traces")),
    ("llada21/sampler_traces.json", replay_header, whole),
    ("llada21/editing_traces.json", replay_editing, partial(each_entry, key="traces")),
    ("llada21/editing_traces.json", replay_header, whole),
    ("ruler/scoring_examples.json", replay_ruler_score, partial(each_entry, key="single")),
    ("ruler/scoring_examples.json", replay_ruler_mean, partial(each_entry, key="dataset_level")),
    ("ruler/scoring_examples.json", replay_header, whole),
    ("ruler/samples_*.json", replay_ruler_samples, partial(each_entry, key="samples")),
    ("ruler/description.json", replay_ruler_description, whole),
    ("babilong/scoring_examples.json", replay_babilong_score, each_entry),
    ("babilong/prompts.json", replay_babilong_prompt, each_entry),
    ("babilong/description.json", replay_babilong_description, whole),
    ("real_configs.json", replay_real_config, each_entry),
]


def find(golden: Path) -> list[tuple[str, Callable[[], None]]]:
    """Every record below `golden`. A file that cannot be read is one that cannot be replayed."""
    found = []
    for pattern, replay, records in FORMATS:
        for path in sorted(golden.glob(pattern)):
            where = path.relative_to(golden)
            try:
                for name, *arguments in records(path):
                    found.append((f"{where}/{name}", partial(replay, *arguments)))
            except Exception as error:
                message = f"{path} cannot be read: {error!r}"
                found.append((str(where), partial(pytest.fail, message)))
    return found or [("nothing", partial(pytest.fail, f"{golden} holds no record"))]


def pytest_generate_tests(metafunc):
    names, replays = zip(*find(metafunc.config.getoption("golden").resolve()))
    metafunc.parametrize("replay", replays, ids=names)


def test_record_is_replayed(replay):
    replay()
