"""Settings of the whole suite."""

import torch

import second_device

# Tiny tensors gain nothing from threads, and two suites side by side lose a lot to them.
torch.set_num_threads(1)

# Before the first backward pass: autograd counts the devices that there are once.
if second_device.available():
    second_device.register()
