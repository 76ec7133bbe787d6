"""A model that answers, in this process, by transformers (and PEFT for an adapter)."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from glm45_tune.data.chat import load_tokenizer
from glm45_tune.errors import CheckpointError
from glm45_tune.spec import ModelSpec, load_spec

_THOUGHT = re.compile(r"^\s*(?:<think>)?(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """What a model wrote: raw, its thought (empty when it did not think) and what it said after it."""

    text: str

    @property
    def thought(self) -> str:
        found = _THOUGHT.match(self.text)
        return found.group(1).strip() if found else ""

    @property
    def content(self) -> str:
        return _THOUGHT.sub("", self.text, count=1).strip()


def check_model(model: str | Path) -> ModelSpec:
    """Raise CheckpointError unless `model` is a Hugging Face directory of a GLM-4.5 model."""
    spec = load_spec(model)
    if not any(Path(model).glob("*.safetensors")):
        raise CheckpointError(f"{model}: no safetensors here; convert a megatron checkpoint with --to-hf first.")
    return spec


class ChatModel:
    """Loads a Hugging Face directory, spread over the visible devices, with an adapter on top where one is given."""

    def __init__(self, model: str | Path, adapter: str | Path | None = None):
        spec = check_model(model)
        import transformers

        transformers.utils.logging.set_verbosity_error()  # it lists the MTP layer, which it does not use, as unexpected
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(model)
        device_map = "auto" if torch.cuda.is_available() else None
        self.model = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype="auto", device_map=device_map)
        if adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, str(adapter))
        self.model.eval()
        self.stop_ids = list(spec.eos_token_ids)

    def prompt(self, messages: list[dict], think: bool | None = None, tools: list | None = None) -> str:
        """The prompt text; think None leaves the template's default (thinking)."""
        options = {} if think is None else {"enable_thinking": think}
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **options
        )

    @torch.inference_mode()
    def generate(self, prompts: list[str], max_new_tokens: int = 512, **sampling) -> list[Answer]:
        """Answer all prompts in one batch; greedy unless sampling options of transformers are given."""
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self.model.device)
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | sampling
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        return [self._answer(ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((position for position, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return Answer(self.tokenizer.decode(ids[:end]))
