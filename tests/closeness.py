"""When two runs are the same run up to the order in which fp32 adds up."""

import math

import torch

# fp32 sums in another order differ by a few units in the last place (6e-8); Adam divides gradients by their size, so
# that a weight whose gradient is nearly 0 moves by up to a few percent of the learning rate (1e-3) differently.
LOSS = {"rel_tol": 1e-5, "abs_tol": 1e-6}
WEIGHT = {"rtol": 0, "atol": 1e-5}


def require_close(found, want):
    assert found["layers"] == want["layers"]
    for stage in ("select", "transfer"):
        assert len(found["history"][stage]) == len(want["history"][stage])
    compare(found["history"], want["history"], "history")
    compare(found["rounds"], want["rounds"], "rounds")
    compare(found["perplexity"], want["perplexity"], "perplexity")
    assert found["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, **WEIGHT)


def compare(found, want, where):
    """Nested plain values; numbers as close as LOSS says, those of a list of layers relative to the largest of it."""
    if isinstance(want, dict):
        assert {str(key) for key in found} == {str(key) for key in want}, where
        by_name = {str(key): value for key, value in found.items()}
        for key, value in want.items():
            own, wanted = by_name[str(key)], value
            if key == "gate" and "gates" in want:  # of the layer that went: one of the list's
                own, wanted = [*by_name["gates"], own], [*want["gates"], value]
            compare(own, wanted, f"{where}.{key}")
    elif isinstance(want, list) and want and all(isinstance(value, float | None) for value in want):
        scale = max(abs(value) for value in want if value is not None)
        assert [value is None for value in found] == [value is None for value in want], where
        for a, b in zip(found, want, strict=True):
            assert a is None or math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4 * scale), (where, a, b)
    elif isinstance(want, list):
        assert len(found) == len(want), where
        for index, value in enumerate(want):
            compare(found[index], value, f"{where}.{index}")
    elif isinstance(want, float):
        assert math.isclose(found, want, **LOSS), (where, found, want)
    else:
        assert found == want, where
