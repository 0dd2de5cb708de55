"""Where the repair of torch's Adam stays away; tests/parallel/test_adam_repair.py shows what it does."""

import tide_megatron.platform
from tide_megatron.platform.adam import repair_torch_adam

from megatron.core.optimizer import distrib_optimizer


def test_nothing_is_wrapped_where_the_adam_is_not_torchs(monkeypatch):
    optimizer_class = distrib_optimizer.DistributedOptimizer
    before = dict(vars(optimizer_class))
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    assert repair_torch_adam() is False
    assert dict(vars(optimizer_class)) == before
