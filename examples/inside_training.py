"""Compress a model object in the middle of a training script, and train what is left of it.

python examples/inside_training.py [MODEL [TEXT.txt [OUT]]]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim
from spectrim.demo.run import CALIBRATION, MODEL


def main(model=MODEL, text=CALIBRATION, output="training", *, steps=20, batch=4, length=64):
    """Compress on the first windows of the text, train on the rest."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    count = (steps + 4) * batch
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = ids[: count * length].view(count, length)
    calibration, training = windows[: 4 * batch], windows[4 * batch :]

    # The object is changed in place: its layers are now pairs of factors with gradients.
    small = Path(output) / "compressed"
    spectrim.compress(network, keep=0.6, text=calibration, storage="factored", output=small)
    network.train()

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    losses = []
    for rows in training.split(batch):
        loss = network(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses)}: {losses[-1]:.4f}")

    trained = Path(output) / "trained"
    network.save_pretrained(trained)
    tokenizer.save_pretrained(trained)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
