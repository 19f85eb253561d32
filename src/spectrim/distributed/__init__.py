"""Several processes on one run, started by torchrun: who they are, and what they exchange.

Windows are split over the processes, sums are added in fp64, and what one process has computed is
broadcast. Only torch.distributed is used: gloo between CPUs, nccl between CUDA devices.
"""
