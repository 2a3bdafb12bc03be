"""Does healing on the original's own answers keep reasoning? Word problems in the chat template.

The original answers problems of GSM8K's training part and openings of conversations (at temperature
0.8, up to `--length` tokens). A state is cut, patched by least squares, and healed for equal steps:
on the usual mixture of texts, and on these answers. Then every model answers the first
`--problems` of GSM8K's test part, greedily and without examples; the last number of an answer
counts. Losses are on text that nothing was chosen, fitted or trained on.

Figures, for M removed blocks, with the `--prefix` in front. STAGE is original, cut, wiki (healed on
the mixture) or own (on own answers):

gsm8k_M_STAGE  number of right answers, of gsm8k_M_n
ended_M_STAGE  number of answers that end within the limit
own_gain_percent_M  right answers of own less those of wiki, in points; _se: its standard error,
  paired by problem
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from isingcut.data.conversations import render_chat
from isingcut.data.healing_text import HealingText, build
from isingcut.models.architectures.blocks import skip_blocks
from isingcut.models.load import LoadedModel
from studies.runner import Content, Part, numbers
from studies.runner_models import difference, key, mean_loss
from studies.runner_repair import RepairStudy

OWN = "own"
STAGES = {"original": "original", "cut": "cut", "healed": "wiki", OWN: "own"}
TOGETHER = 32
"""Questions that a model answers in one batch."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(answer: str, right: str) -> bool:
    """Return whether the last number of an answer is the right one."""
    last, wanted = (NUMBER.findall(text)[-1:] for text in (answer, right))
    return bool(last) and float(last[0].replace(",", "")) == float(wanted[0].replace(",", ""))


class Answers(RepairStudy):
    """Study of one state healed on two texts."""

    name = "answers"
    judged = ("wikitext2", "c4", "instruct", "code")
    # Many samples, so that few of those to train on are among those that the patch was fitted on.
    defaults: ClassVar[Content] = {
        "model": "coder",
        "method": "lora",
        "rate": 7e-4,
        "samples": 1600,
        "patch_tokens": 16384,
    }
    settings = (*RepairStudy.settings, "blocks", "problems")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add("--blocks", type=numbers, default=[13, 14, 15, 16], help="to remove")
        add("--problems", type=int, default=100)
        add("--prefix", default="coder_", help="of the names of figures")

    def answer(self, model: Any, questions: Sequence[str], **sampling: Any) -> Content:
        """Return a model's answers, and for each whether it ended ("1") within `--length`."""
        tokenizer, texts, ended = self.original.tokenizer, list[str](), ""
        sampling |= {"repetition_penalty": 1.0, "max_new_tokens": self.options.length}
        ends = torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id])
        for i in range(0, len(questions), TOGETHER):
            some = questions[i : i + TOGETHER]
            turns = [[{"role": "user", "content": question}] for question in some]
            prompts = [render_chat(tokenizer, t, add_generation_prompt=True) for t in turns]
            padded = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
            read = tokenizer(prompts, add_special_tokens=False, **padded)
            written = model.generate(**read, **sampling)[:, read["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(written, skip_special_tokens=True)
            ended += "".join(map(str, torch.isin(written[:, -1].cpu(), ends).int().tolist()))
        return {"answers": texts, "ended": ended}

    def solve(self, model: Any) -> Content:
        """Return a model's answers to the problems, with right ("1") or wrong for each."""
        problems = self.texts.records("gsm8k/test_sub200")[: self.options.problems]
        found = self.answer(model, [p["context"] for p in problems], do_sample=False)
        both = zip(found["answers"], problems, strict=True)
        return {**found, "right": "".join(str(int(is_right(a, p["answer"]))) for a, p in both)}

    def _solved(self, stage: str) -> Part:
        """Return the part in which the original, or its exact cut, answers the problems."""

        def make(_: Path) -> Content:
            with skip_blocks(self.original.model, self.options.blocks * (stage == "cut")):
                return self.solve(self.original.model)

        return Part(f"solved/{stage}", make, 4 * self.options.length * self.options.problems)

    def _sampled(self, first: int, questions: list[str]) -> Part:
        """Return the part in which the original answers questions to heal on."""

        def make(_: Path) -> Content:
            torch.manual_seed(self.options.seed + first)
            sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
            found = self.answer(self.original.model, questions, **sampling)
            turns = zip(questions, found["answers"], strict=True)
            return {"ended": found["ended"], "chats": [_chat(*turn) for turn in turns]}

        return Part(f"sampled/{first:04}", make, 4 * self.options.length * len(questions))

    def text_of(self, stage: str) -> HealingText:
        if stage != OWN:
            return super().text_of(stage)
        o, chats = self.options, [chat for part in self.under("sampled") for chat in part["chats"]]
        return build(
            f"answers:{self.texts.write(f'own-{len(chats)}', chats)}",
            self.original.tokenizer,
            samples=max(o.steps) * o.batch,
            report_samples=4,
            length=2 * o.length,
            seed=o.seed,
        )

    def _judged(self, loaded: LoadedModel, stage: str, journal: Path) -> Content:
        found = super()._judged(loaded, stage, journal)
        return found if stage == "patched" else found | self.solve(loaded.model)

    def parts(self) -> list[Part]:
        o = self.options
        # Four are for the report of the healing, and a few questions may be too long to be used.
        questions = self.texts.questions(int(1.1 * max(o.steps) * o.batch) + 4)
        sampled = [
            self._sampled(i, questions[i : i + TOGETHER])
            for i in range(0, len(questions), TOGETHER)
        ]
        healed = [self.repair(o.blocks, stage) for stage in ("patched", OWN, "healed")]
        losses = [p for text in self.judged for p in self.losses(text, [(), o.blocks])]
        return [*sampled, *healed, *losses, *map(self._solved, ("original", "cut"))]

    def collect(self) -> Content:
        name, stages = key(self.options.blocks), Content()
        for stage, shown in STAGES.items():
            at = f"{stage}/{name}" if stage in ("healed", OWN) else f"solved/{stage}"
            row = self.read(at)
            losses = row.get("losses") or {
                text: self.rows(f"losses/{text}")["original" if stage == "original" else name]
                for text in self.judged
            }
            kl = {text: mean_loss([row], "kl") for text, row in losses.items()}
            kept = ("right", "ended", "tokens_seen")
            stages[shown] = {k: row[k] for k in kept if k in row} | {"kl": kl}
        settings = {k: getattr(self.options, k) for k in self.settings}
        settings["prefix"] = self.options.prefix
        return {"settings": settings, "provenance": self.provenance(), "stages": stages}

    @staticmethod
    def show(content: Content) -> dict[str, float]:
        """Print the table and return the figures."""
        settings, stages = content["settings"], content["stages"]
        m, figures = len(settings["blocks"]), dict[str, float]()
        for stage, row in stages.items():
            right, ended = (row[k].count("1") for k in ("right", "ended"))
            figures |= {f"gsm8k_{m}_{stage}": right, f"ended_{m}_{stage}": ended}
            kl = ", ".join(f"{text} {value:.3f}" for text, value in row["kl"].items())
            print(f"{stage:<9} {right} right, {ended} ended, {row.get('tokens_seen')}; KL: {kl}")
        wiki, own = ({"gsm8k": stages[stage]} for stage in ("wiki", "own"))
        gain, error = difference(wiki, own, ["gsm8k"])
        figures |= {f"own_gain_percent_{m}": 100 * gain, f"own_gain_percent_{m}_se": 100 * error}
        figures[f"gsm8k_{m}_n"] = len(stages["own"]["right"])
        return {settings["prefix"] + name: value for name, value in figures.items()}


def _chat(question: str, answer: str) -> Content:
    turns = zip(("user", "assistant"), (question, answer), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}
