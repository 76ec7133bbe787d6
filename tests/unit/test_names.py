"""The table of names: total, one claim a tensor, in both dialects, at real sizes."""

import json
import time
from collections import Counter

import pytest

from glm45_tune.conversion.hf_files import HfDir, plan_hf
from glm45_tune.conversion.mcore_files import plan_mcore
from glm45_tune.conversion.names import DIALECTS, hf_shapes, mtp_copies, rows
from glm45_tune.spec import ModelSpec
from glm45_tune.tiny.checkpoint import RandomModel

COMMON = dict(
    model_type="glm4_moe", num_attention_heads=96, num_key_value_heads=8, head_dim=128, num_experts_per_tok=8,
    n_shared_experts=1, norm_topk_prob=True, vocab_size=151552, attention_bias=True, partial_rotary_factor=0.5,
    rope_theta=1000000, rms_norm_eps=1e-5, num_nextn_predict_layers=1, eos_token_id=[151329, 151336, 151338],
)  # fmt: skip
SIZES_355B = dict(
    num_hidden_layers=92, first_k_dense_replace=3, hidden_size=5120, intermediate_size=12288,
    moe_intermediate_size=1536, n_routed_experts=160, routed_scaling_factor=2.5, use_qk_norm=True,
)  # fmt: skip
GLM45 = ModelSpec.from_config(COMMON | SIZES_355B, "355B")
AIR = ModelSpec.from_config(
    COMMON | dict(
        num_hidden_layers=46, first_k_dense_replace=1, hidden_size=4096, intermediate_size=10944,
        moe_intermediate_size=1408, n_routed_experts=128, routed_scaling_factor=1.0, use_qk_norm=False,
    ), "Air",
)  # fmt: skip


@pytest.mark.parametrize("spec, tensors, billions", [(GLM45, 44_691, 358.3), (AIR, 18_329, 110.5)], ids=["355b", "air"])
def test_counts_are_those_of_the_released_checkpoints(spec, tensors, billions):
    """Tensors in the index of zai-org's releases, and parameters with MTP, its copies of embedding and head counted too."""
    shapes = hf_shapes(spec)
    assert len(shapes) == tensors
    count = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    assert round(count / 1e9, 1) == billions


@pytest.mark.parametrize("spec", [GLM45, AIR], ids=["355b", "air"])
def test_every_name_is_claimed_exactly_once(spec):
    """Two rows writing one tensor, or one tensor never written, is a silent wrong model."""
    claimed = Counter(
        name for row in rows(spec) for expert in range(row.num_experts or 1) for name in row.hf_names(expert)
    )
    assert max(claimed.values()) == 1
    assert set(claimed) | set(mtp_copies(spec)) == set(hf_shapes(spec))
    for dialect in DIALECTS:
        names = Counter(name for row in rows(spec) for name in (row.name(dialect), *row.alias_names(dialect)))
        assert max(names.values()) == 1


def test_pieces_cover_every_row_of_every_part_once():
    for row in rows(AIR):
        seen = Counter((part, index) for part, lo, hi in row.pieces for index in (lo, hi - 1))
        covered = {part: sum(hi - lo for p, lo, hi in row.pieces if p == part) for part in range(len(row.parts))}
        assert covered == {index: part.shape[0] for index, part in enumerate(row.parts)}
        assert max(seen.values()) <= 2


def test_planning_355b_is_quick(tmp_path):
    """Opening, checking and planning all 44,691 tensors both ways, 2 s each on an idle core; the files are there, their bytes are not."""
    config = COMMON | SIZES_355B
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = RandomModel(GLM45, 0, config)
    for file in plan_hf(model, 5 * 10**9):
        with open(tmp_path / file.name, "wb") as output:
            output.write(file.parts[0])
            output.truncate(file.size)  # a hole
    for plan in (lambda source: plan_hf(source, 2 * 10**9), lambda source: plan_mcore(source, "hybrid")):
        rows.cache_clear()
        started = time.process_time()
        source = HfDir(tmp_path)
        source.check()
        files = plan(source)
        seconds = time.process_time() - started
        assert sum(file.size for file in files) > 7e11 and len(source.names) == 44_691
        assert seconds < 6, f"{seconds:.1f} s"


def test_rope_keys_nested_or_flat_read_the_same(tmp_path):
    flat = COMMON | dict(
        num_hidden_layers=2, first_k_dense_replace=1, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        n_routed_experts=8, routed_scaling_factor=1.0, use_qk_norm=False,
    )  # fmt: skip
    nested = {key: value for key, value in flat.items() if key not in ("rope_theta", "partial_rotary_factor")}
    nested["rope_parameters"] = {"rope_theta": 1000000, "partial_rotary_factor": 0.5, "rope_type": "default"}
    assert ModelSpec.from_config(flat, "flat") == ModelSpec.from_config(json.loads(json.dumps(nested)), "nested")
