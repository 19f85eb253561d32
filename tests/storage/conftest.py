import pytest
import torch


@pytest.fixture(autouse=True)
def single_thread():
    """Tiny matrices: threads cost more than they bring, and one thread sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
