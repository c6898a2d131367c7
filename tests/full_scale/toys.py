"""
toys.py: `eval_niah.py --backbone` on a random backbone that is small enough for a test.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from backbones import add_random_lora, toy_model
from commands import checkpoints, contents, jsonl

from full_scale import report
from full_scale.adapters import save_adapter
from full_scale.backbone import note_training
from lab.report import matching
from lab.tools import start

ESSAY = 4 * "A fox went out at night. Dr. Who saw it! Long was the road, and he sang to the moon. "
HINDI = "वसंत आ गया है। बगीचे में फूल खिल गए हैं। "
HINDI += "बच्चे घास पर दौड़ रहे हैं। बूढ़े लोग बेंच पर बैठे हैं। "
LANGUAGES = {
    "Hindi": (HINDI, "।"),  # a text, and the signs that a needle may stand behind
    "Chinese": (
        "春天来了，花园里的花都开了。孩子们问：「是真的吗？」他们在草地上跑来跑去！",
        "。！」",
    ),
    "verse": ("床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。\n", "。"),
    "Japanese": (
        "もうすっかり春になった。庭の花がみんな咲いた！子どもたちは走るだろうか？はい、と彼は言った。",
        "。！？",
    ),
    "Thai": ("ฤดูใบไม้ผลิมาถึงแล้วดอกไม้ในสวนบานหมดแล้วเด็กเด็กวิ่งเล่นบนสนามหญ้า", ""),
    "Arabic": ("جاء الربيع. هل تفتحت الأزهار في الحديقة؟ يركض الأطفال على العشب. ", ".؟"),
    "no stops": ("one two three four five six seven eight nine ten eleven twelve ", ""),
}
METHODS = ["base", "mdlm", "memdlm_train", "memdlm_train_inference"]
ONE = "--tasks niah_single_1 --lengths 330 --steps 1 --samples 1"  # one cheap question


@functools.cache
def toys() -> Path:
    """The backbones of `checkpoints`, an adapter of each method for the first (mdlm, memdlm), pairs
    (few.jsonl) and a text (essay.txt, essay.json). Nobody writes into them."""
    root = checkpoints()["llada"].parent
    for seed, method in enumerate(("mdlm", "memdlm")):
        model = add_random_lora(toy_model("llada", torch.float32), 4, seed=seed)
        save_adapter(model, root / method, rank=4, alpha=8.0, dropout=0.0, base="toy")
        note_training(root / method, {"method": method})
    pairs = [{"prompt": f"Who is {i}?", "response": " Mary" * (i + 1)} for i in range(5)]
    (root / "few.jsonl").write_text(jsonl(pairs))
    (root / "essay.txt").write_text(ESSAY)
    (root / "essay.json").write_text(json.dumps({"text": ESSAY}))
    return root


def command(out: Path, flags: str) -> list[str]:
    """Arguments for eval_niah.py. {} in the flags is the toys' folder."""
    own = ["--backbone", str(toys() / "llada"), "--out", str(out), "--device", "cpu"]
    return own + flags.replace("{}", str(toys())).split()


def ask(out: Path, flags: str, draw: bool = False) -> Path:
    """Evaluates by the real command, in this process, without pictures unless a test asks."""
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(report, "draw_pictures", lambda results, out: None)
        start("eval_niah", command(out, flags))
    return out


def lines_of(out: Path) -> list[dict]:
    """What predictions.jsonl says, but for the time that it took."""
    text = (out / "predictions.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def answers_of(out: Path, **where) -> list[dict]:
    """The answers that have these values."""
    return matching([line for line in lines_of(out) if "settings" not in line], **where)


def predictions(out: Path, method: str) -> list[str]:
    """What a row has answered, in the order of the questions."""
    answers = answers_of(out, method=method)
    return [answer["prediction"] for answer in answers if "prediction" in answer]


def settings_of(out: Path) -> dict[str, dict]:
    """Those of each method's last task."""
    return {line["method"]: line["settings"] for line in lines_of(out) if "settings" in line}


def final(out: Path) -> dict:
    """All that an evaluation leaves, byte for byte but for the seconds."""
    return contents(out) | {"predictions.jsonl": lines_of(out)}
