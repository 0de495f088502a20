"""Seeds, threads, and the arguments that a contract's class attributes give to its tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from sklearn.datasets import load_digits

settings.register_profile("same", derandomize=True)  # the same examples everywhere; --hypothesis-profile=default draws
settings.load_profile("same")
pytest.register_assert_rewrite("models.contract", "models.exports")


def pytest_configure():
    torch.set_num_threads(1)  # the models are tiny, and threads that wait for a busy core cost a hundredfold


def pytest_generate_tests(metafunc):
    """A test class with ``kinds``: its tests with an argument ``kind`` run once for each of them; ``methods`` alike."""
    own = {name.strip() for m in metafunc.definition.iter_markers("parametrize") for name in str(m.args[0]).split(",")}
    for name in ("kind", "method", "pool"):
        values = getattr(metafunc.cls, f"{name}s", None)
        if values is not None and name in metafunc.fixturenames and name not in own:
            metafunc.parametrize(name, list(values), ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits():
    """256 handwritten digits (256, 1, 8, 8) and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:256] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[:256])
