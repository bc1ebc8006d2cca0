import math

from fastgrpo.health import Health

DIFFERENCE = "sampling/sampling_logp_difference/mean"


def test_each_warning_is_said_once_and_only_where_it_is_due():
    health = Health()
    said = [
        list(health.warnings(metrics, fresh=fresh))
        for metrics, fresh in (
            ({DIFFERENCE: 0.05, "num_computed_sequences": 8}, True),
            ({DIFFERENCE: 0.3, "num_computed_sequences": 8}, False),  # the policy has moved
            ({DIFFERENCE: math.nan, "num_computed_sequences": 8}, True),
            ({DIFFERENCE: 0.3, "num_computed_sequences": 8}, True),
            ({DIFFERENCE: 0.4, "num_computed_sequences": 0}, True),
            ({DIFFERENCE: 0.4, "num_computed_sequences": 0}, True),
        )
    ]
    assert [len(each) for each in said] == [0, 0, 0, 1, 1, 0]
    assert said[3][0].startswith("warning: log-probs in training are 0.3 from those of the sampler")
    assert said[4][0].startswith("warning: no group of this step has a signal")
