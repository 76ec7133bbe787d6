"""Does our model compute what transformers' does? Hidden states after every layer, and logits, on the same tokens."""

from dataclasses import asdict, dataclass

import torch

from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.tensors import HfReader
from glm45_tune.layout import Layout
from glm45_tune.mcore import runtime
from glm45_tune.mcore.load import load_weights
from glm45_tune.mcore.model import GLM45Model

# fp32 sums in another order: some 1e-7 a layer; a wrong weight, rope or router shows up at 1e-2 and more
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ForwardReport:
    """differences: place → largest absolute difference over the range of the reference there."""

    differences: dict[str, float]
    num_tokens: int

    @property
    def equal(self) -> bool:
        return all(difference <= TOLERANCE for difference in self.differences.values())

    def document(self) -> dict:
        return {"equal": self.equal, "tolerance": TOLERANCE, **asdict(self)}


@torch.no_grad()
def compare_forward(reference: HfDir, model: HfReader, num_tokens: int = 96, seed: int = 0) -> ForwardReport:
    """Run `reference` in transformers and `model` in megatron, both in fp32, on two random documents in one packed row."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    runtime.start(Layout())
    ours = GLM45Model(model.spec, Layout())
    load_weights(ours, model)
    ours.to(runtime.device()).eval()
    theirs = transformers.Glm4MoeForCausalLM.from_pretrained(str(reference.path), dtype=torch.float32)
    theirs.to(runtime.device()).eval()

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, reference.spec.vocab_size, (num_tokens,), generator=generator).to(runtime.device())
    cut = num_tokens // 3
    bounds = [0, cut, num_tokens]
    positions = torch.cat([torch.arange(cut), torch.arange(num_tokens - cut)]).to(runtime.device())
    our_states, their_states = _Recorder(), _Recorder()
    for layer in range(reference.spec.num_layers):
        our_states.listen(ours.decoder.layers[2 * layer + 1], f"layer {layer}")
        their_states.listen(theirs.model.layers[layer], f"layer {layer}")
    our_states["logits"] = ours(tokens, positions, bounds)
    documents = [theirs(tokens[None, first:last]).logits[0] for first, last in zip(bounds, bounds[1:])]
    their_states["logits"] = torch.cat(documents)
    differences = {
        place: ((our_states[place] - theirs).abs().max() / (theirs.max() - theirs.min())).item()
        for place, theirs in their_states.items()
    }
    return ForwardReport(differences, num_tokens)


class _Recorder(dict):
    """Place → what a module put out there [T, hidden], documents end to end."""

    def listen(self, module: torch.nn.Module, place: str) -> None:
        def record(module, inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            states = states.reshape(-1, states.shape[-1])
            self[place] = torch.cat([self[place], states]) if place in self else states

        module.register_forward_hook(record)
