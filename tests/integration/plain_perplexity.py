"""Run as a process of its own: a model's perplexity by transformers and peft alone, never importing edgelam_fl.

Reads lines of JSON from stdin, {model, tokenizer, adapters: {name: folder}, max_tokens, threads, pairs: {device: [[prompt, answer], ...]}},
and answers each with a line, {name: {device: perplexity}}, with "" as the name of the model alone; `model` is its folder, or a file of
torch's with the whole model. Takes one example at a time, so that nothing is padded.
"""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["edgelam_fl"] = None  # whoever imports it now fails


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(task: dict[str, Any]) -> dict[str, dict[str, float]]:
    torch.set_num_threads(task["threads"])
    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    is_folder = Path(task["model"]).is_dir()
    base = (
        AutoModelForCausalLM.from_pretrained(task["model"])
        if is_folder
        else torch.load(task["model"], weights_only=False)
    )
    examples = {
        device: [tokens_of(tokenizer, prompt, answer, task["max_tokens"]) for prompt, answer in pairs]
        for device, pairs in task["pairs"].items()
    }
    found = {"": {device: perplexity(base, own) for device, own in examples.items()}}
    for name, adapter in task["adapters"].items():
        tuned = PeftModel.from_pretrained(copy.deepcopy(base), adapter)
        found[name] = {device: perplexity(tuned, own) for device, own in examples.items()}
    return found


def tokens_of(tokenizer: Any, prompt: str, answer: str, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels): the chat template's whole conversation, of which the answer's turn is learned; the oldest tokens go if it is long."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    told = tokenizer.apply_chat_template(turns, tokenize=False)
    assert told.startswith(asked)
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, told))
    assert whole[: len(before)] == before
    labels = [-100] * len(before) + whole[len(before) :]
    over = max(0, len(whole) - max_tokens)
    assert over <= len(before), "an answer is never cut"
    return torch.tensor([whole[over:]]), torch.tensor([labels[over:]])


@torch.no_grad()
def perplexity(model: Any, examples: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    model.train(False)
    loss, count = 0.0, 0
    for ids, labels in examples:
        labelled = int((labels[:, 1:] != -100).sum())
        if labelled:
            loss += float(model(input_ids=ids, labels=labels).loss) * labelled
            count += labelled
    return math.exp(loss / count)


if __name__ == "__main__":
    main()
