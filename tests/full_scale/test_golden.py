"""
test_golden.py: our numbers equal those of the published code.

    python -m pytest tests/full_scale/test_golden.py [--golden DIR]

The records were made by running the published code unmodified (float32, CPU) on tiny random models.
Every record below DIR (default: tests/golden, a small part) is found by its format (FORMATS, at the
end) and replayed as a test of its own. All randomness is in the record. What cannot be replayed
fails: an unknown setting, sampler or table, a file without its partner, and every entry of a record
that nothing was compared with (replaying.Record). Files in none of the formats are left alone.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

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
    ids, attention_mask, scores, hooks = record["input_ids"], record.get("attention_mask"), [], []
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


def changes_of(decode: Callable[..., Tensor]) -> tuple[list, Tensor, Tensor]:
    """Decodes. Returns the changes (place, old token, new token, probability of the new one) of
    every row in every pass, the canvas in the end, and the answer. The probability is the model's,
    even where tokens are suppressed."""
    asked, canvases, passes = [], [], []

    def predict(model, canvas: Tensor, *rest) -> Tensor:
        logits = sample.guided_logits(model, canvas, *rest)
        asked.append((canvas, rest[-1], logits.softmax(-1)))
        return logits

    answer = decode(watch=canvases.append, predict=predict)
    for (before, at, probability), after in zip(asked, canvases, strict=True):
        chances = torch.zeros(before.shape)
        chances[at] = probability.gather(1, after[at][:, None])[:, 0]
        rows = [[] for _ in before]
        for row, place in (before != after).nonzero().tolist():
            tokens = before[row, place].item(), after[row, place].item()
            rows[row].append((place, *tokens, chances[row, place].item()))
        passes.append(rows)
    return passes, canvases[-1], answer


def compare_passes(ours: list, recorded: list) -> None:
    """Every change of every pass, but for passes that change nothing."""
    ours, recorded = list(filter(any, ours)), list(filter(any, recorded))
    assert len(ours) == len(recorded)
    for k, (rows, recorded_rows) in enumerate(zip(ours, recorded)):
        for row, changes in zip(rows, map(sorted, recorded_rows), strict=True):
            assert [one[:3] for one in row] == [tuple(one[:3]) for one in changes], f"pass {k}"
            probabilities = [one[3] for one in changes]
            close([one[3] for one in row], probabilities, "confidence", f"confidences of pass {k}")


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
    passes, canvas, _ = changes_of(partial(sample.generate, model, prompts, blocks, **options))
    ours = [row[pad:] + [PAD] * pad for row, pad in zip(canvas.tolist(), pads)]
    assert ours == trace["output_ids"]
    recorded = []
    for commits in trace["commits_per_model_call"]:
        by_row = zip(pads, commits, strict=True)
        recorded.append([[(at + pad, MASK, *rest) for at, *rest in row] for pad, row in by_row])
    compare_passes(passes, recorded)
    margins = ("min_confidence_gap_selected_vs_rejected", "min_logit_gap_top1_top2")
    trace.about("prompt_seed", *margins)
    trace.finish(name)


def replay_llada2(trace: Record, name: str, path: Path) -> None:
    """LLaDA2's block sampler, and LLaDA2.1's, which also replaces what it has committed. Of
    `generate` the record has the input of each call: what the last one did, it cannot show."""
    _, _, method = trace["sampler"].partition(" (")[0].rpartition(" ")
    model, prompt = load(path.parent / "checkpoint"), torch.tensor([trace["prompt"]])
    settings = {
        "LLaDA2Sampler.sample": "max_new_tokens steps_per_block block_size threshold",
        "LLaDA21Sampler.sample": "max_new_tokens editing_threshold block_size threshold",
        "LLaDA2MoeModelLM.generate": "gen_length editing_threshold block_length threshold",
    }[method]
    plan = [trace[setting] for setting in settings.split()]
    if method == "LLaDA2Sampler.sample":
        decode = partial(samplers.generate_llada2, model, prompt, *plan)
    else:
        plan += [trace["num_to_transfer"], trace["max_post_steps"], trace.get("eos_id")]
        decode = partial(samplers.generate_editing, model, prompt, *plan)
    passes, canvas, answer = changes_of(decode)
    output, recorded = canvas[0].tolist(), [[call] for call in trace["changes_per_model_call"]]
    if method == "LLaDA2MoeModelLM.generate":
        output = answer[0].tolist()
        output = output[: output.index(PAD) + 1] if PAD in output else output
        trace.about("steps")
    assert output == trace["output_ids"]
    spare = len(passes) - len(recorded)
    assert method == "LLaDA2Sampler.sample" or spare in (0, "steps" in trace)
    compare_passes(passes, recorded)
    edits = sum(old != MASK for [changes] in passes for _, old, _, _ in changes)
    assert trace["n_edits_of_committed_tokens"] == edits
    assert trace["n_model_calls"] == len(recorded)
    trace["decision_margins"].about(*trace["decision_margins"])
    trace.about("prompt_seed")
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


def ruler_score(example: Record) -> float:
    prediction = scoring.clean(example["prediction"])
    return getattr(scoring, example["metric"])(example["references"], prediction)


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
    target, statement = record["target"], scoring.first_statement(output)
    correct = scoring.babilong_correct(record["task"], record["question"], target, output)
    return [correct, target.lower() in statement, scoring.babilong_accuracy(target, output)]


def replay_babilong_score(example: Record, name: str, path: Path) -> None:
    rules = ("babilong_correct", "babilong_utils_compare_answers", "lm_eval_acc")
    assert babilong_scores(example, example["output"]) == [example[rule] for rule in rules]
    assert scoring.first_statement(example["output"]) == example["preprocessed"]
    example.finish(name)


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


RULER_PROMPTS = dict.fromkeys(ruler.NIAH, ruler.NIAH_PROMPT)
RULER_PROMPTS |= dict.fromkeys(documents.DOCUMENTS, ruler.WORDS["ruler_qa"])
RULER_PROMPTS |= {"ruler_vt": ruler.VT_PROMPT, "ruler_cwe": ruler.CWE_PROMPT}
RULER_PROMPTS |= {"ruler_fwe": ruler.FWE_PROMPT}


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
    short, long = cwe["if_max_seq_length_below_4096"], settings["ruler_cwe"]
    both = {0: (short, short["example"]), 4096: (long, cwe["example_otherwise"])}
    for least, (setting, shown) in both.items():
        counts = [(one["freq_cw"], one["freq_ucw"]) for one in (setting, shown)]
        assert ruler.CWE_COUNTS[least] == (counts[0], shown["num_words"], counts[1])
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
        start, choices, stop = re.match(r"([^{ ]*)(?:\{(.*)\})?([^ ]*)", pattern).groups()
        for choice in (choices or "").split(","):
            yield one_for_all(start + choice + stop)


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
    ("llada21/sampler_traces.json", replay_llada2, partial(each_entry, key="traces")),
    ("llada21/sampler_traces.json", replay_header, whole),
    ("llada21/editing_traces.json", replay_llada2, partial(each_entry, key="traces")),
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
