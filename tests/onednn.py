"""Ways to multiply float32 that can be had here: torch may have been built without oneDNN."""

import pytest
import torch

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)

BY_ONEDNN = [pytest.param(False, id="mm"), pytest.param(True, id="oneDNN", marks=needs_onednn)]
"""Values of `Products.by_onednn`."""
