"""What needs a GPU: `sh run_tests.sh -m gpu`. Elsewhere, and in the other suite, it is skipped."""

import numpy as np
import paddle
import pytest

from hnas.base.device import set_tf32
from hnas.evaluation.counts import Counts
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.shared import SharedEvaluator
from hnas.tools.check_device import facts, fused, loaders, norms, operators, training, walk
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.plan import Plan
from hnas.tools.check_device.processes import twin
from hnas.tools.check_device.results import FAILED
from hnas.tools.check_device.walk import Subject

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu(request, tmp_path_factory):
    """A machine whose first card is checked."""
    if request.config.option.markexpr != "gpu":
        pytest.skip("GPUs are hidden from this suite; run: sh run_tests.sh -m gpu")
    if not paddle.is_compiled_with_cuda():
        pytest.skip("this Paddle is a build for CPUs")
    if not paddle.device.cuda.device_count():
        pytest.skip("Paddle sees no GPU")
    plan = Plan((0,), quick=True)
    folder = tmp_path_factory.mktemp("check")
    paddle.set_device("gpu:0")
    set_tf32("off")
    with twin(folder, plan):
        yield Machine(plan, folder)
    paddle.set_device("cpu")


@pytest.mark.parametrize("part", [facts, operators, norms, walk, fused, training, loaders])
def test_a_part_of_check_device_passes(gpu, part):
    failed = [result for result in part.check(gpu) if result.state == FAILED]
    assert not failed, failed


def test_a_walk_counts_the_reference_engines_hits(gpu):
    subject = Subject("mini", "resnet48_mini", 6, 40, 32)
    network = subject.network()
    archs, batch = subject.architectures(network), subject.batch()
    counts = Counts.zeros(len(archs))
    SharedEvaluator(network, archs).evaluate(*batch, counts)
    expected = evaluate_reference(network, archs, [batch])
    # In float32 the engines may differ in images whose margin is a rounding.
    np.testing.assert_allclose(counts.top1, expected.top1, atol=1)
    np.testing.assert_allclose(counts.top5, expected.top5, atol=1)


def test_a_step_of_training_lowers_the_loss_on_its_own_batch(gpu):
    model = training.prepared(training.stage2(), onednn=False)
    losses = [float(training.run(model, 0, 1)[0]) for _ in range(8)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
