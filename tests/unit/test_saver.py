"""Which checkpoints stay."""

import json
import math

from glm45_tune.mcore import checkpoint
from glm45_tune.training import saver


def test_what_is_not_a_number_is_never_the_best(tmp_path):
    """One evaluation that failed must not cost the best checkpoint, nor stand in the way of the next one that is better."""
    for step, loss in ((1, math.nan), (2, 0.5), (3, 0.7), (4, math.inf), (5, 0.9)):
        path = checkpoint.step_directory(tmp_path, step)
        path.mkdir(parents=True)
        (path / checkpoint.COMPLETE).write_text(json.dumps({"step": step, "eval_loss": loss}))
    saver._prune(tmp_path, limit=1, keeps_best=True)
    kept = [path.name for path in checkpoint.complete_checkpoints(tmp_path)]
    assert kept == ["step_000002", "step_000005"]
