"""The model card: what was trained, on what, how, what it reached, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_lightning import __version__
from dpo_lightning.outputs.results import figures

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
PACKAGES = ("torch", "transformers", "peft", "lightning", "datasets")

CITATION = """\
```bibtex
@inproceedings{rafailov2023direct,
    title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
    author = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and
        Chelsea Finn},
    booktitle = {Advances in Neural Information Processing Systems 36},
    year = {2023},
    url = {https://arxiv.org/abs/2305.18290},
}
```
"""

LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
"""
LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
"""
ASK_CHAT = """\
messages = [{{"role": "user", "content": {question}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
ASK_PLAIN = """\
inputs = tokenizer({question}, return_tensors="pt")
"""
ANSWER = """\
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Card:
    """All that a model card tells; `config` is the run's resolved configuration.

    validations: as `results.validations` returns them, oldest first; None where they cannot be read.
    """

    base: str
    base_loaded_from: str
    note: str | None
    data: str
    pairs: int
    pairs_seen: int
    steps: int
    devices: int
    config: Mapping[str, Any]
    validations: Sequence[Mapping[str, float]] | None
    question: str
    chat: bool

    def text(self, folder: Path, is_adapter: bool) -> str:
        """Return the card of an export that lies in `folder`."""
        where = self.config["export"]["hub_id"] or str(folder)
        title = (self.config["export"]["hub_id"] or folder.parent.name).rsplit("/", 1)[-1]
        sections = [
            self._front_matter(is_adapter),
            f"# {title}\n\n{self._what(is_adapter)}",
            f"## Quick start\n\n{self._quick_start(where, is_adapter)}",
            f"## Training\n\n{self._training()}",
            f"## Result\n\n{self._result()}",
            f"## Versions\n\n- dpo-lightning {__version__}\n" + "\n".join(f"- {p} {version(p)}" for p in PACKAGES),
            f"## Citation\n\n{CITATION}",
        ]
        return "\n\n".join(section.rstrip() for section in sections) + "\n"

    def _front_matter(self, is_adapter: bool) -> str:
        lora = "r" in self.config["lora"]
        tags = [
            "dpo",
            *(["lora"] if lora else []),
            "transformers",
            *(["peft"] if lora else []),
            "dpo-lightning",
        ]
        lines = [
            f"base_model: {json.dumps(self.base)}",
            *(["base_model_relation: adapter"] if is_adapter else ["base_model_relation: finetune"]),
            f"library_name: {'peft' if is_adapter else 'transformers'}",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {tag}" for tag in tags),
        ]
        return "\n".join(["---", *lines, "---"])

    def _what(self, is_adapter: bool) -> str:
        lora = "r" in self.config["lora"]
        kind = "A LoRA adapter of" if is_adapter else ("A LoRA adapter merged into" if lora else "All weights of")
        on_hub = HUB_ID.fullmatch(self.base) and not Path(self.base).exists()
        text = f"{kind} " + (f"[{self.base}](https://huggingface.co/{self.base}), " if on_hub else f"`{self.base}`, ")
        pairs = f"{self.pairs}" if self.pairs_seen == self.pairs else f"{self.pairs_seen} of the {self.pairs}"
        text += f"tuned with Direct Preference Optimization on {pairs} preference pairs of `{self.data}`."
        if self.note:
            text += f" {self.note}"
        if is_adapter and self.base_loaded_from != self.base:
            text += (
                f"\n\nThe adapter's config names these weights where they lay in training: `{self.base_loaded_from}`."
            )
        return text

    def _quick_start(self, where: str, is_adapter: bool) -> str:
        load = (LOAD_ADAPTER if is_adapter else LOAD_MODEL).format(where=where)
        ask = (ASK_CHAT if self.chat else ASK_PLAIN).format(question=json.dumps(self.question, ensure_ascii=False))
        return f"```python\n{load}\n{ask}{ANSWER}```"

    def _training(self) -> str:
        c = self.config
        rows = {
            "loss": f"{c['loss']['_target_'].rsplit('.', 1)[-1]}, "
            + ", ".join(f"{k} {v}" for k, v in c["loss"].items() if not k.startswith("_")),
            "learning rate": f"{c['optim']['lr']}, {c['optim']['schedule']}, warm-up {c['optim']['warmup_fraction']}",
            "pairs per step": c["data"]["batch_size"] * c["trainer"]["accumulate_grad_batches"] * self.devices,
            "steps": self.steps,
            "max_length": c["data"]["max_length"],
            "gradient clipping": c["trainer"]["gradient_clip_val"],
            "weight decay": c["optim"]["weight_decay"],
            "precision": c["trainer"]["precision"],
            "seed": c["seed"],
        }
        if "r" in c["lora"]:
            rows["LoRA"] = ", ".join(f"{k} {v}" for k, v in c["lora"].items() if not k.startswith("_"))
        return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())

    def _result(self) -> str:
        if not self.validations:
            return "No validation was run." if self.validations is not None else "What was measured cannot be read."
        shown = [*self.validations[:1], *self.validations[1:][-1:]]  # the first and the last, which may be one
        rows = [["held-out pairs", *(f"step {row['step']}" for row in shown)], ["---"] * (1 + len(shown))]
        rows += [[name, *values] for name, values in figures(shown)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def merged_card(text: str, model: Path) -> str:
    """Return an adapter's card, given as `text`, as the card of the `model` folder that it was merged into.

    It is loaded from there, wherever the run's folder was when the adapter was written; a hub's id stays.
    """
    changes = {
        "base_model_relation: adapter": "base_model_relation: finetune",
        "library_name: peft": "library_name: transformers",
        "A LoRA adapter of": "A LoRA adapter merged into",
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer":
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "AutoPeftModelForCausalLM": "AutoModelForCausalLM",
    }  # fmt: skip
    text = re.sub(r"\n\nThe adapter's config names these weights.*", "", text)
    for old, new in changes.items():
        text = text.replace(old, new)
    return re.sub(r'(?<=\.from_pretrained\(")/.*(?="\)\n)', lambda _: str(model.absolute()), text)
