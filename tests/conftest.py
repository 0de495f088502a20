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
    """A test class with ``kinds``: its tests with an argument ``kind`` run once for each of them; ``methods`` alike.

    Of ``others``, further methods, only the first two kinds are not slow.
    """
    own = {name.strip() for m in metafunc.definition.iter_markers("parametrize") for name in str(m.args[0]).split(",")}
    asked = [name for name in ("kind", "method", "pool") if name in metafunc.fixturenames and name not in own]
    values = {name: list(getattr(metafunc.cls, f"{name}s")) for name in asked if hasattr(metafunc.cls, f"{name}s")}
    others = list(getattr(metafunc.cls, "others", ())) if "method" in values else []
    if others and "kind" in values:
        kinds, methods = values.pop("kind"), values.pop("method")
        pairs = [pytest.param(kind, method, id=f"{kind}-{method}") for kind in kinds for method in methods]
        for i, kind in enumerate(kinds):
            marks = pytest.mark.slow if i > 1 else ()
            pairs += [pytest.param(kind, method, marks=marks, id=f"{kind}-{method}") for method in others]
        metafunc.parametrize(("kind", "method"), pairs)
    for name, found in values.items():
        metafunc.parametrize(name, found + others if name == "method" else found, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits():
    """256 handwritten digits (256, 1, 8, 8) and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:256] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[:256])
