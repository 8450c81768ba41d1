"""Steps of training from scratch, timed in rounds."""

import statistics

from experiments.pretrain_throughput import OWN, Settings, flops_per_token, measure_all, rates
from fabric_jax.models.registry import get_config

SETTINGS = Settings(
    model="bitnet-tiny",
    vocab_size=128,
    rows=2,
    length=16,
    steps=2,
    warmup=1,
    rounds=2,
    dtype="float32",
    tile_mib=1,
    unroll=False,
    round_logits=False,
)


def test_each_round_begins_anew_and_counts() -> None:
    """cuDNN is refused on CPU: said once, and our own kernels take its place."""
    found = list(measure_all(SETTINGS, ["ternary-int8"], []))
    names = [name for name, _ in found]
    own = f"ternary-int8{OWN}"
    assert names == ["ternary-int8", own, own]
    assert "error" in found[0][1]
    first, second = (result for _, result in found[1:])
    assert first["loss_last"] < first["loss_first"]
    assert (first["loss_first"], first["loss_last"]) == (
        second["loss_first"],
        second["loss_last"],
    )
    assert [len(each["seconds_median_of_rounds"]) for each in (first, second)] == [1, 2]
    assert second["seconds_min"] <= first["seconds_min"]
    assert second["compile_seconds"] == first["compile_seconds"]


def test_rates_are_of_the_median_of_all_steps() -> None:
    rounds = [[0.1, 0.2, 0.3], [0.4, 0.5]]
    found = rates(rounds, SETTINGS)
    tokens = 2 * 16 / 0.3
    assert found["seconds_median"] == 0.3
    assert found["seconds_median_of_rounds"] == [statistics.median(each) for each in rounds]
    assert found["tokens_per_second"] == tokens
    model = get_config("bitnet-tiny")
    weights = model.linear_parameters + 128 * model.hidden_size
    attention = 12 * model.num_layers * 16 * model.num_heads * model.head_dim
    per_token = 6 * weights + attention
    assert flops_per_token(get_config("bitnet-tiny"), 16) != per_token  # another vocabulary
    assert abs(found["mfu"] - tokens * per_token / 989e12) < 1e-12
