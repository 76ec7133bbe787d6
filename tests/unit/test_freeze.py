"""What a pattern of train.freeze names: whole parts of either name, all of a tensor or an error."""

import pytest

from glm45_tune.conversion.names import rows
from glm45_tune.conversion.patterns import frozen
from glm45_tune.errors import RecipeError
from glm45_tune.spec import load_spec


@pytest.fixture(scope="module")
def spec(checkpoints):
    return load_spec(checkpoints["355b"])


def test_patterns_by_either_name(spec):
    def named(*patterns, with_mtp=True):
        return frozen(spec, list(patterns), with_mtp)

    assert named("embedding") == named("embed_tokens") == {"embedding.word_embeddings.weight"}
    assert named("lm_head") == named("output_layer") == {"output_layer.weight"}
    assert named("layers.0") == {
        row.hybrid for row in rows(spec) if row.hybrid.startswith(("decoder.layers.0.", "decoder.layers.1.", "mtp."))
    } - {row.hybrid for row in rows(spec) if row.hybrid.startswith("mtp.") and "layers.0" not in row.gpt}
    assert named("model.layers.0") == {
        row.hybrid for row in rows(spec) if row.hybrid.startswith(("decoder.layers.0.", "decoder.layers.1."))
    }
    routers = {row.hybrid for row in rows(spec) if ".router." in row.hybrid}
    assert named("router") == routers == named("mlp.gate", "e_score_correction_bias")
    assert named("mlp.experts", with_mtp=False) == {
        row.hybrid for row in rows(spec) if ".experts.experts." in row.hybrid and not row.hybrid.startswith("mtp.")
    }
    # a norm is not the linear behind it, although Transformer Engine names it so
    assert not any("layer_norm" in name for name in named("linear_qkv"))
    assert any("layer_norm" in name for name in named("input_layernorm"))
    assert named("model.layers.[01].self_attn") == {
        row.hybrid
        for row in rows(spec)
        if row.hybrid.startswith(("decoder.layers.0.self_attention", "decoder.layers.2.self_attention"))
        and not row.hybrid.endswith("layer_norm_weight")
    }


@pytest.mark.parametrize(
    "patterns, with_mtp, words",
    [
        (["embeddings"], True, ["'embeddings' names no weight", "Did you mean embedding?", "embed_tokens"]),
        (["embed"], True, ["'embed' names no weight"]),
        (["layers.77"], True, ["names no weight"]),
        (["enorm"], False, ["names no weight", "mtp_loss_scaling_factor is 0"]),
        (["q_proj"], True, ["'q_proj' names model.layers.0.self_attn.q_proj.weight", "k_proj", "Name all or none"]),
        (["experts.3"], True, ["'experts.3' names", "Name all or none"]),
        (["*"], True, ["leave no weight to train"]),
    ],
)
def test_a_pattern_that_cannot_be_meant(spec, patterns, with_mtp, words):
    with pytest.raises(RecipeError) as fault:
        frozen(spec, patterns, with_mtp)
    for word in words:
        assert word in str(fault.value)
