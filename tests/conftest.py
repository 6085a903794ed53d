"""Small models and data that the tests share."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def tokens():
    return torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def stories_folder():
    folder = SHARED / "stories260K"
    if not folder.exists():
        pytest.skip("needs the real small model stories260K beside the checkout")
    return folder


@pytest.fixture(scope="session")
def stories_text():
    path = SHARED / "text" / "tinystories_val_68stories.txt"
    if not path.exists():
        pytest.skip("needs the TinyStories text beside the checkout")
    return path


@pytest.fixture
def stories(stories_folder):
    return AutoModelForCausalLM.from_pretrained(stories_folder).eval()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Remember what failed: test_families.py writes a table of what passed."""
    outcome = yield
    if outcome.get_result().failed:
        item.failed_here = True
