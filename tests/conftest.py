"""Settings of the whole suite."""

import torch

# Tiny tensors gain nothing from threads, and two suites side by side lose a lot to them.
torch.set_num_threads(1)
