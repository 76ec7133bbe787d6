"""A model that answers, in this process, by transformers (and PEFT for an adapter)."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from glm45_tune.chat.answers import Answer
from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.stream import open_model
from glm45_tune.data.chat import NO_TEMPLATE, Sample, load_tokenizer
from glm45_tune.errors import CheckpointError, UserError
from glm45_tune.spec import ModelSpec, load_spec

_TOKENS = 4096  # scored together
_HEAD = 512  # positions that meet the head at once


def check_model(model: str | Path, adapter: str | Path | None = None) -> ModelSpec:
    """Raise CheckpointError unless `model` is a Hugging Face directory of a GLM-4.5 model, and `adapter` one of it."""
    spec = load_spec(model)
    if not any(Path(model).glob("*.safetensors")):
        raise CheckpointError(f"{model}: no safetensors here; convert a megatron checkpoint with --to-hf first.")
    if adapter is not None:
        Merged(open_model(model), adapter)  # it compares base and shapes
    return spec


class ChatModel:
    """Loads a Hugging Face directory, spread over the visible devices, with an adapter on top where one is given."""

    def __init__(self, model: str | Path, adapter: str | Path | None = None, device_map: str | None = None):
        self.path, spec = Path(model), check_model(model, adapter)
        import transformers

        transformers.utils.logging.set_verbosity_error()  # it lists the MTP layer, which it does not use, as unexpected
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(model)
        if not self.tokenizer.chat_template:
            raise UserError(f"{model}: {NO_TEMPLATE}.")
        device_map = device_map or ("auto" if torch.cuda.is_available() else None)
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                str(model), dtype="auto", device_map=device_map, use_safetensors=True, trust_remote_code=False
            )
        except (
            ValueError,
            RuntimeError,
            ImportError,
        ) as error:  # a library that its quantization needs may not be here
            raise UserError(
                f"{model}: cannot be loaded (device_map {device_map}): {str(error).strip().splitlines()[0]}"
            ) from error
        self.model.eval()
        self.stop_ids = list(spec.eos_token_ids)
        if adapter is not None:
            self.put_adapter(adapter)

    def put_adapter(self, adapter: str | Path | None) -> None:
        """Take the adapter off, and put this one on; None: the base alone. The base stays where it is."""
        if adapter is not None:
            check_model(self.path, adapter)
        if hasattr(self.model, "peft_config"):
            self.model = self.model.unload()
        if adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, str(adapter)).eval()

    def merge_adapter(self) -> None:
        """Add the adapter into the weights, which is quicker. PEFT rounds the sum in the weights' dtype; an export adds in fp32."""
        self.model = self.model.merge_and_unload()

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

    def stream(self, prompt: str, max_new_tokens: int = 512) -> Iterator[str]:
        """The answer to one prompt in pieces, as it is written."""
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(1) as worker:
            written = worker.submit(self.generate, [prompt], max_new_tokens, streamer=streamer)
            written.add_done_callback(
                lambda _: streamer.end()
            )  # whoever reads the pieces does not wait for what failed
            yield from streamer
            written.result()

    @torch.inference_mode()
    def perplexity(self, samples: list[Sample]) -> float:
        """exp of the mean loss over the trained tokens of samples, each weighted as in training."""
        whole = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        loss = weight = 0.0
        for batch in _batches(samples):
            longest = max(len(sample.input_ids) for sample in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask, there = torch.zeros(len(batch), longest), torch.zeros(len(batch), longest, dtype=torch.long)
            for row, sample in enumerate(batch):
                length = len(sample.input_ids)
                ids[row, :length] = torch.from_numpy(sample.input_ids.astype("int64"))
                mask[row, :length], there[row, :length] = torch.from_numpy(sample.loss_mask), 1
            ids, mask, there = (tensor.to(self.model.device) for tensor in (ids, mask, there))
            hidden = whole.model(input_ids=ids, attention_mask=there).last_hidden_state[:, :-1][mask[:, 1:] > 0]
            targets, weights = ids[:, 1:][mask[:, 1:] > 0], mask[:, 1:][mask[:, 1:] > 0]
            for first in range(0, len(targets), _HEAD):
                part = slice(first, first + _HEAD)
                logits = whole.lm_head(hidden[part]).float()
                losses = torch.nn.functional.cross_entropy(logits, targets[part].to(logits.device), reduction="none")
                loss += float((losses * weights[part].to(losses.device)).sum())
            weight += float(weights.sum())
        return math.exp(min(loss / weight, 700)) if weight else math.nan

    def _answer(self, ids: list[int]) -> Answer:
        end = next((position for position, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return Answer(self.tokenizer.decode(ids[:end]))


def _batches(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Samples of like length together, as many as the padded batch may hold."""
    batch: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.input_ids)):
        if batch and len(sample.input_ids) * (len(batch) + 1) > _TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch
