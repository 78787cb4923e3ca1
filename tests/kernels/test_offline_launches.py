"""Every launcher gets as far as its launch, without a GPU: its kernels compile for what it gives them."""

import pytest


@pytest.mark.slow
def test_launchers_bind_their_arguments(offline):
    lines = offline("launches")
    # forward and backward; the loss: errors and gradient, their sum, the scaling that a factor of one skips
    assert lines["noising 1"] == lines["flow_errors 1"] == "2 launches"
    assert lines["corrected_loss 1"] == "3 launches"
    # forward, backward and the sums over its partial results; a bias costs no more than a sum of its own
    assert lines["gated"] == lines["rmsnorm_modulate"] == "4 launches"
    assert lines["gated, bias"] == "5 launches"
    assert (lines["qknorm_rope"], lines["qknorm_rope, bias"]) == ("3 launches", "4 launches")
    assert (lines["swiglu"], lines["swiglu, bias"]) == ("2 launches", "3 launches")
    assert (lines["short_attention"], lines["medium_attention"]) == ("2 launches", "3 launches")
    assert lines["drop_labels 1"] == "1 launches"
