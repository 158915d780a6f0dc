"""One optimiser step on all parameters: masked at rate 0.4 and with an empty mask, beside torch's fused SGD."""

import pytest


@pytest.mark.parametrize("who", [0, 1], ids=["mfp", "torch"])
@pytest.mark.parametrize("job", [0, 1], ids=["masked", "empty"])
def test_step(jobs, measure, job, who):
    measure(jobs.optimizer_steps()[job].contestants[who])
