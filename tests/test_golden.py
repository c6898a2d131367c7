"""
test_golden.py: our numbers equal those of the published code.

    python -m pytest tests/test_golden.py [--golden DIR]

The records were made by running the published code unmodified (float32, CPU) on tiny random models. Every record below DIR
is found by its format (FORMATS, at the end) and replayed as a test of its own; DIR is tests/golden, a small part, unless said
otherwise. All randomness is in the record, which is why every draw in memdlm.py and sample.py is an argument.

What cannot be replayed fails: an unknown setting, sampler or table, a file without its counterpart, and every entry of a
record that nothing was compared with (`Record`). Files in none of the formats are left alone.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from remaking import REMAKE, remake_common_example, ruler_task
from replaying import MASK, PAD, Record, close, load, model_named, part, read, replay_memory, replay_start, replay_training
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import data
import eval_niah
import memdlm
import sample
from data import Batch
from memdlm import STRATEGIES, Anchor, Memory, corrupt
from model import BACKBONES, Config, Transformer, UserError, init_weights, on_meta, published_tensors, read_llada_config

Replay = tuple[str, Callable[[], None]]  # a record's name, and what compares it


# ---- checkpoints and forward passes ---------------------------------------------------------------------------------------


def replay_checkpoint(folder: Path) -> None:
    """Every published tensor is in our model, bit for bit."""
    model = load(folder)
    recorded = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert recorded.keys() == published_tensors(model).keys()
    for name, tensor in recorded.items():
        assert torch.equal(part(model.state_dict(), model, name), tensor), name


@torch.no_grad()
def replay_forward(path: Path, case: str) -> None:
    """Logits, the output of every layer and the scores of every router, under any attention mask."""
    model = load(path.with_name(path.stem.replace("forward", "checkpoint", 1)))
    record = Record({k.partition(".")[2]: t for k, t in load_file(path).items() if k.partition(".")[0] == case})
    ids, attention_mask, scores = record["input_ids"], record.get("attention_mask"), []
    routers = [model.layers[i].mlp.router for i in model.config.moe_layers]
    hooks = [router.register_forward_hook(lambda module, inputs, output: scores.append(output)) for router in routers]
    outputs = [model.embedding(ids)]
    for i in range(model.config.layers):
        outputs.append(model.run(outputs[-1], i, i + 1, attention_mask))
    for hook in hooks:
        hook.remove()
    ours = {"logits": model(ids, attention_mask), "last_layer_output_before_final_norm": outputs[-1]}
    ours["hidden_states"] = torch.stack([*outputs[:-1], model.norm(outputs[-1])])
    if routers:
        ours["router_logits"] = torch.stack(scores)
    for name, value in ours.items():
        close(value, record[name], "values", name)
    record.finish(case)


# ---- tables ---------------------------------------------------------------------------------------------------------------


def replay_layers(table: Record, golden: Path) -> None:
    """The first adapted layer. The published fraction has a sign, which only tells where another loss reads: ours has none."""
    assert table["columns"] == ["n_layers", "inner_layer_fraction", "first_adapted_layer"]
    table.about("rule")
    for layers, fraction, first in table["rows"]:
        if first == layers:
            with pytest.raises(UserError):
                memdlm.first_adapted_layer(layers, abs(fraction))
        else:
            assert memdlm.first_adapted_layer(layers, abs(fraction)) == first, (layers, fraction)


def replay_pre_anchor(table: Record, golden: Path) -> None:
    assert table["columns"] == ["start_scale", "n_maskable", "n_anchor_masked", "n_pre_anchor_masked"]
    table.about("rule")
    differing = table["differs_from_floor_of_scale_times_count"]
    for scale, maskable, masked, pre, *_ in [*table["rows"], *differing]:
        assert memdlm.pre_anchor_count(masked, maskable, scale) == pre, (scale, maskable, masked)
    assert all(pre != floor == int(scale * masked) for scale, _, masked, pre, floor in differing)


def replay_counts(table: list[Record], golden: Path) -> None:
    """How many tokens each of K states masks, and its t."""
    for row in table:
        maskable = torch.arange(row["n_maskable"] + 3)[None] < row["n_maskable"]
        masked = torch.arange(row["n_maskable"] + 3)[None] < row["n_anchor_masked"]
        memory = Memory(steps=row["K"], start_scale=row["start_scale"])
        stages = STRATEGIES["consistent"](Anchor(torch.ones(1), masked), maskable, memory, torch.Generator())
        assert [int(stage.masked.sum()) for stage in stages] == row["n_masked_per_stage"], dict(row)
        close(torch.cat([stage.t for stage in stages]), row["t_per_stage"], "loss", f"t of {dict(row)}")
        row.finish("row")


def replay_scheduler(table: Record, golden: Path) -> None:
    """w(t) = 1 / (t + 1e-6), as a factor of the loss of one masked token; 1 - t of the tokens stay visible."""
    model = init_weights(Transformer(Config(9, mask_id=8)), torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool), None)
    masked = batch.x0 == 5
    nll = -model(corrupt(batch.x0, masked, 8)).log_softmax(-1)[0, 5, 5]
    for t, alpha, weight in zip(*(table[key] for key in ("t", "alpha", "weight")), strict=True):
        close(memdlm.mdlm_loss(model, batch, Anchor(torch.tensor([t]), masked), "batch") / nll, weight, "loss", f"w({t})")
        close(1 - t, alpha, "values", f"alpha({t})")


TABLES = {"layer_selection": replay_layers, "pmc_pre_anchor_count": replay_pre_anchor, "linear_scheduler": replay_scheduler}
TABLES |= {"pmc_multi_stage_counts": replay_counts, "three_outer_steps": replay_training}


def replay_table(path: Path, name: str) -> None:
    table = read(path)[name]
    TABLES[name](table, path.parents[1])
    if isinstance(table, Record):
        table.finish(name)


# ---- samplers and likelihood ----------------------------------------------------------------------------------------------


def traced(model: Transformer, prompts: Tensor, length: int, **options) -> tuple[Tensor, Tensor, list]:
    """Answers, the last canvas, and for each pass that commits something and each row {place: (token, probability)}.

    The recorded probability is the model's, even where tokens are suppressed, which the confidence takes into account."""
    canvases, plain, choices, choose, select = [], [], [], sample.choose_tokens, sample.select

    def spy_tokens(logits: Tensor, *rest) -> tuple[Tensor, Tensor]:
        tokens, confidence = choose(logits, *rest)
        plain.append(logits.softmax(-1).gather(1, tokens[:, None])[:, 0])
        return tokens, confidence

    def spy_places(confidence: Tensor, *rest) -> Tensor:
        chosen = select(confidence, *rest)
        choices.append((confidence.masked_scatter(confidence >= 0, plain[-1]), chosen))
        return chosen

    with mock.patch.multiple(sample, choose_tokens=spy_tokens, select=spy_places):
        answers = sample.generate(model, prompts, length, watch=canvases.append, **options)
    commits = []
    for canvas, (confidence, chosen) in zip(canvases[1:], choices, strict=True):
        rows = zip(canvas.tolist(), confidence.tolist(), chosen.tolist())
        commits.append([{i: (t, c) for i, (t, c, here) in enumerate(zip(*row)) if here} for row in rows])
    return answers, canvases[-1], [commit for commit in commits if any(commit)]


def compare_commits(ours: list, recorded: list) -> None:
    recorded = [[{place: (token, c) for place, token, c in row} for row in call] for call in recorded if any(call)]
    assert len(ours) == len(recorded)
    for k, (mine, theirs) in enumerate(zip(ours, recorded)):
        for row, other in zip(mine, theirs, strict=True):
            assert {i: token for i, (token, _) in row.items()} == {i: token for i, (token, _) in other.items()}, f"pass {k}"
            close([row[i][1] for i in other], [c for _, c in other.values()], "confidence", f"confidences of pass {k}")


# sampler -> our plan, and what it calls the answer's length and the block's
SAMPLERS = {"LLaDA generate.py": ("llada", "gen_length", "block_length")}
SAMPLERS |= {"dllm MDLMSampler": ("dllm", "max_new_tokens", "block_size")}


def replay_trace(trace: Record, golden: Path) -> None:
    """Every commit of every pass, in its place and with its confidence, and the canvas in the end."""
    plan, length, block = SAMPLERS[trace["sampler"].partition(" (")[0]]
    trace.about("name", "prompt_seed", "min_confidence_gap_selected_vs_rejected", "min_logit_gap_top1_top2")
    rows, length, visible = trace["prompts"], trace[length], trace["attention_mask"]
    widths = torch.tensor([len(row) for row in rows])
    prompts = torch.tensor([row + [PAD] * (int(widths.max()) - len(row)) for row in rows])
    options = {"steps": trace["steps"], "block_length": trace[block], "cfg_scale": trace.get("cfg_scale", 0.0), "plan": plan}
    if visible is not None:
        options["attention_mask"] = torch.tensor([row + [1] * length for row in visible])
    if len(widths.unique()) > 1:
        options["prompt_lengths"] = widths
    suppress = trace.get("suppress_tokens") or []
    answers, _, commits = traced(model_named(trace["model"], golden), prompts, length, suppress=suppress, **options)
    canvas = [prompt + answer for prompt, answer in zip(rows, answers.tolist())]
    assert [row + [PAD] * (max(map(len, canvas)) - len(row)) for row in canvas] == trace["output_ids"]
    compare_commits(commits, trace["commits_per_model_call"])
    trace.finish("trace")


def replay_likelihood(entry: Record, golden: Path) -> None:
    """Monte-Carlo estimate on the recorded perturbations."""
    x0, perturbed = torch.tensor(entry["prompt"] + entry["answer"]), torch.tensor(entry["perturbed"]).flatten(0, 1)
    assert list(perturbed.shape) == [entry["mc_num"], len(x0)]
    assert torch.equal(perturbed, corrupt(x0, perturbed == MASK, MASK))
    share, cfg_scale = torch.tensor(entry["p_mask"]).flatten(), entry["cfg_scale"]
    entry.about("batch_size", "name")
    model, prompt = model_named(entry["model"], golden), len(entry["prompt"])
    ours = eval_niah.log_likelihood(model, x0, prompt, perturbed == MASK, share, cfg_scale)
    close(ours.mean(), entry["log_likelihood"], "loss", "log likelihood")
    entry.finish("log_likelihood")


def replay_block_trace(trace: Record, path: Path) -> None:
    """LLaDA2's block sampler: the whole canvas, and every change of it."""
    assert trace["sampler"] == "memdlm/pipelines/llada21/sampler.py LLaDA2Sampler.sample"
    trace.about("name", "prompt_seed", "decision_margins")
    options = {"steps": trace["steps_per_block"], "block_length": trace["block_size"], "threshold": trace["threshold"]}
    prompts, length = torch.tensor([trace["prompt"]]), trace["max_new_tokens"]
    _, canvas, commits = traced(load(path.parent / "checkpoint"), prompts, length, plan="llada2", suppress=[], **options)
    assert canvas.tolist() == [trace["output_ids"]]
    changes = trace["changes_per_model_call"]
    assert (len(changes), trace["n_edits_of_committed_tokens"]) == (trace["n_model_calls"], 0)
    assert {old for call in changes for _, old, _, _ in call} <= {MASK}
    compare_commits(commits, [[[(place, new, c) for place, _, new, c in call]] for call in changes])
    trace["decision_margins"].about(*trace["decision_margins"])
    trace.finish("trace")


def replay_schedule(rule: Callable[[int, int], list[int]], table: Record) -> None:
    for key, quotas in table.items():
        assert rule(*map(int, key.split(","))) == quotas, key


SCHEDULES = {"llada": sample.commit_schedule, "dllm_linear": sample.rounded_schedule}


def find_traces(path: Path) -> Iterable[Replay]:
    file, entries, block = read(path), [], path.name == "sampler_traces.json"
    assert (file["mask_id"], file["eos_id"], file.get("pad_id", PAD)) == (MASK, PAD, PAD)
    for trace in file["traces"]:
        replay = partial(replay_block_trace, trace, path) if block else partial(replay_trace, trace, path.parents[1])
        entries.append((f"{path.parent.name}/{dict.get(trace, 'name')}", replay))
    for i, entry in enumerate(file.get("log_likelihood", [])):
        name = f"{path.parent.name}/log_likelihood_{i}_{dict.get(entry, 'model')}"
        entries.append((name, partial(replay_likelihood, entry, path.parents[1])))
    return entries + unknown(file, path)


# ---- tasks and scores -----------------------------------------------------------------------------------------------------

METRICS = {"string_match_all": eval_niah.string_match_all, "string_match_part": eval_niah.string_match_part}


def ruler_score(example: Record) -> float:
    return METRICS[example["metric"]](example["references"], example["prediction"])


def replay_ruler(example: Record) -> None:
    example.about("task")
    assert eval_niah.clean(example["prediction"]) == example["prediction_after_postprocess"]
    assert round(100 * ruler_score(example), 2) == example["nvidia_score_0_100"]
    assert example.get("lm_eval_score_0_1", ruler_score(example)) == pytest.approx(ruler_score(example), abs=1e-12)
    example.finish("example")


def replay_ruler_mean(entry: Record, examples: list[Record]) -> None:
    """The mean over the task's examples. Where only some of its n examples are there, the others score 0 to 1."""
    scores, recorded = [ruler_score(e) for e in examples if e["task"] == entry["task"]], entry["lm_eval_string_match_all_0_1"]
    missing, total = entry["n"] - len(scores), sum(scores)
    assert missing >= 0
    assert total - 1e-9 <= recorded * entry["n"] <= total + missing + 1e-9
    assert round(100 * recorded, 2) == entry["nvidia_score_0_100"]
    entry.finish("mean")


def find_ruler_scores(path: Path) -> Iterable[Replay]:
    file = read(path)
    for i, example in enumerate(file["single"]):
        yield f"ruler/single_{i}", partial(replay_ruler, example)
    for entry in file["dataset_level"]:
        yield f"ruler/mean_{dict.get(entry, 'task')}", partial(replay_ruler_mean, entry, file["single"])
    file.about("note")
    yield from unknown(file, path)


def replay_babilong(example: Record) -> None:
    task, question, target, output = (example[key] for key in ("task", "question", "target", "output"))
    assert eval_niah.first_statement(output) == example["preprocessed"]
    assert eval_niah.babilong_correct(task, question, target, output) == example["babilong_correct"]
    assert eval_niah.babilong_contains(target, output) == example["babilong_utils_compare_answers"]
    assert eval_niah.babilong_accuracy(target, output) == example["lm_eval_acc"]
    example.finish("example")


def ruler_draft(task: str, length: int, protocol: str) -> data.Draft:
    """One of our own questions, for what all questions of a task have in common."""
    style = data.Style(lambda text, prefix: data.TINY.encode(text + prefix), protocol)
    return data.RULER[task](random.Random(0), 0, length, style)


def replay_ruler_sample(key: str, length: int, recorded: Record) -> None:
    """A published prompt is taken apart, and our functions put it together again: equal to the last character."""
    task, doc, protocol = ruler_task(key), recorded.get("doc", recorded), "harness" if "doc" in recorded else "original"
    text, prefix = REMAKE[task](task, doc["input"], doc["outputs"], protocol, length)
    draft = ruler_draft(task, length, protocol)
    assert text == doc["input"]
    if protocol == "original":
        lead = doc["answer_prefix"]
        assert lead == prefix
    else:
        lead = recorded["prompt_as_sent_to_the_model"].removeprefix(text)
        assert doc["gen_prefix"] == prefix.strip() == lead.strip()
        greedy = {"do_sample": False, "temperature": 0.0, "max_gen_toks": draft.tokens, "until": []}
        assert dict(recorded["generation_kwargs"].items()) == greedy
    assert draft.prefix[:12] == lead[:12]  # what stands between, and how the prefix begins
    if "input_example" in doc:  # the harness makes it without the space before the answer, and does not send it
        example = remake_common_example(doc["input_example"], length, protocol)
        assert doc["input_example"] == example.replace("are: 1.", "are:1.").removesuffix("\n")
    assert [eval_niah.string_match_all(doc["outputs"], answer) for answer in (", ".join(doc["outputs"]), "")] == [1, 0]
    assert doc["length"] - draft.tokens <= doc.get("max_length", length) == length  # coded words: the answer comes on top
    doc.about("index", "length_w_model_temp", "token_position_answer")
    recorded.finish(key)


def replay_babilong_sample(task: str, recorded: Record) -> None:
    """The recorded prompts, character by character. The target scores 1, an empty answer 0."""
    context, question, target = (recorded[key] for key in ("context", "question", "target"))
    (original, _), (harness, tokens) = (data.BABILONG_PROTOCOLS[name] for name in ("original", "harness"))
    assert original(task, context, question) == recorded["babilong_prompt"]
    assert original(task, context, question, shots=0) == recorded["babilong_prompt_no_examples"]
    assert harness(task, context, question, shots=2) == recorded["lm_eval_prompt_2shot"]
    greedy = {"do_sample": False, "temperature": 0.0, "until": []}
    assert dict(recorded["lm_eval_generation_kwargs"].items()) == greedy | {"max_gen_toks": tokens}
    for output, score in ((target, 1), ("", 0)):
        assert eval_niah.babilong_correct(task, question, target, output) == score
        assert eval_niah.babilong_contains(target, output) == score
        assert eval_niah.babilong_accuracy(target, output) == score
    recorded.finish(task)


def find_ruler_samples(path: Path) -> Iterable[Replay]:
    file = read(path)
    lengths = file["max_seq_length"]
    for key, samples in file["samples"].items():
        for i, recorded in enumerate(samples):
            length = lengths if isinstance(lengths, int) else lengths[key]
            yield f"ruler/{path.stem}/{key}_{i}", partial(replay_ruler_sample, key, length, recorded)


RULER_PROMPTS = dict.fromkeys(data.NIAH, data.NIAH_PROMPT)
RULER_PROMPTS |= {"ruler_vt": data.VT_PROMPT, "ruler_cwe": data.CWE_PROMPT, "ruler_fwe": data.FWE_PROMPT}


def replay_ruler_description(path: Path) -> None:
    """Wording, tokens and settings of all tasks but question answering, which is not built."""
    file = read(path)
    tasks = {ruler_task(key): task for key, task in file["tasks"].items() if key not in ("qa_1", "qa_2")}
    assert tasks.keys() == data.RULER.keys()
    ours = {"kind": "uuids", "query": "K", "value": "K", "count": 5, "assigned": "assigned", "context": "Hay."}
    theirs = {"type_needle_v": "uuids", "query": "K", "num_v": 5, "context": "Hay."}
    for name, task in tasks.items():
        recorded = [task["template"].format(**theirs), task["answer_prefix"].format(**theirs)]
        assert [part.format(**ours) for part in RULER_PROMPTS[name]] == recorded
        assert ruler_draft(name, 4096, "original").tokens == task["tokens_to_generate"]
        assert task["metric"] == "string_match_all"
    assert data.NEEDLE.format(kind="{type_needle_v}", key="{key}", value="{value}") == file["niah"]["needle"]
    assert file["niah"]["haystack_noise"] == data.GRASS
    compare_ruler_settings({name: task["args"] for name, task in tasks.items()}, file["cwe"])


def compare_ruler_settings(settings: dict[str, Record], cwe: Record) -> None:
    for name, spec in data.NIAH.items():
        recorded = data.Needles(*settings[name].values())
        assert spec == recorded._replace(keys=max(recorded.keys, recorded.asked))
    variables = len(ruler_draft("ruler_vt", 4096, "original").references)
    assert settings["ruler_vt"] == {"type_haystack": "noise", "num_chains": 1, "num_hops": variables - 1}
    common = len(ruler_draft("ruler_cwe", 4096, "original").references)
    times, different, shown = data.CWE_COUNTS[4096]
    assert settings["ruler_cwe"] == {"freq_cw": times[0], "freq_ucw": times[1], "num_cw": common}
    assert cwe["example_otherwise"] == {"num_words": different, "freq_cw": shown[0], "freq_ucw": shown[1]}
    times, different, shown = data.CWE_COUNTS[0]
    example = {"num_words": different, "freq_cw": shown[0], "freq_ucw": shown[1]}
    assert cwe["if_max_seq_length_below_4096"] == {"freq_cw": times[0], "freq_ucw": times[1], "example": example}
    assert settings["ruler_fwe"] == {"alpha": 2.0}  # the exponent in data.coded_text


def replay_babilong_description(path: Path) -> None:
    """Each task's wording and labels, and how many tokens are generated."""
    file = read(path)
    assert file["template"] == data.BABILONG_TEMPLATE
    assert file["generation"]["max_new_tokens"] == data.BABILONG_PROTOCOLS["original"][1]
    for task, words in file["prompts"].items():
        ours, filled = data.BABILONG_WORDING[task], {"context": "Facts.", "question": "Why?"}
        assert (ours.instruction, ours.post_prompt) == (words["instruction"], words["post_prompt"])
        assert data.original_prompt(task, **filled) == file["template"].format(**words, **filled)
    for task, labels in file["labels"].items():
        world = data.BABI_WORLDS[task]
        assert labels == (sorted(world.people) + world.objects if task == "qa5" else world.places)
        assert labels == list(eval_niah.BABILONG_LABELS[task])


def replay_real_config(name: str, entry: Record) -> None:
    """What is known of a real checkpoint is what --random-weights makes: its sizes, its tensors, its [MASK]."""
    repo = name.partition(" (")[0].replace("LLaDA2.0", "LLaDA2.1")  # of which no more is known than that they are alike
    sizes = {repo: Config(**sizes) for repo, sizes in BACKBONES.values()}[repo]
    assert [value for key, value in entry["special_tokens"].items() if "mask" in key] == [sizes.mask_id]
    if "config" in entry:
        assert replace(read_llada_config(entry["config"], (), Path(name)), mask_id=sizes.mask_id) == sizes
        ours = {re.sub(r"experts\.\d+", "experts.E", tensor) for tensor in published_tensors(on_meta(sizes))}
        assert {re.sub(r"(layers|blocks)\.\d+", r"\1.N", tensor) for tensor in ours} == set(spelled_out(entry["tensor_names"]))


def spelled_out(patterns: list[str]) -> Iterable[str]:
    """One "layers.0.{up,down}.weight (a remark)" -> layers.N.up.weight and layers.N.down.weight."""
    for pattern in patterns:
        start, choices, stop = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", pattern.split(" ")[0]).groups()
        for choice in (choices or "").split(","):
            yield re.sub(r"(layers|blocks)\.\d+", r"\1.N", start + choice + stop)


# ---- finding all of it ----------------------------------------------------------------------------------------------------


def unknown(file: Record, path: Path) -> list[Replay]:
    """Entries of a file that no replay has asked for."""
    where = f"{path.parent.name}/{path.name}"
    return [(f"{where}/{key}", partial(pytest.fail, f"{where}: {key} is in no known format")) for key in file.unknown()]


def find_forward(path: Path) -> list[Replay]:
    with safe_open(path, "pt") as file:
        cases = dict.fromkeys(key.partition(".")[0] for key in file.keys())
    return [(f"{path.parent.name}/{path.stem}/{case}", partial(replay_forward, path, case)) for case in cases]


def find_memory(folder: Path) -> Iterable[Replay]:
    """Entries of cases.json, and tensors that no entry names."""
    entries = read(folder / "cases.json") if (folder / "cases.json").exists() else Record({})
    tables = read(folder / "tables.json") if (folder / "tables.json").exists() else {}
    files = sorted(path.stem for path in folder.glob("*.safetensors"))
    yield from ((f"memory/{f}", partial(replay_start, folder / f"{f}.safetensors")) for f in files if f.startswith("init_"))
    used = {*entries, *(f for f in files if f.startswith("init_")), *(tables.keys() & {"three_outer_steps"})}
    for name in [*entries, *(f for f in files if f not in used)]:
        yield f"memory/{name}", partial(replay_memory, folder, name, entries)


def single(replay: Callable[[Path], None]) -> Callable[[Path], list[Replay]]:
    """A file, or a folder, that is one record."""
    return lambda path: [(f"{path.parent.name}/{path.stem}", partial(replay, path))]


FORMATS: dict[str, Callable[[Path], Iterable[Replay]]] = {
    "*/checkpoint*": single(replay_checkpoint),
    "*/forward*.safetensors": find_forward,
    "memory": find_memory,
    "memory/tables.json": lambda path: [(f"memory/{name}", partial(replay_table, path, name)) for name in read(path)],
    "sampler/traces.json": find_traces,
    "sampler/num_transfer_tokens.json": lambda path: [
        (f"sampler/schedule_{name}", lambda name=name, table=table: replay_schedule(SCHEDULES[name], table))
        for name, table in read(path).items()
    ],
    "llada21/sampler_traces.json": find_traces,
    "ruler/scoring_examples.json": find_ruler_scores,
    "ruler/samples_*.json": find_ruler_samples,
    "ruler/description.json": single(replay_ruler_description),
    "babilong/scoring_examples.json": lambda path: [
        (f"babilong/scoring_{i}", partial(replay_babilong, example)) for i, example in enumerate(read(path))
    ],
    "babilong/prompts.json": lambda path: [
        (f"babilong/{task}", partial(replay_babilong_sample, task, recorded)) for task, recorded in read(path).items()
    ],
    "babilong/description.json": single(replay_babilong_description),
    "real_configs.json": lambda path: [(name, partial(replay_real_config, name, entry)) for name, entry in read(path).items()],
}


def find(golden: Path) -> list[Replay]:
    """Every record below `golden`. A file that cannot be read is one that cannot be replayed."""
    found: list[Replay] = []
    for pattern, finder in FORMATS.items():
        for path in sorted(golden.glob(pattern)):
            try:
                found += finder(path)
            except Exception as error:
                found.append((str(path.relative_to(golden)), partial(pytest.fail, f"{path} cannot be read: {error!r}")))
    return found or [("nothing", partial(pytest.fail, f"{golden} holds no record"))]


def pytest_generate_tests(metafunc):
    names, replays = zip(*find(metafunc.config.getoption("golden").resolve()))
    metafunc.parametrize("replay", replays, ids=names)


def test_record_is_replayed(replay):
    replay()
